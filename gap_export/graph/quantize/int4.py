"""int4: floats by four-bit whole numbers, one scale per block of 32; the block's extreme is -8 (as llama.cpp's Q4_0), or a little
beyond it.

Shape letters: B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import SHRUNK, Grid, Importance, losing_least, never_zero
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight, activations_of

BLOCK = 32
"""Elements that share a scale."""
LEAST, MOST = -8, 7


def fits(columns: int, inner: int) -> bool:
    """Whole blocks, and pairs of columns."""
    return columns % 2 == 0 and inner % BLOCK == 0


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in -8..7, and a scale per block."""
    return (
        Piece("int4", ir.DataType.INT4, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.inner // BLOCK, weight.columns)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] int8 in -8..7, [N, K / 32] float32 scales, which have the sign that makes a block's extreme -8)."""
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    found = grid(blocks_NBL, weight)
    return arranged(found.numbers(blocks_NBL).reshape(columns, inner), found)


def grid(blocks_BL: NDArray[np.float32], weight: Weight, importance: Importance = 1.0) -> Grid:
    """The grid that loses least of some blocks, [..., B, L] or [..., L].

    Scales are rounded to the type of activations first: weights are rounded to what they will be multiplied with.
    """
    place_B1 = np.abs(blocks_BL).argmax(axis=-1)[..., None]
    extreme_B1 = np.take_along_axis(blocks_BL, place_B1, axis=-1)
    tried = []
    for shrunk in SHRUNK:
        step_B1 = never_zero((extreme_B1 * (shrunk / LEAST)).astype(weight.activations.dtype))
        tried.append((np.clip(np.rint(blocks_BL / step_B1), LEAST, MOST), step_B1))
    _, scales_B1 = losing_least(blocks_BL, tried, importance)
    return Grid(scales_B1, np.zeros_like(scales_B1), LEAST, MOST)


def arranged(numbers_NK: NDArray[np.float32], grid: Grid) -> tuple[NDArray[Any], ...]:
    """Numbers and the grid that they lie on, as `encode` gives them."""
    return numbers_NK.astype(np.int8), grid.scales_B1[..., 0]


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """DequantizeLinear, MatMul; pieces are numbers, scales and, where there are any, zero points."""
    numbers, scale = pieces[:2]
    floats = ir.node("DequantizeLinear", [*pieces], {"axis": 0, "block_size": BLOCK})
    floats.outputs[0].shape, floats.outputs[0].type = numbers.shape, scale.type
    return [floats, ir.node("MatMul", [activations_of(product), floats.outputs[0]])]
