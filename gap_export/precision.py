"""Element types and number formats that a build may choose."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gap_export.records import Record

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "int4-fp16", "fp8", "nvfp4"]


Activations = Literal["fp32", "fp16", "bf16"]


ACTIVATIONS: dict[Precision, Activations] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "fp32",
    "int4": "fp32",
    "int4-fp16": "fp16",
    "fp8": "fp16",
    "nvfp4": "fp16",
}
"""Precision -> that of activations, of the cache, and of weights that are not quantised."""


class Gates(Record):
    """What `validate` demands of the exported graphs against the PyTorch reference."""

    min_kept_sets_equal: float = Field(default=1.0, le=1)
    """Share of cases whose kept visual tokens are the reference's, ties of score excepted."""
    max_logit_difference: float = Field(default=1e-3, gt=0)
    """Largest absolute difference of logits, any step."""
    min_logit_cosine: float = Field(default=0.99999, le=1)
    max_norm_deviation: float = Field(default=1e-3, gt=0)
    """Largest |1 - ratio of logit norms|."""
    min_token_agreement: float = Field(default=0.99, le=1)
    min_box_iou: float = Field(default=0.99, le=1)
    """Mean IoU between the boxes of both backends."""
    max_accuracy_drop: float = Field(default=0.005, ge=0)


_HALF = Gates(
    min_kept_sets_equal=0.95,
    max_logit_difference=0.25,
    min_logit_cosine=0.999,
    max_norm_deviation=0.02,
    min_token_agreement=0.95,
    min_box_iou=0.95,
    max_accuracy_drop=0.01,
)
_INT8 = Gates(
    min_kept_sets_equal=0.0,
    max_logit_difference=10.0,
    min_logit_cosine=0.9,
    max_norm_deviation=0.2,
    min_token_agreement=0.8,
    min_box_iou=0.9,
    max_accuracy_drop=0.02,
)
"""A tower in whole numbers ranks its patches a little differently, so most sets differ by a few: boxes and accuracy decide."""
_INT4 = _INT8.model_copy(
    update={
        "min_kept_sets_equal": 0.99,
        "max_logit_difference": 20.0,
        "min_logit_cosine": 0.8,
        "max_norm_deviation": 1.0,
    }
)
"""The tower is not quantised here. Weights of four bits are off by a tenth, which single rows of logits show; boxes and accuracy decide."""
_FP8 = _INT8.model_copy(update={"min_kept_sets_equal": _HALF.min_kept_sets_equal, "max_norm_deviation": 0.4})
"""The tower is in half precision."""
_NVFP4 = _INT4.model_copy(
    update={
        "min_kept_sets_equal": _HALF.min_kept_sets_equal,
        "min_logit_cosine": 0.6,
        "max_norm_deviation": 1.5,
        "min_token_agreement": 0.7,
        "min_box_iou": 0.75,
    }
)
"""Activations of four bits move logits and boxes more than weights do; whether they still hit is for accuracy to say."""
DEFAULT_GATES: dict[Precision, Gates] = {
    "fp32": Gates(),
    "fp16": _HALF,
    "bf16": _HALF,
    "int8": _INT8,
    "int4": _INT4,
    "int4-fp16": _INT4.model_copy(update={"min_kept_sets_equal": _HALF.min_kept_sets_equal}),
    "fp8": _FP8,
    "nvfp4": _NVFP4,
}
"""Half precision is held against the reference in fp32, so its gates leave room for rounding."""

USUAL_DEVICES = ("8.6", "8.9", "12.0")
"""Compute capabilities of GPUs that TensorRT-RTX is for."""
SMALLEST_DEVICE: dict[Precision, float] = {"fp8": 8.9, "nvfp4": 10.0}
"""Compute capability from which on a GPU multiplies such numbers."""
FIXED_SCALES: tuple[Precision, ...] = ("fp8", "nvfp4")
"""Precisions that need to know beforehand how large activations get."""
