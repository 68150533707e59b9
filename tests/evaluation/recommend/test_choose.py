"""The smallest share of a bundle, or the fastest of many pruners, whose whole interval is inside; nothing where none is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.evaluation.recommend.choose import Measured, choose, choose_pruner
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


# Among pruners


def measured(**of: tuple[float, float, float]) -> list[Measured]:
    """Pruner -> keep, accuracy, and share of the unpruned model's time; the unpruned model first."""
    return [
        Measured(
            pruner=name, keep=keep, run=run_of(accuracy, keep), manifest_sha256=f"of {name}", time_share=time
        )
        for name, (keep, accuracy, time) in {"none": (1.0, 0.9, 1.0), **of}.items()
    ]


def test_the_fastest_inside_is_chosen_not_the_smallest_share() -> None:
    found = choose_pruner(
        measured(dart=(0.1, 0.9, 0.5), random=(0.25, 0.89, 0.4), spatial=(0.5, 0.6, 0.2)), 0.03, ttft_ms=50.0
    )
    assert (found.chosen_pruner, found.chosen) == ("random", 0.25)
    assert [point.inside for point in found.points] == [True, True, True, False]
    assert [point.front for point in found.points] == [False, True, True, True]
    assert [point.ttft_ms for point in found.points] == pytest.approx([50, 25, 20, 10])
    assert [point.speedup for point in found.points] == pytest.approx([1, 2, 2.5, 5])
    assert found.points[3].difference == pytest.approx(-0.3)
    assert found.manifest_sha256 == "of none"
    assert found.points[1].manifest_sha256 == "of dart"


def test_of_two_that_are_as_fast_the_more_accurate_is_chosen() -> None:
    found = choose_pruner(measured(dart=(0.1, 0.89, 0.5), random=(0.25, 0.9, 0.5)), 0.05, ttft_ms=50.0)
    assert found.chosen_pruner == "random"


@pytest.mark.parametrize("of", [{"dart": (0.5, 0.9, 1.2)}, {"dart": (0.5, 0.5, 0.5)}])
def test_nothing_is_chosen_that_is_slower_or_not_inside(of: dict[str, tuple[float, float, float]]) -> None:
    found = choose_pruner(measured(**of), 0.02, ttft_ms=50.0)
    assert (found.chosen_pruner, found.chosen, found.choice) == (None, None, None)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.integers(300, 400), st.floats(0.1, 2)), min_size=1, max_size=5),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
)
def test_who_allows_more_waits_no_longer(of: list[tuple[int, float]], one: float, other: float) -> None:
    pruners = {f"p{number}": (0.5, hits / COUNT, time) for number, (hits, time) in enumerate(of)}
    less, more = (choose_pruner(measured(**pruners), drop, ttft_ms=50.0) for drop in sorted((one, other)))
    first, second = (found.choice or found.points[0] for found in (less, more))
    assert second.time_ms <= first.time_ms
