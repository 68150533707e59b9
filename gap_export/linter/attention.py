"""Find the attention operations of a graph, whatever form an exporter gave them.

Forms: the standard `Attention`, the fused operators of ONNX Runtime (`com.microsoft`), plugins whose name says attention,
and the decomposed form MatMul(Q, K) -> scale, mask -> Softmax -> MatMul(., V), in whole numbers or between quantizers too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from gap_export.linter.dataflow import (
    STANDARD_DOMAINS,
    Flow,
    integer,
    is_float,
    is_op,
    is_quantizing,
    operand,
)

Form = Literal["standard", "fused", "plugin", "decomposed"]


@dataclass(frozen=True)
class _Operands:
    """Operand numbers of a fused operator; None where queries, keys and values come packed."""

    query: int | None = 0
    key: int | None = 1
    value: int | None = 2
    masks: tuple[int, ...] = ()
    past: tuple[int, ...] = ()
    ids: int | None = None


_FUSED = {
    "GroupQueryAttention": _Operands(masks=(5, 6, 10), past=(3, 4), ids=9),
    "SparseAttention": _Operands(masks=(5, 6, 7, 8), past=(3, 4)),
    "PagedAttention": _Operands(masks=(5, 6, 7), past=(3, 4)),
    "MultiHeadAttention": _Operands(masks=(4, 5), past=(6, 7)),
    "PackedMultiHeadAttention": _Operands(masks=(6,)),
    "DecoderMaskedMultiHeadAttention": _Operands(masks=(3, 4), past=(5, 6)),
    "Attention": _Operands(None, None, None, masks=(3, 5), past=(4,)),
}
"""The attention operators of com.microsoft; masks are all operands that decide who sees whom, lengths included."""
_SCORE_OPS = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Cast",
    "Tanh",
    "Identity",
    "Reshape",
    "Concat",
    "Max",
    "Clip",
    "Slice",
)
_WEIGHT_OPS = ("Cast", "Where", "Dropout", "Identity", "Mul", "Div", "Slice", "Reshape", "IsNaN")
_PRODUCTS = {
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearMatMul": (0, 3),
}
"""Operators that multiply matrices -> operand numbers of the two."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention operation.

    Attributes:
        node: the attention node, or the Softmax of a decomposed attention.
        form: how it is written.
        query: rotated queries, where they are an operand.
        key: rotated keys, where they are an operand.
        value: values, where they are an operand.
        masks: operands that decide which key a query may see: masks, biases, lengths.
        cache_operands: past keys and values handed to the operator itself.
        ids: a position-ids operand of the operator itself.
    """

    node: ir.Node
    form: Form
    query: ir.Value | None
    key: ir.Value | None
    value: ir.Value | None
    masks: tuple[ir.Value, ...]
    cache_operands: tuple[ir.Value, ...] = ()
    ids: ir.Value | None = None

    @property
    def rotates_inside(self) -> bool:
        """Whether the operator itself applies rotary embeddings."""
        return integer(self.node, "do_rotary", 0) != 0


def find_attention(flow: Flow) -> list[AttentionSite]:
    """All attention operations, in graph order."""
    sites = []
    for node in flow.nodes:
        site = _operator(node) or (_decomposed(flow, node) if node.op_type == "Softmax" else None)
        if site is not None:
            sites.append(site)
    return sites


def _operator(node: ir.Node) -> AttentionSite | None:
    if is_op(node, "Attention"):
        return AttentionSite(
            node,
            "standard",
            operand(node, 0),
            operand(node, 1),
            operand(node, 2),
            _present(node, (3, 6)),
            _present(node, (4, 5)),
        )
    if node.domain == "com.microsoft" and node.op_type in _FUSED:
        places = _FUSED[node.op_type]
        return AttentionSite(
            node,
            "fused",
            _maybe(node, places.query),
            _maybe(node, places.key),
            _maybe(node, places.value),
            _present(node, places.masks),
            _present(node, places.past),
            _maybe(node, places.ids),
        )
    if node.domain not in STANDARD_DOMAINS and "attention" in node.op_type.lower():
        return AttentionSite(node, "plugin", operand(node, 0), operand(node, 1), operand(node, 2), ())
    return None


def _maybe(node: ir.Node, place: int | None) -> ir.Value | None:
    return None if place is None else operand(node, place)


def _present(node: ir.Node, places: Iterable[int]) -> tuple[ir.Value, ...]:
    return tuple(v for v in (operand(node, i) for i in places) if v is not None)


def _decomposed(flow: Flow, softmax: ir.Node) -> AttentionSite | None:
    """The attention around a Softmax, or None where it is not one (a router, a sampler)."""
    weighted = _weighted_sum(flow, softmax)
    scores = operand(softmax, 0)
    if weighted is None or scores is None:
        return None
    product: ir.Node | None = None
    masks: list[ir.Value] = []
    pending, seen = [scores], {scores}
    while pending:
        for value in flow.definitions(pending.pop()):
            node = value.producer()
            if node is None or not (_factors(node) or _keeps_scores(node)):
                continue
            if _factors(node):
                if product is None and _both_vary(flow, node):
                    product = node
                continue
            branches = [
                v for v in node.inputs if v is not None and not flow.is_constant(v) and not _is_scale(flow, v)
            ]
            ahead = [v for v in branches if _leads_to_product(flow, v)]
            masks += [v for v in branches if v not in ahead]
            pending += [v for v in ahead if v not in seen]
            seen.update(ahead)
    if product is None:
        return None
    query, key = _factors(product) or (None, None)
    return AttentionSite(softmax, "decomposed", query, key, weighted, tuple(masks))


def _factors(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two matrices that a node multiplies, in whole numbers or not; None where it does not."""
    places = _PRODUCTS.get(node.op_type)
    if places is None or (node.op_type == "Einsum" and len(node.inputs) != 2):
        return None
    first, second = (operand(node, place) for place in places)
    return None if first is None or second is None else (first, second)


def _keeps_scores(node: ir.Node) -> bool:
    return is_op(node, *_SCORE_OPS) or is_quantizing(node)


def _is_scale(flow: Flow, value: ir.Value) -> bool:
    """Whether it is what whole numbers were measured in, by `DynamicQuantizeLinear`; constants among it count."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        flow.work.take()
        node = current.producer()
        if node is not None and is_op(node, "DynamicQuantizeLinear"):
            if current is node.outputs[0]:
                return False
            continue
        if node is None or not is_op(node, "Mul"):
            return False
        parts = [v for v in node.inputs if v is not None and not flow.is_constant(v)]
        if not parts:
            return False
        pending += [v for v in parts if v not in seen]
        seen.update(parts)
    return True


def _leads_to_product(flow: Flow, value: ir.Value) -> bool:
    def step(node: ir.Node) -> Iterable[ir.Value | None]:
        return node.inputs if _keeps_scores(node) else ()

    for found in flow.upstream(value, step):
        node = found.producer()
        if node is not None and _both_vary(flow, node):
            return True
    return False


def _both_vary(flow: Flow, product: ir.Node) -> bool:
    factors = _factors(product)
    return factors is not None and not any(flow.is_constant(v) for v in factors)


def _weighted_sum(flow: Flow, softmax: ir.Node) -> ir.Value | None:
    """The values that the attention weights are multiplied with."""
    pending, seen = list(softmax.outputs[:1]), set(softmax.outputs)
    while pending:
        weights = pending.pop()
        for use in weights.uses():
            flow.work.take()
            factors = _factors(use.node)
            if factors is not None and use.idx == 0:
                return factors[1]
            if is_op(use.node, *_WEIGHT_OPS) or is_quantizing(use.node):
                fresh = [output for output in use.node.outputs[:1] if output not in seen]
                seen.update(fresh)
                pending += fresh
    return None


BARRIERS = frozenset(
    {
        "MatMul",
        "Gemm",
        "Conv",
        "Einsum",
        "MatMulInteger",
        "QLinearMatMul",
        "FusedMatMul",
        "FusedGemm",
        "MatMulNBits",
    }
    | {
        "MatMulBnb4",
        "FusedConv",
        "Softmax",
        "Attention",
        "GatherBlockQuantized",
        "Shape",
        "Size",
        "Range",
        "NonZero",
    }
    | set(_FUSED)
)
"""Operators that end the way up from a query or key: whatever lies behind them is not the same head vector any more."""


def carried(node: ir.Node) -> Iterable[ir.Value | None]:
    """Operands through which a query or a key comes: up to its projection, through caches, norms and reshapes."""
    if node.op_type in BARRIERS or "attention" in node.op_type.lower():
        return ()
    if is_quantizing(node):
        return node.inputs[:1]
    return [v for v in node.inputs if v is not None and is_float(v) is not False]


def cache_sources(flow: Flow, site: AttentionSite) -> list[str]:
    """What makes the keys of an attention come from a cache: operators that write one, or graph inputs joined in."""
    if site.cache_operands:
        return ["past_key operand"]
    if site.key is None:
        return []
    found: dict[str, None] = {}
    for value in flow.upstream(site.key, carried):
        node = value.producer()
        if is_op(node, "TensorScatter", "ScatterND", "ScatterElements") and node is not None:
            past = operand(node, 0)
            if past is not None and _is_fed(flow, past):
                found[node.op_type] = None
        elif (
            node is not None
            and is_op(node, "Concat")
            and any(v is not None and _is_fed(flow, v) for v in node.inputs)
        ):
            found["Concat with a graph input"] = None
    return list(found)


def _is_fed(flow: Flow, value: ir.Value) -> bool:
    """Whether a tensor is a graph input, if need be seen through a change of type, order or extent."""

    def step(node: ir.Node) -> Iterable[ir.Value | None]:
        movement = (
            "Cast",
            "Identity",
            "Transpose",
            "Reshape",
            "Slice",
            "Gather",
            "Squeeze",
            "Unsqueeze",
            "DequantizeLinear",
        )
        return node.inputs[:1] if is_op(node, *movement) else ()

    return any(v in flow.inputs for v in flow.upstream(value, step))
