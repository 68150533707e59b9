"""Measuring and judging two readings of a text: against sums that are written out in float64, and with logits that are no numbers.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from gap_export.errors import GateError
from gap_export.evaluation import text_parity
from gap_export.evaluation.gates import at_least, at_most
from gap_export.evaluation.text_parity import CONTROL, TextMeasurement, TextReport, judge, measure
from gap_export.positions import Ids
from gap_export.precision import Thresholds

Logits = NDArray[np.float32]

TOKENS, VOCABULARY = 200, 37
LOOSE = Thresholds(max_perplexity_rise=1e300, max_mean_kl=1e300, min_top1_agreement=-1.0)
"""Gates that any number passes."""


def readings(noise: float = 0.3) -> tuple[Logits, Logits, Ids]:
    """(logits of a run [T, V], those that it is held against, what came next [T])."""
    rng = np.random.default_rng(3)
    reference_TV = (4 * rng.normal(size=(TOKENS, VOCABULARY))).astype(np.float32)
    off_TV = (noise * rng.normal(size=reference_TV.shape)).astype(np.float32)
    return reference_TV + off_TV, reference_TV, rng.integers(0, VOCABULARY, TOKENS)


def sums(logits_TV: Logits, reference_TV: Logits, next_T: Ids) -> dict[str, float]:
    """The definitions, token by token; exact enough for logits this small."""

    def probabilities(row_V: Logits) -> list[float]:
        weights = [math.exp(float(logit)) for logit in row_V]
        return [weight / math.fsum(weights) for weight in weights]

    mine, theirs, divergences, same = [], [], [], 0
    for row, came in enumerate(next_T):
        q, p = probabilities(logits_TV[row]), probabilities(reference_TV[row])
        mine.append(-math.log(q[came]))
        theirs.append(-math.log(p[came]))
        divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same += max(range(len(q)), key=q.__getitem__) == max(range(len(p)), key=p.__getitem__)
    return {
        "perplexity": math.exp(math.fsum(mine) / len(next_T)),
        "reference_perplexity": math.exp(math.fsum(theirs) / len(next_T)),
        "mean_kl": math.fsum(divergences) / len(next_T),
        "top1_agreement": same / len(next_T),
    }


# Measuring


@pytest.mark.parametrize("noise", [1e-3, 0.3, 3.0])
def test_figures_are_those_of_their_definitions(noise: float) -> None:
    measured, expected = measure(*readings(noise)), sums(*readings(noise))
    assert measured.tokens == TOKENS
    for name, value in expected.items():
        assert getattr(measured, name) == pytest.approx(value, rel=1e-9), name
    rise = expected["perplexity"] / expected["reference_perplexity"] - 1
    assert measured.perplexity_rise == pytest.approx(rise, abs=1e-9)
    assert 0 < measured.top1_agreement < 1 or noise == 1e-3


def test_equal_readings_measure_equal() -> None:
    _, reference_TV, next_T = readings()
    # What all logits of a row have in common says nothing.
    for mine_TV in (reference_TV, reference_TV + np.float32(8)):
        measured = measure(mine_TV, reference_TV, next_T)
        assert measured.perplexity_rise == pytest.approx(0, abs=1e-6)
        assert measured.mean_kl == pytest.approx(0, abs=1e-9)
        assert measured.mean_kl >= 0
        assert measured.top1_agreement == 1.0
    exact = measure(reference_TV, reference_TV, next_T)
    assert (exact.perplexity_rise, exact.mean_kl) == (0.0, 0.0)


@pytest.mark.parametrize("at_once", [1, 7, 64, TOKENS, 10 * TOKENS])
def test_how_many_rows_are_held_at_a_time_changes_nothing(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(*readings())
    monkeypatch.setattr(text_parity, "_ROWS_AT_ONCE", at_once)
    for name, value in measure(*readings()).model_dump().items():
        assert value == pytest.approx(getattr(whole, name), rel=1e-12), name


def test_the_last_token_of_a_text_predicts_nothing() -> None:
    """One row of logits more than tokens that came after."""
    mine_TV, reference_TV, next_T = readings()
    mine_TV[-1] = np.nan
    assert measure(mine_TV, reference_TV, next_T[:-1]).tokens == TOKENS - 1
    assert math.isfinite(measure(mine_TV, reference_TV, next_T[:-1]).mean_kl)
    assert math.isnan(measure(mine_TV, reference_TV, next_T).mean_kl)


def test_large_logits_are_no_infinities() -> None:
    mine_TV, reference_TV, next_T = readings()
    measured = measure(mine_TV * 1e4, reference_TV * 1e4, next_T)
    assert measured.perplexity == math.inf, "nothing that came was likely"
    assert math.isfinite(measured.mean_kl)
    assert not all(gate.passed for gate in judge("x", measured, LOOSE))


@pytest.mark.parametrize("row", [0, 63, 64, TOKENS - 1])
@pytest.mark.parametrize("whole", [True, False], ids=["a row", "one logit"])
@pytest.mark.parametrize("side", ["run", "reference", "both"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_passes_no_gates(broken: float, side: str, whole: bool, row: int) -> None:
    """Whatever the gates are; and the figures are stored and read again."""
    mine_TV, reference_TV, next_T = readings()
    for name, logits_TV in (("run", mine_TV), ("reference", reference_TV)):
        if side in (name, "both"):
            logits_TV[row, slice(None) if whole else next_T[row]] = broken
    measured = measure(mine_TV, reference_TV, next_T)
    gates = judge("x", measured, LOOSE)
    assert not all(gate.passed for gate in gates), measured
    again = TextMeasurement.model_validate_json(measured.model_dump_json())
    assert [gate.passed for gate in judge("x", again, LOOSE)] == [gate.passed for gate in gates]


def test_the_gates_are_loose_where_all_are_numbers() -> None:
    """Or the test above would show nothing."""
    assert all(gate.passed for gate in judge("x", measure(*readings(3.0)), LOOSE))


# Judging

FINE = TextMeasurement(tokens=10, perplexity=8.0, reference_perplexity=8.0, mean_kl=0.0, top1_agreement=1.0)


@pytest.mark.parametrize(
    ("field", "limit", "sign", "gate"),
    [
        ("perplexity", 8 * (1 + 1e-3), 1, "perplexity_rise"),
        ("mean_kl", 1e-5, 1, "mean_kl"),
        ("top1_agreement", 0.99, -1, "top1_agreement"),
    ],
)
def test_every_gate_fails_beyond_its_limit_and_not_before(
    field: str, limit: float, sign: int, gate: str
) -> None:
    assert all(entry.passed for entry in judge("steps", FINE, Thresholds()))
    inside, beyond, unknown = (
        FINE.model_copy(update={field: value})
        for value in (limit * (1 - sign * 1e-7), limit * (1 + sign * 1e-6), float("nan"))
    )
    assert all(entry.passed for entry in judge("steps", inside, Thresholds()))
    for measured in (beyond, unknown):
        failed = [entry.name for entry in judge("steps", measured, Thresholds()) if not entry.passed]
        assert failed == [f"steps: {gate}"]


def test_a_better_perplexity_than_pytorchs_passes() -> None:
    assert all(gate.passed for gate in judge("x", FINE.model_copy(update={"perplexity": 4.0}), Thresholds()))


@pytest.mark.parametrize("reference", [0.0, math.inf, math.nan])
def test_nothing_is_held_against_a_reference_that_is_no_number(reference: float) -> None:
    measured = FINE.model_copy(update={"reference_perplexity": reference})
    assert math.isnan(measured.perplexity_rise)
    assert not all(gate.passed for gate in judge("x", measured, LOOSE))


# Reports

REPORT: dict[str, Any] = {
    "ok": True,
    "manifest_sha256": "m",
    "bundle": "tiny",
    "backend": "onnxruntime",
    "precision": "fp32",
    "source": "prose.txt",
    "source_sha256": "s",
    "prefill": None,
    "steps": FINE,
    "gates": [at_most("steps: mean_kl", 0.0, 1e-5)],
    "control_caught": True,
    "versions": {},
}
MISSED = [*REPORT["gates"], at_least("steps: top1_agreement", 0.5, 0.99)]


def test_a_report_that_contradicts_its_gates_is_none() -> None:
    TextReport(**REPORT).raise_for_gates()
    for changes in ({"gates": MISSED}, {"control_caught": False}, {"ok": False}):
        with pytest.raises(ValidationError, match="which its gates contradict"):
            TextReport(**{**REPORT, **changes})


def test_gates_that_are_not_met_are_raised() -> None:
    missed = TextReport(**{**REPORT, "ok": False, "gates": MISSED})
    with pytest.raises(GateError, match=r"does not meet steps: top1_agreement 0\.5, not >= 0\.99"):
        missed.raise_for_gates()


def test_a_control_that_went_unnoticed_is_raised() -> None:
    unnoticed = TextReport(**{**REPORT, "ok": False, "control_caught": False})
    with pytest.raises(GateError, match=f"went unnoticed: {CONTROL}") as caught:
        unnoticed.raise_for_gates()
    assert caught.value.hint


def test_a_report_is_read_as_it_was_written() -> None:
    broken = FINE.model_copy(update={"perplexity": math.inf, "mean_kl": math.nan})
    gates = judge("steps", broken, Thresholds())
    report = TextReport(**{**REPORT, "ok": False, "prefill": FINE, "steps": broken, "gates": gates})
    again = TextReport.parse(report.text().encode(), subject="it", hint="")
    assert again.text() == report.text()
    assert [gate.passed for gate in again.gates] == [False, False, True]
