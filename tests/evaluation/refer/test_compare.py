"""Comparing runs: intervals that hold what they promise, an exact test against enumeration, gates that can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export import families
from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.evaluation.gates import GROUNDING
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.compare import (
    bootstrap_interval,
    compare,
    mcnemar,
    thresholds_on,
)
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.journal import AnswerRow
from gap_export.evaluation.refer.protocols import protocol_of
from gap_export.evaluation.refer.results import (
    PROVENANCE,
    EvalRun,
    Provenance,
    open_run,
    store_results,
    write_results,
)
from gap_export.evaluation.refer.run import EvalRecord, record_of, score_all
from gap_export.precision import Thresholds

LOOSE = Thresholds(max_accuracy_drop=1, min_prediction_agreement=0, min_box_iou=0)


RECORD = EvalRecord(
    protocol="unc", description="", split="all", expressions=1, images=1, accuracy=1, low=1, high=1, mean_iou=1,
    unparsable=0, refused=0, missing_images=0, not_scored=0, mean_kept=9, backend="onnxruntime",
)  # fmt: skip


def run_of(hits: list[bool], boxes: list[Any] | None = None, images: list[str] | None = None) -> EvalRun:
    count = len(hits)
    return EvalRun(
        folder=Path("run"),
        record=RECORD,
        ids=[f"e{number}" for number in range(count)],
        images=images or [f"p{number // 2}" for number in range(count)],
        hits=np.array(hits),
        boxes=boxes or [(0.0, 0.0, 10.0, 10.0)] * count,
    )


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_coins_own_count(gained: int, lost: int) -> None:
    """Every sequence of gains and losses is as likely: count those that are as lopsided, or more."""
    total = gained + lost
    if total > 12:
        return
    extreme = [
        min(sum(coin), total - sum(coin)) <= min(gained, lost) for coin in product((0, 1), repeat=total)
    ]
    assert mcnemar(gained, lost) == pytest.approx(sum(extreme) / len(extreme))


def test_mcnemar_of_many() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert mcnemar(400, 600) == pytest.approx(2.73e-10, rel=0.05)


def test_intervals_cover_the_truth() -> None:
    """Of clustered data with a known mean: a 95 % interval holds it about 95 times in 100; without clusters it would be too narrow."""
    rng = np.random.default_rng(0)
    held = held_without = 0
    for trial in range(120):
        images = rng.normal(0.1, 1.0, 60)
        change = np.repeat(images, 5) + rng.normal(0, 0.2, 300)
        names = [f"p{number // 5}" for number in range(300)]
        low, high = bootstrap_interval(change, names, seed=trial, resamples=800)
        held += low <= 0.1 <= high
        low, high = bootstrap_interval(change, [str(n) for n in range(300)], seed=trial, resamples=800)
        held_without += low <= 0.1 <= high
    assert 105 <= held <= 120
    assert held_without < 90


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_counts_add_up(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([bool(pair[side]) for pair in pairs] for side in (0, 1))
    result = compare(run_of(first), run_of(second), LOOSE)
    assert result.difference == pytest.approx((result.gained - result.lost) / len(pairs))
    assert result.difference == pytest.approx(result.subject_accuracy - result.reference_accuracy)
    assert result.low <= result.difference + 1e-12
    assert result.high >= result.difference - 1e-12
    assert result.passed


def test_rows_are_matched_by_id() -> None:
    first = run_of([True, False, False, True])
    second = run_of([True, False, False, True])
    turned = EvalRun(
        second.folder,
        second.record,
        second.ids[::-1],
        second.images[::-1],
        second.hits[::-1],
        second.boxes[::-1],
    )
    result = compare(first, turned, GROUNDING)
    assert (result.gained, result.lost, result.identical) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("hits", "boxes", "failing"),
    [
        ([True] * 20, None, set()),
        ([False] * 2 + [True] * 18, None, {"max_accuracy_drop"}),
        ([True] * 20, [(0.0, 0.0, 10.0, 8.0)] * 20, {"min_box_iou"}),
        ([True] * 20, [None, None] + [(0.0, 0.0, 10.0, 10.0)] * 18, {"min_prediction_agreement"}),
    ],
)
def test_gates_fail_one_by_one(hits: list[bool], boxes: Any, failing: set[str]) -> None:
    result = compare(run_of([True] * 20), run_of(hits, boxes), replace(GROUNDING, min_box_iou=0.85))
    assert {gate.name for gate in result.gates if not gate.passed} == failing
    assert result.passed is (not failing)


def test_the_worst_come_first() -> None:
    boxes: list[Any] = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 4.0), None, (0.0, 0.0, 10.0, 9.0)]
    result = compare(run_of([True] * 4), run_of([True] * 4, boxes), GROUNDING, worst=2)
    assert [(each.id, round(each.iou, 3)) for each in result.worst] == [("e2", 0.0), ("e1", 0.4)]


def test_other_expressions_are_refused() -> None:
    with pytest.raises(InputError, match="1 are only in the reference, 0 only in the subject"):
        compare(run_of([True] * 3), run_of([True] * 2), GROUNDING)


def test_ids_that_stand_for_something_else_are_refused() -> None:
    first, second = run_of([True] * 3), run_of([True] * 3, images=["p0", "p0", "p7"])
    with pytest.raises(InputError, match="expression e2 is about p1 in one and p7 in the other"):
        compare(first, second, GROUNDING)


def test_runs_are_read_back(tmp_path: Path) -> None:
    expressions = [Expression(f"e{n}", "a.jpg", "mug", (0.0, 0.0, 5.0, 5.0), 10, 10) for n in range(3)]
    answers = ["[0.00, 0.00, 0.50, 0.50]", "nothing", "[0.00, 0.00, 1.00, 1.00]"]
    rows = [
        AnswerRow(
            id=f"e{n}",
            image="a.jpg",
            width=10,
            height=10,
            answer=answers[n],
            tokens=1,
            kept_indices=(0,),
            seconds=0,
        )
        for n in range(3)
    ]
    protocol = protocol_of("unc", families.row("llava").box)
    scored = score_all(expressions, rows, protocol)
    write_results(scored, tmp_path / "unc-results.parquet")
    with pytest.raises(InputError, match="no finished evaluation under unc"):
        open_run(tmp_path, "unc")
    record = record_of(scored, protocol, split="val", backend="torch")
    store_results(record, scored, Dataset("d", "0", tuple(expressions), None, data="d"), None, tmp_path)
    run = open_run(tmp_path, "unc")
    assert run.hits.tolist() == [True, False, False]
    assert run.boxes == [(0.0, 0.0, 5.0, 5.0), None, (0.0, 0.0, 10.0, 10.0)]
    assert run.record == record
    assert compare(run, run, GROUNDING).passed
    others = tuple(replace(row, truth=(1.0, 0.0, 5.0, 5.0)) for row in run.rows)
    with pytest.raises(InputError, match=r"expression e0 is of the box \(0\.0, .* in one and \(1\.0"):
        compare(run, replace(run, rows=others), GROUNDING)
    (tmp_path / "unc-results.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="cannot be read"):
        open_run(tmp_path, "unc")


def stored(folder: Path, backend: str, bundle: Path | None) -> EvalRun:
    """A run whose folder says which bundle answered."""
    folder.mkdir()
    where = None if bundle is None else str(bundle)
    Provenance(bundle=where, data="d", split=None, images=None, processor="p", versions={}).write(
        folder / PROVENANCE
    )
    run = run_of([True] * 4)
    return replace(run, folder=folder, record=run.record.model_copy(update={"backend": backend}))


def test_thresholds_against_pytorch_are_those_of_the_recipe(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    torch, engine = (stored(tmp_path / name, name, bundle.folder) for name in ("torch", "onnxruntime"))
    tight = thresholds_on(torch, engine)
    assert (tight.max_accuracy_drop, tight.min_box_iou) == (0.005, 0.99)
    assert tight.min_prediction_agreement == GROUNDING.min_prediction_agreement
    given = thresholds_on(torch, engine, min_box_iou=0.5, max_accuracy_drop=None)
    assert (given.max_accuracy_drop, given.min_box_iou) == (0.005, 0.5)
    with pytest.raises(InputError, match=r"min_box_iou 1\.1: is not a number from 0 to 1"):
        thresholds_on(torch, engine, min_box_iou=1.1)

    assert thresholds_on(engine, engine) == GROUNDING, "the first is not PyTorch's"
    other = stored(tmp_path / "other", "onnxruntime", tmp_path)
    assert thresholds_on(torch, other) == GROUNDING, "another bundle may lose more"
    file = stored(tmp_path / "file", "predictions", None)
    assert thresholds_on(torch, file) == GROUNDING
    assert thresholds_on(run_of([True]), run_of([True]), max_accuracy_drop=0.2).max_accuracy_drop == 0.2
