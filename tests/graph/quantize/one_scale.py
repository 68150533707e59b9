"""What whole numbers must not be: one scale for all activations of a call, so that a row is rounded by what its neighbours are.

For negative controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.int8_fine import encode as _encode
from gap_export.graph.quantize.int8_fine import fits as fits
from gap_export.graph.quantize.int8_fine import pieces as pieces
from gap_export.graph.quantize.scheme import Rewriter, Weight, activations_of
from gap_export.precision import FP32, Precision

ROW = Precision(
    "int8-one-scale",
    "linear layers: 8 bits, one scale per column; their activations: 8 bits, one scale per call",
    FP32,
    bytes_per_weight=1.01,
    decoder=__name__,
    head=__name__,
    elsewhere=__name__,
    engines=False,
)


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """Weights are those of a scheme that is right."""
    return _encode(rows_NK, weight)


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """DynamicQuantizeLinear, MatMulInteger, both scales."""
    numbers, scale = pieces
    low = ir.node("DynamicQuantizeLinear", [activations_of(product)], num_outputs=3)
    integers = ir.node("MatMulInteger", [low.outputs[0], numbers, low.outputs[2]])
    integers.outputs[0].shape = product.outputs[0].shape
    integers.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    floats = ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT})
    steps = ir.node("Mul", [low.outputs[1], scale])
    return [low, integers, floats, steps, ir.node("Mul", [floats.outputs[0], steps.outputs[0]])]
