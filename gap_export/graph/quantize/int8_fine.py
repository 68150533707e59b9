"""int8_fine: as int8, with the activations of a token in two pieces of seven bits: one rounds the numbers, the other what that left.

    x = range * (q + p / 126) / 63        q, p in -63..63, stored as 1..127; range: the largest magnitude of the token
    x W = range * scale * (q W + p W / 126) / 63

Few activations of great size make one piece too coarse for all others of the token; two are as good as fourteen bits. Either has seven
bits because processors without VNNI add two products in sixteen, and cut off without a word what is too large: 2 * 127 * 127 is not. The
product is made twice, so this is for products that are no wider than what they read, and for those of one row, which wait for their weight.

Shape letters: as in `int8.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.int8 import INT8_MAX, SMALLEST, multiplied, rounded, whole, zero_point
from gap_export.graph.quantize.int8 import fits as fits
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight

PIECE_MAX = 63
ZERO = 64
"""Stands for zero."""
FINER = 2 * PIECE_MAX
"""What is left of a number is at most half a step: that becomes the largest number of the second piece."""


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in -127..127, and a scale per column."""
    return (
        Piece("int8", ir.DataType.INT8, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.columns,)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] int8, [N] float32 scales)."""
    return rounded(rows_NK, INT8_MAX)


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """MatMulInteger of either piece, their sum, and both scales."""
    numbers, scale = pieces
    quantized, rest, step = rewriter.quantized(product, _quantize)
    coarse = multiplied(product, quantized, numbers, rewriter, zero=ZERO)
    fine = multiplied(product, rest, numbers, rewriter, zero=ZERO)
    part = ir.node("Mul", [fine[1].outputs[0], rewriter.number(1 / FINER, "int8.finer")])
    both = ir.node("Add", [coarse[1].outputs[0], part.outputs[0]])
    scaled = ir.node("Mul", [both.outputs[0], scale])
    return [*coarse, *fine, part, both, scaled, ir.node("Mul", [scaled.outputs[0], step])]


def _quantize(activations: ir.Value, rewriter: Rewriter) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
    """(first piece, second piece, the range of every token divided by 63)."""
    last = rewriter.constant(ir.tensor(np.array([-1])), "int8.last_axis")
    sizes = ir.node("Abs", [activations])
    most = ir.node("ReduceMax", [sizes.outputs[0], last])
    extent = ir.node("Max", [most.outputs[0], rewriter.number(SMALLEST, "int8.smallest")])
    step = ir.node("Mul", [extent.outputs[0], rewriter.number(1 / PIECE_MAX, "int8.largest")])
    scaled = ir.node("Div", [activations, step.outputs[0]])
    low = whole(scaled.outputs[0], activations, rewriter, zero=ZERO)
    one = rewriter.number(1.0, "int8.one")
    restored = ir.node("DequantizeLinear", [low.outputs[0], one, zero_point(rewriter, ZERO)])
    left = ir.node("Sub", [scaled.outputs[0], restored.outputs[0]])
    wide = ir.node("Mul", [left.outputs[0], rewriter.number(FINER, "int8.rest")])
    rest = whole(wide.outputs[0], activations, rewriter, zero=ZERO)
    found = [sizes, most, extent, step, scaled, low, restored, left, wide, rest]
    return found, (low.outputs[0], rest.outputs[0], step.outputs[0])
