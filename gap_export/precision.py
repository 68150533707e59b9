"""The table of precisions: what each does to weights and activations, where it runs, and what `validate` requires of it.

A row is all that the package knows of a precision, besides the schemes that its weights are quantised with
(`graph/quantize/`). Nothing heavy is imported here: rows name their element types and schemes, and modules that have torch,
NumPy or ONNX at hand look the names up there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from gap_export.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import ConfigDict

FloatType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Activations:
    """An element type of activations, of the cache, and of weights that are not quantised.

    Attributes:
        name: in file names and messages.
        dtype: what torch, NumPy (with ml_dtypes) and the specs of graphs call it.
        safetensors: what safetensors calls it.
        onnx: what ONNX calls it.
        bytes: of one element.
    """

    name: str
    dtype: FloatType
    safetensors: str
    onnx: str
    bytes: int


FP32 = Activations("fp32", "float32", "F32", "FLOAT", 4)
FP16 = Activations("fp16", "float16", "F16", "FLOAT16", 2)
BF16 = Activations("bf16", "bfloat16", "BF16", "BFLOAT16", 2)
ACTIVATIONS = (FP32, FP16, BF16)


@dataclass(frozen=True)
class Thresholds:
    """What a run must meet against the one that it is compared with: in `validate`, exported graphs against PyTorch in fp32.

    Attributes:
        min_kept_sets_equal: share of cases whose kept visual tokens are the reference's, ties of score excepted.
        max_logit_difference: largest absolute difference of logits, any step; None asks for nothing.
        max_relative_logit_difference: largest difference of logits, as a share of the largest magnitude in its row; None asks for nothing.
        min_logit_cosine: smallest cosine similarity of logit rows.
        max_norm_deviation: largest |1 - ratio of logit norms|.
        min_token_agreement: share of generated tokens that are equal.
        min_box_iou: mean IoU between the boxes of both backends.
        max_accuracy_drop: accuracy@0.5 of the reference less that of the graphs.
        min_prediction_agreement: share of expressions whose two boxes overlap by half, or that have none in either run; for
            `compare`, which sees no logits.
        max_perplexity_rise: of a text (`validate --text`), relative to PyTorch.
        max_mean_kl: of the distributions of a text's next tokens, in nats.
        min_top1_agreement: share of a text's tokens at which both find the same one most likely.

    Raises:
        ValueError: no finite number, a share above 1, a negative loss of accuracy, or another bound that is not above 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid", "allow_inf_nan": False}

    min_kept_sets_equal: float = 1.0
    max_logit_difference: float | None = 1e-3
    max_relative_logit_difference: float | None = None
    min_logit_cosine: float = 0.99999
    max_norm_deviation: float = 1e-3
    min_token_agreement: float = 0.99
    min_box_iou: float = 0.99
    max_accuracy_drop: float = 0.005
    min_prediction_agreement: float = 0.95
    max_perplexity_rise: float = 1e-3
    max_mean_kl: float = 1e-5
    min_top1_agreement: float = 0.99

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value} and must be a number")
            if field.name.startswith("min_") and not value <= 1:
                raise ValueError(f"{field.name} is {value} and must be at most 1")
            if field.name == "max_accuracy_drop":
                if not value >= 0:
                    raise ValueError(f"{field.name} is {value} and must not be negative")
            # Two runtimes never agree to the last bit: a bound of zero is a mistake.
            elif field.name.startswith("max_") and not value > 0:
                raise ValueError(f"{field.name} is {value} and must be above 0")


@dataclass(frozen=True)
class Precision:
    """One row of the table.

    A scheme is named by its module: one of `gap_export.graph.quantize`, or, with dots in its name, one from anywhere.

    Attributes:
        name: what `--precision` takes.
        summary: what happens to weights and activations, one line for people.
        activations: element type of activations, of the cache, and of weights that are not quantised.
        bytes_per_weight: of a linear layer, scales included; what a build expects to write.
        decoder: scheme of the decoder's linear layers; None leaves them in floats.
        wide: scheme of those that are wider than what they read, where it is another.
        head: scheme of what `decoder` leaves out: the head, and layers whose shape it does not fit.
        elsewhere: scheme of the linear layers of all other graphs, that is, of the vision tower.
        needs_ranges: whether scales of activations are measured beforehand (`gap-export calibrate`).
        takes_calibration: whether the rounding of the decoder's weights can be compensated (`build --calibration`): `decoder` is a `BlockScheme`.
        engines: whether TensorRT and TensorRT-RTX take its graphs.
        min_compute_capability: of GPUs that multiply such numbers; None where all do.
        cpu: whether ONNX Runtime has CPU kernels for its graphs.
        perplexity_rise: what it costs a decoder that was trained, relative to fp32: SmolLM2-135M-Instruct over 2,048 tokens of prose in one
            call (`bench/real_weights.py`); None where that was not measured.
        choice_margin: of pruners in which no single score decides: if the reference made any of its choices by less, one
            that comes out otherwise, and everything that follows from it, is a tie. What a tower rounds differently grows
            with the element type; in half precision long chains of choices nearly always hold one such, and accuracy is
            the gate that decides.
        gates: what `validate` requires where the recipe says nothing.
    """

    name: str
    summary: str
    activations: Activations
    bytes_per_weight: float
    decoder: str | None = None
    wide: str | None = None
    head: str | None = None
    elsewhere: str | None = None
    needs_ranges: bool = False
    takes_calibration: bool = False
    engines: bool = True
    min_compute_capability: float | None = None
    cpu: bool = True
    perplexity_rise: float | None = None
    choice_margin: float = 1e-5
    gates: Thresholds = Thresholds()

    @property
    def quantizes(self) -> bool:
        """Whether any weight has another element type than activations."""
        return any((self.decoder, self.head, self.elsewhere))

    @property
    def loss(self) -> str:
        """What it costs, in words."""
        if self.perplexity_rise is None:
            return "what it costs a decoder that was trained has not been measured"
        return f"perplexity {100 * self.perplexity_rise:+.1f} % in a decoder of 135M that was trained"


_HALF = Thresholds(
    min_kept_sets_equal=0.95,
    max_logit_difference=None,
    max_relative_logit_difference=0.05,
    min_logit_cosine=0.999,
    max_norm_deviation=0.02,
    min_token_agreement=0.95,
    min_box_iou=0.95,
    max_accuracy_drop=0.01,
    max_perplexity_rise=5e-3,
    max_mean_kl=1e-3,
    min_top1_agreement=0.98,
)
"""Leaves a margin for rounding. That is a part of what is rounded, so logits are held against the largest of their row: a hundred times 2^-11,
what one rounding in fp16 may be off by."""
_INT8 = Thresholds(
    min_kept_sets_equal=0.0,
    max_logit_difference=10.0,
    min_logit_cosine=0.9,
    max_norm_deviation=0.2,
    min_token_agreement=0.8,
    min_box_iou=0.9,
    max_accuracy_drop=0.02,
    max_perplexity_rise=0.03,
    max_mean_kl=0.02,
    min_top1_agreement=0.9,
)
"""A tower in whole numbers ranks its patches a little differently, so most sets differ by a few: boxes and accuracy decide."""
_INT4 = replace(
    _INT8,
    min_kept_sets_equal=0.99,
    max_logit_difference=20.0,
    min_logit_cosine=0.8,
    max_norm_deviation=1.0,
    max_perplexity_rise=0.4,
    max_mean_kl=0.4,
    min_top1_agreement=0.7,
)
"""The tower is not quantised here. Weights of four bits are off by a tenth, which single rows of logits show; boxes and accuracy decide."""
_FP8 = replace(_INT8, min_kept_sets_equal=_HALF.min_kept_sets_equal, max_norm_deviation=0.4)
"""The tower is in half precision."""
_NVFP4 = replace(
    _INT4,
    min_kept_sets_equal=_HALF.min_kept_sets_equal,
    min_logit_cosine=0.6,
    max_norm_deviation=1.5,
    min_token_agreement=0.7,
    min_box_iou=0.75,
)
"""Activations of four bits move logits and boxes more than weights do; whether they still hit is for accuracy to say."""

_ROWS = (
    Precision("fp32", "floats throughout", FP32, bytes_per_weight=4, perplexity_rise=0.0),
    Precision(
        "fp16",
        "floats throughout",
        FP16,
        bytes_per_weight=2,
        perplexity_rise=0.0,
        choice_margin=5e-3,
        gates=_HALF,
    ),
    Precision(
        "bf16", "floats throughout", BF16, bytes_per_weight=2, cpu=False, choice_margin=2e-2, gates=_HALF
    ),
    Precision(
        "int8",
        "linear layers of tower and decoder: 8 bits, one scale per column; their activations: 8 or twice 7 bits, one scale per token",
        FP32,
        bytes_per_weight=1.01,
        decoder="int8_fine",
        wide="int8",
        head="int8_fine",
        elsewhere="int8",
        engines=False,
        perplexity_rise=0.014,
        choice_margin=5e-2,
        gates=_INT8,
    ),
    Precision(
        "int8-blocks",
        "linear layers of tower and decoder: 8 bits, one scale per block of 32; their activations: 8 bits, one scale per block",
        FP32,
        bytes_per_weight=1.13,
        decoder="int8_blocks",
        head="int8_fine",
        elsewhere="int8_blocks",
        engines=False,
        perplexity_rise=0.009,
        choice_margin=5e-2,
        gates=_INT8,
    ),
    Precision(
        "int4",
        "linear layers of the decoder: 4 bits, one scale and zero point per block of 32; its head: 8 bits; their activations: 8 bits",
        FP32,
        bytes_per_weight=0.65,
        decoder="uint4",
        takes_calibration=True,
        head="int8_fine",
        engines=False,
        perplexity_rise=0.233,
        gates=_INT4,
    ),
    Precision(
        "int4-fp16",
        "linear layers of the decoder but for its head: 4 bits, one scale per block of 32",
        FP16,
        bytes_per_weight=0.57,
        decoder="int4",
        takes_calibration=True,
        choice_margin=5e-3,
        gates=replace(_INT4, min_kept_sets_equal=_HALF.min_kept_sets_equal),
    ),
    Precision(
        "fp8",
        "linear layers of the decoder but for its head: E4M3, one scale per column; their activations: E4M3, one scale",
        FP16,
        bytes_per_weight=1.01,
        decoder="fp8",
        needs_ranges=True,
        min_compute_capability=8.9,
        choice_margin=5e-3,
        gates=_FP8,
    ),
    Precision(
        "nvfp4",
        "linear layers of the decoder but for its head, and their activations: E2M1, one E4M3 scale per block of 16",
        FP16,
        bytes_per_weight=0.57,
        decoder="nvfp4",
        needs_ranges=True,
        min_compute_capability=10.0,
        cpu=False,
        choice_margin=5e-3,
        gates=_NVFP4,
    ),
)

PRECISIONS: dict[str, Precision] = {row.name: row for row in _ROWS}
"""Name -> row, in the order in which they are listed. `register` adds to it."""


def precision(name: str) -> Precision:
    """The row of that name.

    Raises:
        RecipeError: unknown name, with the nearest known one.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    near = difflib.get_close_matches(name, PRECISIONS, n=1)
    raise RecipeError(
        "is not a precision" + (f"; did you mean {near[0]!r}?" if near else ""),
        subject=repr(name),
        hint=f"choose one of {', '.join(PRECISIONS)}",
    )


def known(name: str) -> str:
    """The name itself: what pydantic's validators of stored fields call.

    Raises:
        ValueError: there is no such row.
    """
    try:
        return precision(name).name
    except RecipeError as error:
        raise ValueError(f"{error.message} ({error.hint})") from error


def register(row: Precision) -> None:
    """Add a precision to the table.

    Args:
        row: its schemes may be modules of any package.

    Raises:
        ValueError: there is one of that name.
    """
    if row.name in PRECISIONS:
        raise ValueError(f"a precision named {row.name!r} is in the table already")
    PRECISIONS[row.name] = row


def one_of(wanted: Callable[[Precision], bool] = lambda row: True) -> str:
    """Names of all rows, or of those that are wanted, as one writes them: `fp8 or nvfp4`."""
    *others, last = (row.name for row in PRECISIONS.values() if wanted(row))
    return f"{', '.join(others)} or {last}" if others else last


_HINTED = replace(
    _INT8,
    max_logit_difference=None,
    min_logit_cosine=0.99,
    max_norm_deviation=0.1,
    min_token_agreement=0.95,
    min_box_iou=0.97,
    max_accuracy_drop=0.01,
)
"""Of activations in half precision where a runtime chooses it (`--precision-hint`), on weights of any precision. The tower is computed in it
too, and sets of kept tokens differ by a few: boxes and accuracy decide."""
_HINT_MARGINS = {"bf16": 2e-2, "f16": 5e-3}
"""As of the rows whose activations are of that type."""


def hinted_margin(row: Precision, hint: str) -> float:
    """`choice_margin` of a precision whose activations a runtime computes in another type.

    Args:
        row: of the bundle.
        hint: `f32`, `bf16` or `f16`; empty where the bundle alone decides.
    """
    return max(row.choice_margin, _HINT_MARGINS.get(hint, 0.0))


def hinted_gates(gates: Thresholds, hint: str) -> Thresholds:
    """What `validate` requires then: of every bound, the looser one.

    Args:
        gates: of the bundle.
        hint: as of `hinted_margin`.
    """
    return _loosest(gates, _HINTED) if hint in _HINT_MARGINS else gates


def _loosest(one: Thresholds, other: Thresholds) -> Thresholds:
    def looser(name: str) -> float | None:
        values: list[float | None] = [getattr(one, name), getattr(other, name)]
        bounds = [value for value in values if value is not None]
        if len(bounds) < len(values):
            return None
        return min(bounds) if name.startswith("min_") else max(bounds)

    return Thresholds(**{field.name: looser(field.name) for field in fields(Thresholds)})  # type: ignore[arg-type]
