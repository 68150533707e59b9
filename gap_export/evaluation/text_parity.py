"""Parity on a text: does a bundle's decoder predict the next word as PyTorch does, whatever it was rounded to?

What is compared is the distribution of every next token.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from gap_export.bundle.folder import Bundle
from gap_export.errors import GateError
from gap_export.evaluation.bundle_reports import TEXT_PARITY, read_report
from gap_export.evaluation.gates import Gate, Measured, at_least, at_most, check_gates
from gap_export.positions import Ids
from gap_export.precision import Thresholds, precision
from gap_export.records import Count, Flag, Record, Share

CONTROL = "ids halved"
"""The placement that is wrong on purpose. Ids that are all moved by as much would change nothing: rotations know differences alone."""
_ROWS_AT_ONCE = 64
"""Distributions in float64 that are held at a time."""


class TextMeasurement(Record):
    """How the distributions of next tokens differ from PyTorch's.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the mean negative log-likelihood of the tokens that did come.
        reference_perplexity: of PyTorch.
        mean_kl: mean over tokens of the Kullback-Leibler divergence from PyTorch's distribution, in nats.
        top1_agreement: share of tokens at which both find the same one most likely.
    """

    tokens: Count
    perplexity: Measured
    reference_perplexity: Measured
    mean_kl: Measured
    top1_agreement: Share

    @property
    def perplexity_rise(self) -> float:
        """Relative to PyTorch: 0.02 is 2 %. NaN where PyTorch's is no finite number: nothing can be held against that."""
        if not 0 < self.reference_perplexity < math.inf:
            return math.nan
        return self.perplexity / self.reference_perplexity - 1


class TextReport(Record):
    """What `validate --text` leaves among the reports of the bundle.

    Attributes:
        ok: every gate was met, and wrong position ids were noticed.
        manifest_sha256: of the build that was measured.
        bundle: name of its recipe.
        backend: runtime that it was put through.
        precision: of weights and activations.
        source: name of the file that was read.
        source_sha256: of its content.
        prefill: the tokens that were read in one call; None where the decoder drops tokens, which takes an image.
        steps: those that were read one by one after them.
        gates: both, checked.
        control_caught: whether a run with halved position ids missed a gate.
        versions: package -> version.
    """

    ok: Flag
    manifest_sha256: str
    bundle: str
    backend: str
    precision: str
    source: str
    source_sha256: str
    prefill: TextMeasurement | None
    steps: TextMeasurement
    gates: list[Gate]
    control_caught: Flag
    versions: dict[str, str]

    @model_validator(mode="after")
    def _ok_as_measured(self) -> Self:
        if self.ok != (self.control_caught and all(gate.passed for gate in self.gates)):
            raise ValueError(f"ok is {self.ok}, which its gates contradict")
        return self

    def raise_for_gates(self) -> None:
        """Go on only where every gate was met and the negative control was caught.

        Raises:
            GateError: one was not.
        """
        check_gates(self.gates, subject=f"{self.bundle} in {self.backend}")
        if not self.control_caught:
            raise GateError(
                f"went unnoticed: {CONTROL}",
                subject=f"negative control of {self.bundle} in {self.backend}",
                hint="the thresholds are too loose for this text: give another, or stricter gates in the recipe",
            )


def loss_of(bundle: Bundle) -> str:
    """What the precision of a bundle costs, in words: as measured on this build, if it was; else what it costs a decoder of 135M.

    Args:
        bundle: opened.
    """
    report = read_report(bundle, TEXT_PARITY, TextReport, command="validate --text")
    if report is None:
        return precision(bundle.manifest.precision).loss
    rises = [part.perplexity_rise for part in (report.prefill, report.steps) if part is not None]
    shown = " in one call, ".join(f"{100 * rise:+.1f} %" for rise in rises)
    return f"perplexity of {report.source} {shown} token by token"


def measure(
    logits_TV: NDArray[np.float32], reference_TV: NDArray[np.float32], next_ids_T: Ids
) -> TextMeasurement:
    """Compare two readings of the same tokens.

    Args:
        logits_TV: of the run.
        reference_TV: of PyTorch.
        next_ids_T: what did come after each token; one fewer where the text ends.

    Returns:
        Figures that no gate lets pass, where a logit of either side is no number.
    """
    with np.errstate(all="ignore"):
        return _measure(logits_TV, reference_TV, next_ids_T)


def judge(part: str, measured: TextMeasurement, thresholds: Thresholds) -> list[Gate]:
    """Hold the measurement of one part of the text against its thresholds."""
    return [
        at_most(f"{part}: perplexity_rise", measured.perplexity_rise, thresholds.max_perplexity_rise),
        at_most(f"{part}: mean_kl", measured.mean_kl, thresholds.max_mean_kl),
        at_least(f"{part}: top1_agreement", measured.top1_agreement, thresholds.min_top1_agreement),
    ]


def _measure(
    logits_TV: NDArray[np.float32], reference_TV: NDArray[np.float32], next_ids_T: Ids
) -> TextMeasurement:
    sums = np.zeros(4)
    for first in range(0, len(next_ids_T), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        next_T = next_ids_T[rows]
        mine_TV, theirs_TV = (_log_softmax(side[rows][: len(next_T)]) for side in (logits_TV, reference_TV))
        came = np.arange(len(next_T)), next_T
        divergence = (np.exp(theirs_TV) * (theirs_TV - mine_TV)).sum()
        agreed = (mine_TV.argmax(axis=1) == theirs_TV.argmax(axis=1)).sum()
        sums += -mine_TV[came].sum(), -theirs_TV[came].sum(), divergence, agreed
    mine, theirs, divergence, agreed = (float(each) / len(next_ids_T) for each in sums)
    return TextMeasurement(
        tokens=len(next_ids_T),
        perplexity=float(np.exp(mine)),
        reference_perplexity=float(np.exp(theirs)),
        mean_kl=max(divergence, 0.0),  # of two that are equal, rounding can leave a little less than nothing
        top1_agreement=agreed,
    )


def _log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    wide_TV = logits_TV.astype(np.float64)
    wide_TV -= wide_TV.max(axis=1, keepdims=True)
    shifted: NDArray[np.float64] = wide_TV - np.log(np.exp(wide_TV).sum(axis=1, keepdims=True))
    return shifted
