"""Decoders and towers in plain torch, written from their papers: references that share nothing with the code under test.

Weights are looked up by the names under which they are published. Sequences are run whole, without a cache, with position ids given for
every token.

Shape letters: S tokens, T tower tokens (class token first), H decoder width, E tower width, A heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, silu, softmax

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Llama:
    """LLaMA (arXiv 2302.13971): RMSNorm before, rotary positions, SwiGLU.

    Attributes:
        weights: `model.layers.N. ...`, `model.norm.weight`, `lm_head.weight`, `model.embed_tokens.weight`.
        layers: how many.
        heads: A.
        kv_heads: of keys and values.
        eps: of the norms.
        theta: of the rotary positions.
        blocks: (first, end) of runs of the sequence whose tokens all see each other; the rest is causal.
    """

    weights: Weights
    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float
    blocks: tuple[tuple[int, int], ...] = ()

    def embed(self, ids: list[int]) -> Tensor:
        """[S, H]."""
        return self.weights["model.embed_tokens.weight"][torch.tensor(ids, dtype=torch.int64)]

    def logits(self, embeds_SH: Tensor, position_ids: list[int]) -> Tensor:
        """[V] of the last token."""
        x = embeds_SH
        for number in range(self.layers):
            x = x + self._attention(number, self._norm(x, f"layers.{number}.input_layernorm"), position_ids)
            x = x + self._mlp(number, self._norm(x, f"layers.{number}.post_attention_layernorm"))
        return self.weights["lm_head.weight"] @ self._norm(x[-1], "norm")

    def answer(
        self, embeds_SH: Tensor, position_ids: list[int], next_position: int, tokens: int
    ) -> tuple[list[int], list[Tensor]]:
        """Greedy: (ids, logits of every step)."""
        ids, position_ids, every = [], list(position_ids), []
        for step in range(tokens):
            logits = self.logits(embeds_SH, position_ids)
            every.append(logits)
            ids.append(int(logits.argmax()))
            embeds_SH = torch.cat([embeds_SH, self.embed(ids[-1:])])
            position_ids.append(next_position + step)
        return ids, every

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weights[f"model.{name}.weight"]

    def _attention(self, number: int, x: Tensor, position_ids: list[int]) -> Tensor:
        name = f"model.layers.{number}.self_attn"
        q, k, v = (x @ self.weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        width = q.shape[-1] // self.heads
        q = self._rotated(q.view(len(x), self.heads, width), position_ids)
        k = self._rotated(k.view(len(x), self.kv_heads, width), position_ids)
        v = v.view(len(x), self.kv_heads, width)
        mixed = []
        for head in range(self.heads):
            shared = head // (self.heads // self.kv_heads)
            scores = q[:, head] @ k[:, shared].T / width**0.5
            hidden = torch.ones_like(scores).triu(1).bool()
            for first, end in self.blocks:
                hidden[first:end, first:end] = False
            scores = scores.masked_fill(hidden, float("-inf"))
            mixed.append(softmax(scores, -1) @ v[:, shared])
        return torch.cat(mixed, -1) @ self.weights[f"{name}.o_proj.weight"].T

    def _rotated(self, x_SAD: Tensor, position_ids: list[int]) -> Tensor:
        """Pairs (j, j + D / 2) are turned by position * theta^(-2 j / D)."""
        half = x_SAD.shape[-1] // 2
        turn = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.tensor(position_ids, dtype=torch.float64)[:, None] * turn)[:, None].float()
        first, second = x_SAD[..., :half], x_SAD[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        )

    def _mlp(self, number: int, x: Tensor) -> Tensor:
        gate, up, down = (
            self.weights[f"model.layers.{number}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@dataclass(frozen=True)
class ClipTower:
    """CLIP's vision transformer (arXiv 2103.00020).

    Attributes:
        weights: `vision_model. ...`.
        heads: A.
        patch: side of a patch in pixels.
    """

    weights: Weights
    heads: int
    patch: int

    def run(self, pixels_CHW: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Hidden states after so many layers [T, E], and the class token's attention in the last of them [T - 1]."""
        w = {key.removeprefix("vision_model."): value for key, value in self.weights.items()}
        patches = conv2d(pixels_CHW[None], w["embeddings.patch_embedding.weight"], stride=self.patch)
        x = torch.cat([w["embeddings.class_embedding"][None], patches[0].flatten(1).T])
        x = x + w["embeddings.position_embedding.weight"]
        x = self._norm(x, w, "pre_layrnorm")
        attention = torch.empty(0)
        for number in range(layers):
            name = f"encoder.layers.{number}"
            normed = self._norm(x, w, f"{name}.layer_norm1")
            q, k, v = (self._linear(normed, w, f"{name}.self_attn.{part}_proj") for part in "qkv")
            mixed, attention = attended(q, k, v, self.heads)
            x = x + self._linear(mixed, w, f"{name}.self_attn.out_proj")
            hidden = self._linear(self._norm(x, w, f"{name}.layer_norm2"), w, f"{name}.mlp.fc1")
            hidden = hidden * torch.sigmoid(1.702 * hidden)  # QuickGELU
            x = x + self._linear(hidden, w, f"{name}.mlp.fc2")
        return x, attention[1:]

    def _norm(self, x: Tensor, w: Weights, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def _linear(self, x: Tensor, w: Weights, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attended(q_TE: Tensor, k_TE: Tensor, v_TE: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attention of everything to everything: mixed values [T, E], and the first row's weights, mean over heads [T]."""
    width = q_TE.shape[-1] // heads
    mixed, rows = [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        weights = softmax(q_TE[:, own] @ k_TE[:, own].T / width**0.5, -1)
        mixed.append(weights @ v_TE[:, own])
        rows.append(weights[0])
    return torch.cat(mixed, -1), torch.stack(rows).mean(0)


@dataclass(frozen=True)
class EvaTower:
    """EVA-CLIP's vision transformer as MiniGPT-v2 uses it: q and v with a bias, k without, no norm at the end.

    Attributes:
        weights: as in `eva_vit_g.pth`, positions already those of the image's grid.
        heads: A.
        patch: side of a patch in pixels.
        layers: how many.
    """

    weights: Weights
    heads: int
    patch: int
    layers: int

    def run(self, pixels_CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [T, E], and the class token's attention in the last layer [T - 1]."""
        w = self.weights
        patches = conv2d(
            pixels_CHW[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=self.patch
        )
        x = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + w["pos_embed"][0]
        attention = torch.empty(0)
        for number in range(self.layers):
            name = f"blocks.{number}"
            normed = layer_norm(x, x.shape[-1:], w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"], 1e-6)
            q, k, v = (normed @ w[f"{name}.attn.qkv.weight"].T).chunk(3, -1)
            mixed, attention = attended(
                q + w[f"{name}.attn.q_bias"], k, v + w[f"{name}.attn.v_bias"], self.heads
            )
            x = x + mixed @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
            normed = layer_norm(x, x.shape[-1:], w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"], 1e-6)
            hidden = gelu(normed @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
            x = x + hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
        return x, attention[1:]


def spliced(
    decoder: Llama, ids: list[int], placeholder: int, tokens_KH: Tensor, kept: list[int], visual: int
) -> tuple[Tensor, list[int], int]:
    """A prompt whose placeholder gives way to the kept tokens, every token at the place it had before pruning.

    Returns:
        (embeddings [S, H], position ids, position of the first generated token).
    """
    before = ids.index(placeholder)
    after = ids[before + 1 :]
    embeds = torch.cat([decoder.embed(ids[:before]), tokens_KH, decoder.embed(after)])
    positions = [
        *range(before),
        *(before + place for place in kept),
        *range(before + visual, before + visual + len(after)),
    ]
    return embeds, positions, before + visual + len(after)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights under which positions matter: matrices that keep lengths times 1.8, norms around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        spread = 1.8 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1
        centre = (
            1.0 if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name else 0.0
        )
        weights[name] = centre + spread * torch.randn(shape, generator=generator)
    return weights


def llama_shapes(
    *, vocabulary: int, width: int, hidden: int, layers: int, heads: int, kv_heads: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a Llama as Hugging Face publishes it."""
    shared = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for number in range(layers):
        name = f"model.layers.{number}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (width, width),
            f"{name}.self_attn.k_proj.weight": (shared, width),
            f"{name}.self_attn.v_proj.weight": (shared, width),
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_proj.weight": (hidden, width),
            f"{name}.mlp.up_proj.weight": (hidden, width),
            f"{name}.mlp.down_proj.weight": (width, hidden),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
