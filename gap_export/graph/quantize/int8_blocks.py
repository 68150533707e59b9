"""int8_blocks: floats by whole numbers of eight bits, one scale per block of 32. Runtimes read eight bits and multiply in one go.

Shape letters: B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.int4 import BLOCK as BLOCK
from gap_export.graph.quantize.int4 import nodes as nodes
from gap_export.graph.quantize.int8 import INT8_MAX
from gap_export.graph.quantize.rounding import never_zero
from gap_export.graph.quantize.scheme import Piece, Weight


def fits(columns: int, inner: int) -> bool:
    """Whole blocks."""
    return inner % BLOCK == 0


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in -127..127, and a scale per block."""
    return (
        Piece("int8", ir.DataType.INT8, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.inner // BLOCK, weight.columns)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] int8, [N, K / 32] float32 scales)."""
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    scales_NB = never_zero((np.abs(blocks_NBL).max(axis=2) / INT8_MAX).astype(weight.activations.dtype))
    numbers_NBL = np.clip(np.rint(blocks_NBL / scales_NB[..., None]), -INT8_MAX, INT8_MAX)
    return numbers_NBL.astype(np.int8).reshape(columns, inner), scales_NB
