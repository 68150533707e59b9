"""uint4: floats by four-bit whole numbers, one scale and one zero point per block of 32.

    w = (q - zero) * scale        q, zero in 0..15

Blocks whose numbers lie to one side of zero use all sixteen steps, which those of `int4` do not. TensorRT takes no zero points.

Shape letters: B blocks of a row, L elements of a block.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.int4 import BLOCK as BLOCK
from gap_export.graph.quantize.int4 import fits as fits
from gap_export.graph.quantize.int4 import nodes as nodes
from gap_export.graph.quantize.rounding import SHRUNK, Grid, Importance, never_zero
from gap_export.graph.quantize.scheme import Piece, Weight

LEAST, MOST = 0, 15

_ENDS = (*SHRUNK, 0.75)
"""Parts of a block's least and of its most that the smallest and the largest number may stand for."""


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in 0..15, and a scale and a zero point per block."""
    blocks = (weight.inner // BLOCK, weight.columns)
    return (
        Piece("uint4", ir.DataType.UINT4, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, blocks),
        Piece("zero", ir.DataType.UINT4, blocks),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] uint8 in 0..15, [N, K / 32] float32 scales, [N, K / 32] uint8 zero points)."""
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    found = _between(*_ends(blocks_NBL), weight)
    return arranged(found.numbers(blocks_NBL).reshape(columns, inner), found)


def grid(blocks_BL: NDArray[np.float32], weight: Weight, importance: Importance = 1.0) -> Grid:
    """The grid that loses least of some blocks, [..., B, L] or [..., L]; `encode` is content with the one that reaches both ends."""
    least_B1, most_B1 = _ends(blocks_BL)
    best = _between(least_B1, most_B1, weight)
    lost_B1 = best.loss(blocks_BL, importance)
    for low, high in itertools.product(_ENDS, _ENDS):
        tried = _between(least_B1 * low, most_B1 * high, weight)
        loss_B1 = tried.loss(blocks_BL, importance)
        less_B1 = loss_B1 < lost_B1
        best = Grid(
            np.where(less_B1, tried.scales_B1, best.scales_B1),
            np.where(less_B1, tried.zeros_B1, best.zeros_B1),
            LEAST,
            MOST,
        )
        lost_B1 = np.minimum(loss_B1, lost_B1)
    return best


def arranged(numbers_NK: NDArray[np.float32], grid: Grid) -> tuple[NDArray[Any], ...]:
    """Numbers and the grid that they lie on, as `encode` gives them."""
    return numbers_NK.astype(np.uint8), grid.scales_B1[..., 0], grid.zeros_B1[..., 0].astype(np.uint8)


def _ends(blocks_BL: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the most of every block, zero among them."""
    return (
        np.minimum(blocks_BL.min(axis=-1, keepdims=True), 0),
        np.maximum(blocks_BL.max(axis=-1, keepdims=True), 0),
    )


def _between(least_B1: NDArray[np.float32], most_B1: NDArray[np.float32], weight: Weight) -> Grid:
    """The grid that reaches from one to the other."""
    scales_B1 = never_zero(((most_B1 - least_B1) / MOST).astype(weight.activations.dtype))
    return Grid(scales_B1, np.clip(np.rint(-least_B1 / scales_B1), LEAST, MOST), LEAST, MOST)
