"""The smallest share whose whole interval is inside; nothing where none is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.evaluation.refer.recommend import choose
from gap_export.evaluation.refer.results import EvalRun
from gap_export.evaluation.refer.run import EvalRecord

COUNT = 400


def run_of(accuracy: float, keep: float) -> EvalRun:
    """Hits from the first on, so that runs of less accuracy miss what others hit, and nothing else."""
    hits = np.arange(COUNT) < round(accuracy * COUNT)
    return EvalRun(
        folder=Path(f"keep{keep}"),
        record=EvalRecord(
            protocol="unc",
            description="",
            split="all",
            expressions=COUNT,
            images=100,
            accuracy=accuracy,
            low=0,
            high=1,
            mean_iou=1,
            unparsable=0,
            refused=0,
            missing_images=0,
            not_scored=0,
            mean_kept=100 * keep,
            backend="onnxruntime",
        ),
        ids=[str(number) for number in range(COUNT)],
        images=[f"p{number * 7 % 100}" for number in range(COUNT)],
        hits=hits,
        boxes=[(0.0, 0.0, 1.0, 1.0)] * COUNT,
    )


def runs_of(**accuracies: float) -> dict[float, EvalRun]:
    return {float(name[1:]) / 100: run_of(value, float(name[1:]) / 100) for name, value in accuracies.items()}


def test_the_smallest_inside_is_chosen() -> None:
    runs = runs_of(k100=0.9, k50=0.9, k25=0.895, k10=0.8)
    result = choose(runs, 0.02, manifest_sha256="m", ttft_ms={1.0: 50.0, 0.25: 20.0})
    assert result.chosen == 0.25
    assert [point.inside for point in result.points] == [True, True, True, False]
    assert [point.keep for point in result.points] == [1.0, 0.5, 0.25, 0.1]
    assert [point.speedup for point in result.points] == [1.0, None, 2.5, None]
    assert result.points[3].difference == pytest.approx(-0.1)


def test_a_loss_that_may_be_larger_is_not_inside() -> None:
    """The loss itself is small enough, its interval is not."""
    result = choose(runs_of(k100=0.9, k25=0.885), 0.02, manifest_sha256="m")
    assert result.points[1].difference > -0.02 > result.points[1].low
    assert result.chosen is None


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(300, 400), min_size=2, max_size=5), st.floats(0, 0.1), st.floats(0, 0.1))
def test_who_allows_more_keeps_no_more(hits: list[int], one: float, other: float) -> None:
    runs = {1 / (number + 1): run_of(hit / COUNT, number) for number, hit in enumerate(hits)}
    less, more = (choose(runs, drop, manifest_sha256="m").chosen for drop in sorted((one, other)))
    assert less is None or (more is not None and more <= less)
