"""int8: whole numbers by whole numbers; one scale per column of the weight, one scale and one midpoint per token of the activations.

    x = middle + range * q / 255        q in -128..127, stored as 0..255
    x W = range * scale * (q W) / 255 + middle * sums        sums: of the columns of W

A token's numbers depend on that token alone, so a row of a batch never depends on another. For activations in fp32.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import never_zero
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight

INT8_MAX = 127
WEIGHT_MAX = 63
"""Processors without VNNI add two products of eight bits in sixteen, and what is too large is cut off without a word: 2 * 255 * 127
is, 2 * 255 * 63 is not. What has eight bits of activations has seven of weights, and the other way about (`int8_fine`)."""
STEPS = 255
"""Between the smallest and the largest activation of a token."""
ZERO = 128
"""Stands for the middle, or for zero."""
SMALLEST = 1e-30
"""In the place of a range that is zero: nothing is divided by that."""


def fits(columns: int, inner: int) -> bool:
    """Every shape."""
    return True


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in -63..63, a scale per column, and the sum of every column."""
    return (
        Piece("int8", ir.DataType.INT8, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.columns,)),
        Piece("sum", weight.float_type, (weight.columns,)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] int8, [N] float32 scales, [N] float32 sums of what these two stand for)."""
    numbers_NK, scales_N = rounded(rows_NK, WEIGHT_MAX)
    return numbers_NK, scales_N, numbers_NK.sum(axis=1, dtype=np.int64).astype(np.float32) * scales_N


def rounded(rows_NK: NDArray[np.float32], most: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([N, K] int8, [N] float32 scales); their product is nearest to the rows, with numbers up to `most`."""
    scales_N = never_zero(np.abs(rows_NK).max(axis=1) / most)
    return np.clip(np.rint(rows_NK / scales_N[:, None]), -most, most).astype(np.int8), scales_N


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """MatMulInteger, both scales, and what the middle adds."""
    numbers, scale, total = pieces
    quantized, extent, middle = rewriter.quantized(product, _quantize)
    integers, floats = multiplied(product, quantized, numbers, rewriter)
    step = ir.node("Mul", [floats.outputs[0], scale])
    spread = ir.node("Mul", [step.outputs[0], extent])
    shift = ir.node("Mul", [middle, total])
    return [integers, floats, step, spread, shift, ir.node("Add", [spread.outputs[0], shift.outputs[0]])]


def multiplied(
    product: ir.Node, quantized: ir.Value, numbers: ir.Value, rewriter: Rewriter, *, zero: int = ZERO
) -> tuple[ir.Node, ir.Node]:
    """(MatMulInteger of activations 0..255 and a weight, Cast to float)."""
    integers = ir.node("MatMulInteger", [quantized, numbers, zero_point(rewriter, zero)])
    integers.outputs[0].shape = product.outputs[0].shape
    integers.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    return integers, ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT})


def _quantize(activations: ir.Value, rewriter: Rewriter) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
    """(numbers, the range of every token divided by 255, its middle)."""
    last = rewriter.constant(ir.tensor(np.array([-1])), "int8.last_axis")
    most = ir.node("ReduceMax", [activations, last])
    least = ir.node("ReduceMin", [activations, last])
    span = ir.node("Sub", [most.outputs[0], least.outputs[0]])
    extent = ir.node("Max", [span.outputs[0], rewriter.number(SMALLEST, "int8.smallest")])
    ends = ir.node("Add", [most.outputs[0], least.outputs[0]])
    middle = ir.node("Mul", [ends.outputs[0], rewriter.number(0.5, "int8.half")])
    centred = ir.node("Sub", [activations, middle.outputs[0]])
    step = ir.node("Mul", [extent.outputs[0], rewriter.number(1 / STEPS, "int8.step")])
    scaled = ir.node("Div", [centred.outputs[0], step.outputs[0]])
    low = whole(scaled.outputs[0], activations, rewriter)
    found = [most, least, span, extent, ends, middle, centred, step, scaled, low]
    return found, (low.outputs[0], step.outputs[0], middle.outputs[0])


def zero_point(rewriter: Rewriter, zero: int) -> ir.Value:
    """What stands for zero among the activations 0..255."""
    return rewriter.constant(ir.tensor(np.array(zero, np.uint8)), f"int8.zero.{zero}")


def whole(scaled: ir.Value, activations: ir.Value, rewriter: Rewriter, *, zero: int = ZERO) -> ir.Node:
    """QuantizeLinear of what was scaled to whole numbers."""
    one = rewriter.number(1.0, "int8.one")
    low = ir.node("QuantizeLinear", [scaled, one, zero_point(rewriter, zero)])
    low.outputs[0].shape, low.outputs[0].type = activations.shape, ir.TensorType(ir.DataType.UINT8)
    return low
