"""fp8: E4M3 by E4M3, one scale per column of the weight, one scale of activations that is measured beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import E4M3_MAX, never_zero
from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight

_E4M3 = ir.DataType.FLOAT8E4M3FN


def fits(columns: int, inner: int) -> bool:
    """Every shape."""
    return True


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Numbers in E4M3, and a scale per column."""
    return (
        Piece("fp8", _E4M3, (weight.inner, weight.columns)),
        Piece("scale", weight.float_type, (weight.columns,)),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """([N, K] float8_e4m3fn, [N] float32 scales), scales rounded to the type of activations first."""
    scales_N = never_zero((np.abs(rows_NK).max(axis=1) / E4M3_MAX).astype(weight.activations.dtype))
    scaled_NK = np.clip(rows_NK / scales_N[:, None], -E4M3_MAX, E4M3_MAX)
    return scaled_NK.astype(ml_dtypes.float8_e4m3fn), scales_N


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """MatMul of two tensors that were restored from E4M3, which engines take for one of E4M3."""
    numbers, scale = pieces
    (activations,) = rewriter.quantized(product, _quantize)
    floats = ir.node("DequantizeLinear", [numbers, scale], {"axis": 1})
    floats.outputs[0].shape, floats.outputs[0].type = numbers.shape, scale.type
    return [floats, ir.node("MatMul", [activations, floats.outputs[0]])]


def _quantize(activations: ir.Value, rewriter: Rewriter) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
    """Activations, rounded to E4M3."""
    step = rewriter.scale_of(activations, E4M3_MAX, rewriter.float_type)
    zero = rewriter.constant(ir.tensor(np.zeros((), _E4M3.numpy())), "fp8.zero")
    low = ir.node("QuantizeLinear", [activations, step, zero])
    restored = ir.node("DequantizeLinear", [low.outputs[0], step])
    low.outputs[0].shape, low.outputs[0].type = activations.shape, ir.TensorType(_E4M3)
    restored.outputs[0].shape, restored.outputs[0].type = activations.shape, activations.type
    return [low, restored], (restored.outputs[0],)
