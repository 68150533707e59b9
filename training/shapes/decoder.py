"""A fast forward pass of the projector and the Llama decoder for training, on the modules of transformers.

One image serves Q questions. The tokens before the image and the image itself are computed once; each question
then attends to them and to itself, never to another question. Position ids are those of one long conversation:

    prefix 0..P-1 | visual P..P+N-1 | first question P+N.. | second question ..

so a question is met at many distances from the image. Some questions are asked without any image and answered with
an empty box, so that the decoder stays articulate wherever its text stands. Four streams run side by side: the prefix
(the same for every image, so it has no batch axis), the visual tokens, the questions (left-padded to a common
length, padding masked) and the questions without an image. Linear layers and attention run in bfloat16, the residual stream in float32. The weights are those of
the transformers modules, cast once per step, with each RMSNorm's weight multiplied into the layer that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from training.shapes.attention import MAX_LOGIT, ExpAttend, Rotate, SwiGlu, UnitRms, half_turn
from training.shapes.model import PATCHES, ROPE_THETA


@dataclass(frozen=True)
class Aids:
    """What the attention penalties need. `background` [B, N] and `target` [B, Q, N] are 0/1 masks over patches."""

    background: Tensor
    target: Tensor
    target_layer: int = 3
    target_heads: int = 2


@dataclass(frozen=True)
class Alone:
    """Questions asked without an image: token ids [R, T], leading pad counts [R], position of the first token [R]."""

    turns: Tensor
    padding: Tensor
    start: Tensor


@dataclass
class DecoderOutput:
    """Logits [B, Q, A, V] of the rows that predict the answer, and what the training aids look at."""

    logits: Tensor
    visual_states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, N, 128], float32
    visual_to_visual: list[Tensor] = field(default_factory=list)  # per layer: mean attention mass
    text_to_background: list[Tensor] = field(default_factory=list)  # per layer: mean attention mass
    target_mass: Tensor | None = None  # [B, heads, Q, 2]
    alone_logits: Tensor | None = None  # [R, A, V]


class FastDecoder:
    """Runs the decoder of `model` on visual features; holds no weights of its own."""

    def __init__(
        self, model: LlavaForConditionalGeneration, prefix: list[int], question_len: int, answer_len: int
    ) -> None:
        self.model = model
        self.llama = model.model.language_model
        self.heads = self.llama.config.num_attention_heads
        self.dim = self.llama.config.hidden_size // self.heads
        self.prefix = torch.tensor(prefix)
        self.question_len = question_len
        self.turn_len = question_len + answer_len
        angles = torch.arange(512, dtype=torch.float32)[:, None] / ROPE_THETA ** (
            torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        )
        angles = angles.repeat(1, 2 * self.heads)  # [512, 128]: both halves of every head turn alike
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        count = len(prefix)
        causal = torch.ones(count + PATCHES, count + PATCHES).tril().bfloat16()
        self.prefix_mask, self.visual_mask = causal[:count, :count].contiguous(), causal[count:].contiguous()
        self.turn_mask = torch.ones(self.turn_len, self.turn_len).tril().bfloat16()

    def __call__(
        self,
        features_BND: Tensor,
        turns_BQT: Tensor,
        padding_BQ: Tensor,
        aids: Aids | None = None,
        alone: Alone | None = None,
    ) -> DecoderOutput:
        """`features` [B, N, 128] from the tower, `turns` [B, Q, T] token ids, `padding` [B, Q] leading pad counts."""
        batch, queries, length = turns_BQT.shape
        count, answer_from = len(self.prefix), self.question_len - 1
        embed = self.llama.embed_tokens.weight
        x_pre, x_txt = F.embedding(self.prefix, embed), F.embedding(turns_BQT, embed)
        x_vis = self._project(features_BND)

        place = torch.arange(length) - padding_BQ[..., None]
        valid = (place >= 0).bfloat16()  # [B, Q, T]
        own_mask = (self.turn_mask * valid[:, :, None, :])[:, None]  # [B, 1, Q, T, T]
        tables_pre = self._tables(torch.arange(count))
        tables_vis = self._tables(torch.arange(count, count + PATCHES))
        # As in a conversation, a question starts where the one before it ended (answer, </s>, "USER", ":" included).
        spans = length - padding_BQ + 3
        offset = (spans.cumsum(1) - spans)[..., None]
        tables_txt = self._tables(count + PATCHES + offset + place.clamp(min=0))
        if alone is not None:
            x_alone = F.embedding(alone.turns, embed)
            place = torch.arange(length) - alone.padding[:, None]
            tables_alone = self._tables(alone.start[:, None] + place.clamp(min=0))
            own = self.turn_mask * (place >= 0).bfloat16()[:, None, :]
            alone_mask = F.pad(own, (count, 0), value=1.0)[:, None]  # [R, 1, T, P + T]
        # Extra columns of V: the normaliser, the background, the prefix. They turn into attention masses.
        extra = torch.ones(batch, self.heads, count + PATCHES, 3, dtype=torch.bfloat16)
        if aids is not None:
            extra[..., :count, 1] = 0
            extra[..., count:, 1] = aids.background.bfloat16()[:, None]
        extra[..., count:, 2] = 0

        out = DecoderOutput(logits=x_txt)
        layers = self.llama.layers
        for number, layer in enumerate(layers):
            last = number == len(layers) - 1
            weights = _cast(layer, self.dim**-0.5, self.heads)
            q_pre, k_pre, v_pre = self._qkv(x_pre, weights, tables_pre)
            q_vis, k_vis, v_vis = self._qkv(x_vis, weights, tables_vis)
            q_txt, k_txt, v_txt = self._qkv(
                x_txt.flatten(1, 2), weights, [t.flatten(1, 2) for t in tables_txt]
            )
            k_all = torch.cat([k_pre.expand(batch, -1, -1, -1), k_vis], dim=2)
            v_all = torch.cat([torch.cat([v_pre.expand(batch, -1, -1, -1), v_vis], dim=2), extra], dim=3)
            q_own, k_own, v_own = (
                t.view(batch, self.heads, queries, length, self.dim) for t in (q_txt, k_txt, v_txt)
            )
            v_own = torch.cat([v_own, torch.ones_like(v_own[..., :1])], dim=-1)
            if last:  # only the rows that predict the answer are still needed
                q_own, own_mask = q_own[..., answer_from:, :].contiguous(), own_mask[..., answer_from:, :]
                q_txt = q_own.flatten(2, 3)
                x_txt = x_txt[:, :, answer_from:]
            rows = q_own.shape[3]

            shared = ExpAttend.apply(q_txt, k_all, v_all, None).view(batch, self.heads, queries, rows, -1)
            own = ExpAttend.apply(q_own, k_own, v_own, own_mask)
            norm = shared[..., self.dim : self.dim + 1] + own[..., self.dim :]
            text = (shared[..., : self.dim] + own[..., : self.dim]) / norm
            x_txt = self._finish(x_txt, text.permute(0, 2, 3, 1, 4).flatten(3), weights)
            if alone is not None:
                q, k, v = self._qkv(x_alone, weights, tables_alone)
                if last:
                    q, x_alone = q[..., answer_from:, :].contiguous(), x_alone[:, answer_from:]
                x_alone = self._finish(
                    x_alone, _with_prefix(q, k, v, k_pre, v_pre, alone_mask[:, :, -q.shape[2] :]), weights
                )
            if aids is not None:
                mass = shared[..., self.dim + 1].float() / norm[..., 0].float()
                weighting = valid[:, None, :, -rows:].float()
                out.text_to_background.append((mass * weighting).sum() / (weighting.sum() * self.heads))
                if number == aids.target_layer:
                    out.target_mass = self._target_mass(q_own, k_vis, norm, aids)
            if last:
                break
            seen = ExpAttend.apply(q_vis, k_all, v_all, self.visual_mask)
            norm = seen[..., self.dim : self.dim + 1]
            visual = (seen[..., : self.dim] / norm).transpose(1, 2).flatten(2)
            if aids is not None:
                itself = (q_vis * k_vis).sum(-1, dtype=torch.float32).clamp(max=MAX_LOGIT).exp()
                kept = (seen[..., self.dim + 2].float() + itself) / norm[..., 0].float()
                out.visual_to_visual.append(1 - kept.mean())
            x_pre = self._finish(x_pre, _attend(q_pre, k_pre, v_pre, self.prefix_mask)[0], weights)
            x_vis = self._finish(x_vis, visual, weights)
            out.visual_states[number] = x_vis
        head = (self.model.lm_head.weight * self.llama.norm.weight).bfloat16()
        out.logits = F.linear(UnitRms.apply(x_txt, 1e-5), head).float()
        if alone is not None:
            out.alone_logits = F.linear(UnitRms.apply(x_alone, 1e-5), head).float()
        return out

    def _project(self, features_BND: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        first, second = projector.linear_1, projector.linear_2
        hidden = F.linear(features_BND.bfloat16(), first.weight.bfloat16(), first.bias.bfloat16())
        return F.linear(F.gelu(hidden), second.weight.bfloat16(), second.bias.bfloat16()).float()

    def _tables(self, positions: Tensor) -> list[Tensor]:
        return [self.cos[positions], self.sin[positions]]

    def _qkv(
        self, x: Tensor, weights: dict[str, Tensor], tables: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, heads, tokens, dim] (B = 1 for the prefix)."""
        normed = UnitRms.apply(x, 1e-5)
        shape = (-1, x.shape[-2], self.heads, self.dim)
        q, k = (
            Rotate.apply(
                F.linear(normed, weights[name]), F.linear(normed, weights[name + "_turned"]), *tables
            )
            for name in "qk"
        )
        v = F.linear(normed, weights["v"])
        return tuple(t.view(shape).transpose(1, 2).contiguous() for t in (q, k, v))  # type: ignore[return-value]

    def _finish(self, x: Tensor, mixed: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Output projection and MLP, each added to the residual stream."""
        x = x + F.linear(mixed, weights["o"])
        normed = UnitRms.apply(x, 1e-5)
        hidden = SwiGlu.apply(F.linear(normed, weights["gate"]), F.linear(normed, weights["up"]))
        return x + F.linear(hidden, weights["down"])

    def _target_mass(self, q_own: Tensor, k_vis: Tensor, norm: Tensor, aids: Aids) -> Tensor:
        """Attention mass on the meant object's patches from the two rows before the first coordinate is known."""
        heads, first = aids.target_heads, self.question_len - 1
        q = q_own[:, :heads, :, first : first + 2].flatten(2, 3)
        logits = torch.matmul(q, k_vis[:, :heads].transpose(-1, -2)).float().clamp(max=MAX_LOGIT)
        weights = logits.exp().unflatten(2, (-1, 2))  # [B, heads, Q, 2, N]
        hit = (weights * aids.target[:, None, :, None, :]).sum(-1)
        return hit / norm[:, :heads, :, first : first + 2, 0].float()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of [B, heads, M, D] queries; returns [B, M, heads * D]."""
    seen = ExpAttend.apply(q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), mask)
    return (seen[..., :-1] / seen[..., -1:]).transpose(1, 2).flatten(2)


def _with_prefix(q: Tensor, k: Tensor, v: Tensor, k_pre: Tensor, v_pre: Tensor, mask: Tensor) -> Tensor:
    """Attention to the shared prefix and to the own tokens."""
    rows = len(q)
    keys = torch.cat([k_pre.expand(rows, -1, -1, -1), k], dim=2)
    values = torch.cat([v_pre.expand(rows, -1, -1, -1), v], dim=2)
    return _attend(q, keys, values, mask)


def _cast(layer: nn.Module, scale: float, heads: int) -> dict[str, Tensor]:
    """The layer's weights in bfloat16, norms multiplied in, queries scaled."""
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    q = (attention.q_proj.weight * (before * scale)).bfloat16()
    k = (attention.k_proj.weight * before).bfloat16()
    return {
        "q": q,
        "q_turned": half_turn(q, heads),
        "k": k,
        "k_turned": half_turn(k, heads),
        "v": (attention.v_proj.weight * before).bfloat16(),
        "o": attention.o_proj.weight.bfloat16(),
        "gate": (mlp.gate_proj.weight * after).bfloat16(),
        "up": (mlp.up_proj.weight * after).bfloat16(),
        "down": mlp.down_proj.weight.bfloat16(),
    }
