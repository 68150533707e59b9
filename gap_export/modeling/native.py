"""Images at their own shape in the vision graph: towers whose patches know where they lie, and attend to all others or within windows.

The layers' parts are those of transformers. What is done differently than there follows from one image per call: its patches
need no borders between images, and windows are a batch, padded at the edge, instead of a loop over pieces.

Shape letters: as in `prune/__init__.py`; n visual tokens, p patches of each, P = n * p patches, F samples of a patch, A heads, W windows,
M visual tokens of the largest window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from gap_export.modeling.received import received

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [P, D] each."""


@dataclass(frozen=True)
class Windows:
    """Who attends to whom where attention stays within windows.

    Attributes:
        tokens_WM: the tokens of each window, -1 where it ends early.
        slots_n: where each token stands among those W * M.
        patches: of a token.
        mask_W1SS: bool, true where the key is a patch, false where it is padding. ONNX Runtime wants a row for every query.
    """

    tokens_WM: Tensor
    slots_n: Tensor
    patches: int
    mask_W1SS: Tensor

    @classmethod
    def of(cls, tokens_WM: Tensor, slots_n: Tensor, patches: int) -> Windows:
        """From what preprocessing gives."""
        real_WS = (tokens_WM >= 0)[:, :, None].expand(-1, -1, patches).flatten(1)
        mask_W1SS = real_WS[:, None, None].expand(-1, -1, real_WS.shape[1], -1)
        return cls(tokens_WM, slots_n, patches, mask_W1SS)

    def divided(self, heads_PAD: Tensor) -> Tensor:
        """[W, A, M * p, D]: what belongs to the patches, window by window; padding repeats the first token."""
        tokens_npAD = heads_PAD.unflatten(0, (-1, self.patches))
        picked = tokens_npAD.index_select(0, self.tokens_WM.clamp(min=0).flatten())
        divided_WASD: Tensor = picked.unflatten(0, self.tokens_WM.shape).flatten(1, 2).transpose(1, 2)
        return divided_WASD

    def joined(self, context_WSAD: Tensor) -> Tensor:
        """[P, A, D]: the way back."""
        tokens_mpAD = context_WSAD.unflatten(1, (-1, self.patches)).flatten(0, 1)
        joined_PAD: Tensor = tokens_mpAD.index_select(0, self.slots_n).flatten(0, 1)
        return joined_PAD


def embedded(patch_embed: Any, pixel_values_npF: Tensor) -> Tensor:
    """[P, E]: a convolution whose kernel covers all of its input is a matrix product."""
    weight = patch_embed.proj.weight
    pixels_PF = pixel_values_npF.flatten(0, 1).to(weight.dtype)
    return torch.nn.functional.linear(pixels_PF, weight.flatten(1), patch_embed.proj.bias)


def layer(block: Any, hidden_PE: Tensor, rotary: Rotary, windows: Windows | None = None) -> Tensor:
    """One layer of the tower.

    Args:
        block: of transformers, with `norm1`, `attn`, `norm2`, `mlp`.
        hidden_PE: patches.
        rotary: of their places.
        windows: None where all patches attend to all.

    Returns:
        [P, E].
    """
    hidden_PE = hidden_PE + _attended(block.attn, block.norm1(hidden_PE), rotary, windows)
    output_PE: Tensor = hidden_PE + block.mlp(block.norm2(hidden_PE))
    return output_PE


def shown(block: Any, hidden_PE: Tensor, rotary: Rotary, patches: int) -> dict[str, Any]:
    """What a layer in which all patches attend to all shows pruners: fields of `prune.VisionFeatures`.

    Args:
        block: as of `layer`.
        hidden_PE: its input.
        rotary: of the places.
        patches: of a visual token.
    """
    query_PAD, key_PAD, _ = _heads(block.attn, block.norm1(hidden_PE), rotary)
    return received(query_PAD.transpose(0, 1)[None], key_PAD.transpose(0, 1)[None], patches)


def _heads(attention: Any, hidden_PE: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [P, A, D] each."""
    extents = (3, attention.num_heads, attention.head_dim)
    query_PAD, key_PAD, value_PAD = attention.qkv(hidden_PE).unflatten(-1, extents).unbind(1)
    query_PAD, key_PAD = apply_rotary_pos_emb_vision(query_PAD, key_PAD, *rotary)
    return query_PAD, key_PAD, value_PAD


def _attended(attention: Any, hidden_PE: Tensor, rotary: Rotary, windows: Windows | None) -> Tensor:
    heads = _heads(attention, hidden_PE, rotary)
    compute = AttentionInterface()[attention.config._attn_implementation]
    if windows is None:
        whole = (each.transpose(0, 1)[None] for each in heads)
        context_PAD = compute(attention, *whole, None, scaling=attention.scaling)[0][0]
    else:
        pieces = (windows.divided(each) for each in heads)
        context_WSAD = compute(attention, *pieces, windows.mask_W1SS, scaling=attention.scaling)[0]
        context_PAD = windows.joined(context_WSAD)
    output_PE: Tensor = attention.proj(context_PAD.flatten(1))
    return output_PE
