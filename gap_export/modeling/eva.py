"""EVA-CLIP's vision transformer (arXiv 2211.07636) as BLIP-2 and MiniGPT-v2 use it: `eva_vit_g.pth`.

Facts: q and v have a bias, k has none; positions are learned; nothing is normalised at the end; heads are 88 wide; 39 of the
published blocks are used. Parameters have the published names.

Shape letters: B batch, T tokens (class token first), E width, A heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError

HEAD_WIDTH = 88
MOST_BLOCKS = 39
EPS = 1e-6
_LARGEST_PATCH = 64


@dataclass(frozen=True)
class EvaSizes:
    """What the shapes of the weights say.

    Attributes:
        width: E.
        blocks: how many are run.
        hidden: of the feed-forward layers.
        patch: side of a patch in pixels.
    """

    width: int
    blocks: int
    hidden: int
    patch: int

    @property
    def heads(self) -> int:
        """A."""
        return self.width // HEAD_WIDTH


def eva_sizes(checkpoint: Checkpoint, prefix: str) -> EvaSizes:
    """Sizes of the tower whose weights are called `prefix...`.

    Raises:
        CheckpointError: there is none, or its weights are of other shapes.
    """
    patches = _shape(checkpoint, f"{prefix}patch_embed.proj.weight", 4)
    if patches[0] % HEAD_WIDTH or not 0 < patches[-1] <= _LARGEST_PATCH:
        raise CheckpointError(
            f"has patches of {patches[-1]} pixels and a width of {patches[0]}, where {HEAD_WIDTH} divides EVA-CLIP's",
            subject=str(checkpoint.stored(f"{prefix}patch_embed.proj.weight").file),
            hint="give EVA-CLIP's eva_vit_g.pth",
        )
    blocks = {
        key.removeprefix(f"{prefix}blocks.").partition(".")[0]
        for key in checkpoint.weights
        if key.startswith(f"{prefix}blocks.")
    }
    return EvaSizes(
        width=patches[0],
        blocks=min(len(blocks), MOST_BLOCKS),
        hidden=_shape(checkpoint, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        patch=patches[-1],
    )


def _shape(checkpoint: Checkpoint, key: str, axes: int) -> tuple[int, ...]:
    """Of a weight with so many axes."""
    stored = checkpoint.stored(key)
    if len(stored.shape) != axes or 0 in stored.shape:
        raise CheckpointError(
            f"has a {key.rpartition('/')[2]} of shape {list(stored.shape)}",
            subject=str(stored.file),
            hint="give EVA-CLIP's eva_vit_g.pth",
        )
    return stored.shape


class _Patches(nn.Module):
    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches_BNE: Tensor = self.proj(pixels_BCHW).flatten(2).transpose(1, 2)
        return patches_BNE


class EvaAttention(nn.Module):
    """Self-attention.

    Args:
        sizes: of the weights.
        attention: name of the function that attends, as towers of transformers take it.
    """

    num_key_value_groups = 1

    def __init__(self, sizes: EvaSizes, attention: str) -> None:
        super().__init__()
        self.heads = sizes.heads
        self._attend = AttentionInterface()[attention]
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(sizes.width))
        self.v_bias = nn.Parameter(torch.empty(sizes.width))
        self.proj = nn.Linear(sizes.width, sizes.width)

    def split(self, normed_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, A, T, D] each."""
        q_BTE, k_BTE, v_BTE = self.qkv(normed_BTE).chunk(3, dim=-1)
        parts = (q_BTE + self.q_bias, k_BTE, v_BTE + self.v_bias)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, normed_BTE: Tensor) -> Tensor:
        """[B, T, E] -> the same."""
        q_BATD, k_BATD, v_BATD = self.split(normed_BTE)
        mixed_BTAD, _ = self._attend(self, q_BATD, k_BATD, v_BATD, None, scaling=HEAD_WIDTH**-0.5)
        out_BTE: Tensor = self.proj(mixed_BTAD.flatten(2))
        return out_BTE


class _FeedForward(nn.Module):
    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        out_BTE: Tensor = self.fc2(nn.functional.gelu(self.fc1(x_BTE)))
        return out_BTE


class EvaBlock(nn.Module):
    """One layer."""

    def __init__(self, sizes: EvaSizes, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=EPS)
        self.attn = EvaAttention(sizes, attention)
        self.norm2 = nn.LayerNorm(sizes.width, eps=EPS)
        self.mlp = _FeedForward(sizes)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """[B, T, E] -> the same."""
        x_BTE = x_BTE + self.attn(self.norm1(x_BTE))
        out_BTE: Tensor = x_BTE + self.mlp(self.norm2(x_BTE))
        return out_BTE


class EvaTower(nn.Module):
    """The tower.

    Args:
        sizes: of its weights.
        tokens: T, the class token included; the table of positions has so many rows.
        attention: implementation, as of `EvaAttention`.
    """

    def __init__(self, sizes: EvaSizes, tokens: int, attention: str) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, sizes.width))
        self.patch_embed = _Patches(sizes)
        self.blocks = nn.ModuleList(EvaBlock(sizes, attention) for _ in range(sizes.blocks))

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Returns:
            the last block's output [B, T, E], and what it was given.
        """
        patches_BNE = self.patch_embed(pixels_BCHW)
        first_B1E = self.cls_token.expand(patches_BNE.shape[0], -1, -1)
        x_BTE = torch.cat([first_B1E, patches_BNE], dim=1) + self.pos_embed
        into_BTE = x_BTE
        for block in self.blocks:
            into_BTE = x_BTE
            x_BTE = block(x_BTE)
        return x_BTE, into_BTE
