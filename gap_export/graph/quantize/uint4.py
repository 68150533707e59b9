"""uint4: floats by four-bit whole numbers, one scale and one zero point per block of 32.

    w = (q - zero) * scale        q, zero in 0..15

Blocks whose numbers lie to one side of zero use all sixteen steps, which those of `int4` do not. TensorRT takes no zero points.

Shape letters: B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.int4 import BLOCK
from gap_export.graph.quantize.int4 import fits as fits
from gap_export.graph.quantize.rounding import never_zero
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight, activations_of

MOST = 15


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
    least_NB, most_NB = (np.minimum(blocks_NBL.min(axis=2), 0), np.maximum(blocks_NBL.max(axis=2), 0))
    scales_NB = never_zero(((most_NB - least_NB) / MOST).astype(weight.activations.dtype))
    zeros_NB = np.clip(np.rint(-least_NB / scales_NB), 0, MOST)
    numbers_NBL = np.clip(np.rint(blocks_NBL / scales_NB[..., None]) + zeros_NB[..., None], 0, MOST)
    return numbers_NBL.astype(np.uint8).reshape(columns, inner), scales_NB, zeros_NB.astype(np.uint8)


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """DequantizeLinear, MatMul."""
    numbers, scale, zero = pieces
    floats = ir.node("DequantizeLinear", [numbers, scale, zero], {"axis": 0, "block_size": BLOCK})
    floats.outputs[0].shape, floats.outputs[0].type = numbers.shape, scale.type
    return [floats, ir.node("MatMul", [activations_of(product), floats.outputs[0]])]
