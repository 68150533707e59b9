"""A precision from outside the package: weights are whole multiples of one step, in graphs that are in fp32 otherwise.

It is the example of `docs/extending.md`: one row of the table, and this module, whose four functions are its scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.scheme import Piece, Rewriter, Weight, activations_of
from gap_export.precision import FP32, Precision, Thresholds

ROW = Precision(
    "fp32-grid",
    "linear layers but for the head: one step per weight, 8 bits",
    FP32,
    bytes_per_weight=1,
    decoder=__name__,
    elsewhere=__name__,
    engines=False,
    choice_margin=5e-2,
    gates=Thresholds(max_logit_difference=10.0, min_logit_cosine=0.9),
)


def fits(columns: int, inner: int) -> bool:
    """Every shape."""
    return True


def pieces(weight: Weight) -> tuple[Piece, ...]:
    """Whole numbers, and the step."""
    return (
        Piece("grid", ir.DataType.INT8, (weight.inner, weight.columns)),
        Piece("step", weight.float_type, ()),
    )


def encode(rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
    """The largest magnitude becomes 127."""
    step = np.float32(weight.largest() / 127)
    return np.rint(rows_NK / step).astype(np.int8), np.asarray(step)


def nodes(product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
    """Restored, then multiplied as before."""
    numbers, step = pieces
    floats = ir.node("DequantizeLinear", [numbers, step])
    floats.outputs[0].shape, floats.outputs[0].type = numbers.shape, step.type
    return [floats, ir.node("MatMul", [activations_of(product), floats.outputs[0]])]
