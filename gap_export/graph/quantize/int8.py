"""int8: whole numbers by whole numbers, one scale per column; seven bits of the eight.

For activations in fp32: `DynamicQuantizeLinear` takes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import never_zero
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight

INT8_MAX = 63
"""Processors without VNNI add two products of eight bits in sixteen, and what is too large is cut off without a word: 2 * 255 * 127
is, 2 * 255 * 63 is not."""


def fits(columns: int, inner: int) -> bool:
    """Every shape."""
    return True


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in -63..63, and a scale per column."""
    return (
        Piece("int8", ir.DataType.INT8, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.columns,)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] int8, [N] float32 scales); their product is nearest to the rows."""
    scales_N = never_zero(np.abs(rows_NK).max(axis=1) / INT8_MAX)
    return np.clip(np.rint(rows_NK / scales_N[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8), scales_N


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """MatMulInteger, and both scales."""
    numbers, scale = pieces
    quantized, step, zero = rewriter.quantized(product, _quantize)
    integers = ir.node("MatMulInteger", [quantized, numbers, zero])
    integers.outputs[0].shape = product.outputs[0].shape
    integers.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    floats = ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [step, scale])
    return [integers, floats, both, ir.node("Mul", [floats.outputs[0], both.outputs[0]])]


def _quantize(activations: ir.Value, rewriter: Rewriter) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
    """Numbers, their scale and their zero, by the range of each call."""
    node = ir.node("DynamicQuantizeLinear", [activations], num_outputs=3)
    node.outputs[0].shape, node.outputs[0].type = activations.shape, ir.TensorType(ir.DataType.UINT8)
    return [node], tuple(node.outputs)
