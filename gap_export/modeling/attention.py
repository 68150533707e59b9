"""Attention and cache as ONNX operators, reached through transformers' own seams.

transformers lets a model be built with a named attention function and hands its cache to every layer. We register one
function that emits ONNX `Attention` with an explicit mask, and pass a cache whose `update` emits `TensorScatter` into a
buffer of fixed capacity. The modelling code itself is traced unchanged: it stays the reference by construction.

Shape letters: B batch, H heads, S query tokens, C cache capacity, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "gap_export"
DECOMPOSED = "gap_export_in_matmuls"
"""For towers below a choice of one token after the other: TensorRT-RTX 1.7 crashes while it builds a graph that has both a fused
`Attention` and a loop."""

OPSET = 24
_SEQUENCE_AXIS = 2


@dataclass
class AttentionProbe:
    """What one attention compares, for those who must know who looks at whom: hand it to a layer as `capture`.

    Attributes:
        query_BHSD: rotated queries.
        key_BGCD: rotated keys of the G key heads, as the attention sees them.
        scale: of their products.
    """

    query_BHSD: Tensor | None = None
    key_BGCD: Tensor | None = None
    scale: float = 1.0


def onnx_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHCD: Tensor,
    value_BHCD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    capture: AttentionProbe | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One `Attention` node with one output and `is_causal=0`.

    Causal flags are aligned to the upper left in both runtimes, which is wrong as soon as there is a cache; and fused
    rotary variants count positions up from the first one. So the mask is explicit, and rotary stays outside.

    Args:
        attention_mask: bool [B, 1, S, C], true where a query may look; None for full attention.
        capture: filled in, where the caller gave one to the layer.

    Returns:
        [B, S, H, D] as transformers expects it, and no attention weights.
    """
    batch, heads, queries, _width = query_BHSD.shape
    scale = scaling if scaling is not None else query_BHSD.shape[-1] ** -0.5
    if capture is not None:
        capture.query_BHSD, capture.key_BGCD, capture.scale = query_BHSD, key_BHCD, float(scale)
    inputs = [query_BHSD, key_BHCD, value_BHCD] + ([] if attention_mask is None else [attention_mask])
    context_BHSD = torch.onnx.ops.symbolic(
        "Attention",
        inputs,
        {"scale": float(scale), "is_causal": 0},
        dtype=query_BHSD.dtype,
        shape=(batch, heads, queries, value_BHCD.shape[-1]),
        version=OPSET,
    )
    return context_BHSD.transpose(1, 2), None


def attention_in_matmuls(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHCD: Tensor,
    value_BHCD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in plain operators; softmax in fp32."""
    scale = scaling if scaling is not None else query_BHSD.shape[-1] ** -0.5
    logits_BHSC = torch.matmul(query_BHSD * scale, key_BHCD.transpose(2, 3))
    if attention_mask is not None:
        logits_BHSC = logits_BHSC.masked_fill(~attention_mask, torch.finfo(logits_BHSC.dtype).min)
    weights_BHSC = logits_BHSC.float().softmax(dim=-1).to(query_BHSD.dtype)
    return torch.matmul(weights_BHSC, value_BHCD).transpose(1, 2), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The caller always passes a finished 4-D mask; anything transformers would build by itself is unwanted."""
    return None


AttentionInterface.register(IMPLEMENTATION, onnx_attention)
AttentionInterface.register(DECOMPOSED, attention_in_matmuls)
for _name in (IMPLEMENTATION, DECOMPOSED):
    AttentionMaskInterface.register(_name, _no_mask)


def slot_mask(write_index_B: Tensor, queries: int, capacity: int) -> Tensor:
    """Causality by cache slot: query q of a row may look at slots up to `write_index + q`.

    Returns:
        bool [B, 1, S, C].
    """
    query_slots_BS = write_index_B[:, None] + torch.arange(queries)
    return (torch.arange(capacity)[None, None, :] <= query_slots_BS[:, :, None])[:, None]


@dataclass(frozen=True)
class CallSlots:
    """Where the tokens of one call of the decoder stand: all that a mask may depend on. Position ids are not among it.

    Attributes:
        write_index_B: int64, slot of the first token.
        queries: S, tokens of the call.
        capacity: C, slots of the cache.
        image_slots_BI2: int64, the first slot of every image and the one after its last; None under the causal mask.
    """

    write_index_B: Tensor
    queries: int
    capacity: int
    image_slots_BI2: Tensor | None = None


Mask = Callable[[CallSlots], Tensor]
"""Which slots every token of a call sees: bool [B, 1, S, C]."""


def causal(slots: CallSlots) -> Tensor:
    """The mask of most decoders: each token sees itself and those before it."""
    return slot_mask(slots.write_index_B, slots.queries, slots.capacity)


class SlotCache:
    """Duck-typed transformers cache over static buffers.

    Args:
        past: for each layer key and value, [B, Hkv, C, D] each: `key.0, value.0, key.1, ...`.
        write_index: [B] int64, the slot of this call's first token.
    """

    def __init__(self, past: Sequence[Tensor], write_index: Tensor) -> None:
        self._past = past
        self._write_index = write_index
        self.present: list[Tensor] = list(past)

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values into their slots; give back the whole buffers."""
        for index, fresh in ((2 * layer, key), (2 * layer + 1, value)):
            past = self._past[index]
            self.present[index] = torch.onnx.ops.symbolic(
                "TensorScatter",
                (past, fresh, self._write_index),
                {"axis": _SEQUENCE_AXIS, "mode": "linear"},
                dtype=past.dtype,
                shape=past.shape,
                version=OPSET,
            )
        return self.present[2 * layer], self.present[2 * layer + 1]
