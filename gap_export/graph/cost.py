"""What a graph costs: floating-point operations as a formula in its symbolic dimensions, and the bytes of its weights.

Counted are matrix products, convolutions and attention, a multiplication and an addition as two operations; what is left is
well below a hundredth of a transformer. Attention counts every slot of the cache that it reads, filled or not. Bodies of loops (some
pruners choose token after token) are not counted.
"""

from __future__ import annotations

import math
from collections import Counter

import onnx_ir as ir

from gap_export.bundle.manifest import FlopTerm

Monomial = tuple[str, ...]


def flops_of(model: ir.Model) -> tuple[FlopTerm, ...]:
    """The formula, largest coefficient first.

    Products whose shape is not known at all are left out; `tests/graph/test_cost.py` holds that this concerns no transformer layer.
    """
    terms: Counter[Monomial] = Counter()
    for node in model.graph:
        count = _COUNTS.get(node.op_type)
        extents = None if count is None else count(node)
        if extents is None:
            continue
        factor = math.prod(extent for extent in extents if isinstance(extent, int))
        terms[tuple(sorted(extent for extent in extents if isinstance(extent, str)))] += factor
    return tuple(FlopTerm(factor=factor, dims=dims) for dims, factor in terms.most_common())


def weight_bytes_of(model: ir.Model) -> int:
    """Bytes of the weights that a run reads, each once."""
    weights = {
        value.name: value.const_value for value in model.graph.initializers.values() if value.const_value
    }
    return sum(tensor.nbytes for tensor in weights.values())


def _matmul(node: ir.Node) -> list[int | str] | None:
    """2 * (everything of the left operand) * (columns of the right one)."""
    left, right = (_extents(value) for value in node.inputs[:2])
    if left is None or right is None:
        return None
    return [2, *left, right[-1]]


def _gemm(node: ir.Node) -> list[int | str] | None:
    left, right = (_extents(value) for value in node.inputs[:2])
    if left is None or right is None:
        return None
    return [2, *left, right[0] if node.attributes.get_int("transB", 0) else right[-1]]


def _conv(node: ir.Node) -> list[int | str] | None:
    """2 * (everything that comes out) * (what goes into one number of it)."""
    out, kernel = _extents(node.outputs[0]), _extents(node.inputs[1])
    return None if out is None or kernel is None else [2, *out, *kernel[1:]]


def _attention(node: ir.Node) -> list[int | str] | None:
    """Two products, of every query with every slot: 4 * B * heads * S * C * width."""
    query, key = (_extents(value) for value in node.inputs[:2])
    if query is None or key is None or len(query) != 4 or len(key) != 4:
        return None
    return [4, *query, key[2]]


_COUNTS = {"MatMul": _matmul, "MatMulInteger": _matmul, "Gemm": _gemm, "Conv": _conv, "Attention": _attention}


def _extents(value: ir.Value | None) -> list[int | str] | None:
    """Shape of a value; of a transposed or converted weight, that of what it is made of."""
    if value is None:
        return None
    if value.shape is not None:
        extents = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        return None if None in extents else extents  # type: ignore[return-value]
    if value.const_value is not None:
        return list(value.const_value.shape.numpy())
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Cast", "Identity"):
        return None
    inner = _extents(node.inputs[0])
    if inner is None or node.op_type != "Transpose":
        return inner
    order = node.attributes.get_ints("perm")
    return inner[::-1] if order is None else [inner[place] for place in order]
