"""nvfp4: E2M1 by E2M1, one E4M3 scale per block of 16, and one global scale for those. For TensorRT alone.

Shape letters: B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import E4M3_MAX, SHRUNK, losing_least
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight

BLOCK = 16
"""Elements that share a scale: what tensor cores take."""
E2M1_MAX = 6.0
ENGINE_DOMAIN = "trt"
"""Operators that only TensorRT knows."""

_SMALLEST_E4M3 = np.float32(2**-9)
_STRETCHED = (1.5, *SHRUNK)
"""Largest numbers of E2M1 lie far apart: the extreme of a block may also become 4 instead of 6."""
_E2M1, _E4M3 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN


def fits(columns: int, inner: int) -> bool:
    """Whole blocks, and pairs of columns."""
    return columns % 2 == 0 and inner % BLOCK == 0


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in E2M1, a scale per block, and the scale of those."""
    return (
        Piece("fp4", _E2M1, (weight.inner, weight.columns)),
        Piece("scale", _E4M3, (weight.inner // BLOCK, weight.columns)),
        Piece("global_scale", ir.DataType.FLOAT, ()),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] float4_e2m1fn, [N, K / 16] float8_e4m3fn scales, [] float32); a weight is the product of the three."""
    columns, inner = rows_NK.shape
    overall = global_scale(weight.largest())
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    extreme_NB1 = np.abs(blocks_NBL).max(axis=2, keepdims=True)
    tried = []
    for part in _STRETCHED:
        stored_NB1 = _e4m3(extreme_NB1 * np.float32(part / E2M1_MAX / overall))
        step_NB1 = np.maximum(stored_NB1, _SMALLEST_E4M3) * np.float32(overall)
        scaled_NBL = np.clip(blocks_NBL / step_NB1, -E2M1_MAX, E2M1_MAX)
        tried.append((scaled_NBL.astype(ml_dtypes.float4_e2m1fn).astype(np.float32), step_NB1))
    numbers_NBL, steps_NB1 = losing_least(blocks_NBL, tried)
    return (
        numbers_NBL.astype(ml_dtypes.float4_e2m1fn).reshape(columns, inner),
        _e4m3(steps_NB1[..., 0] / np.float32(overall)).astype(ml_dtypes.float8_e4m3fn),
        np.asarray(overall, np.float32),
    )


def global_scale(largest: float) -> float:
    """The scale of a tensor whose largest magnitude is `largest`: its largest block scale is then the largest of E4M3.

    One where that has no inverse in float32: what is so small becomes zero.
    """
    scale = np.float32(largest / (E2M1_MAX * E4M3_MAX))
    return float(scale) if scale >= np.finfo(np.float32).tiny else 1.0


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """MatMul of two tensors that were restored from E2M1, which engines take for one of E2M1."""
    numbers, scale, overall = pieces
    (activations,) = rewriter.quantized(product, _quantize)
    scales = ir.node("DequantizeLinear", [scale, overall])
    restored = ir.node("DequantizeLinear", [numbers, scales.outputs[0]], {"axis": 0, "block_size": BLOCK})
    half = ir.node("Cast", [restored.outputs[0]], {"to": rewriter.float_type})
    half.outputs[0].shape, half.outputs[0].type = numbers.shape, activations.type
    return [scales, restored, half, ir.node("MatMul", [activations, half.outputs[0]])]


def _quantize(activations: ir.Value, rewriter: Rewriter) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
    """Activations, rounded to E2M1: the global scale is measured beforehand, those of blocks are found while running."""
    rewriter.graph.opset_imports[ENGINE_DOMAIN] = 1
    step = rewriter.scale_of(activations, E2M1_MAX * E4M3_MAX, ir.DataType.FLOAT)
    low = ir.Node(
        ENGINE_DOMAIN,
        "TRT_FP4DynamicQuantize",
        [activations, step],
        [
            ir.AttrInt64("axis", -1),
            ir.AttrInt64("block_size", BLOCK),
            ir.AttrInt64("scale_type", _E4M3.value),
        ],
        num_outputs=2,
    )
    for value, kind in zip(low.outputs, (_E2M1, _E4M3), strict=True):
        value.type = ir.TensorType(kind)
    low.outputs[0].shape = activations.shape
    scales = ir.node("DequantizeLinear", [low.outputs[1], step])
    restored = ir.node(
        "DequantizeLinear", [low.outputs[0], scales.outputs[0]], {"axis": -1, "block_size": BLOCK}
    )
    half = ir.node("Cast", [restored.outputs[0]], {"to": rewriter.float_type})
    half.outputs[0].shape, half.outputs[0].type = activations.shape, activations.type
    return [low, scales, restored, half], (half.outputs[0],)


def _e4m3(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to what E4M3 can hold."""
    clipped = np.minimum(values, np.float32(E4M3_MAX))
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
