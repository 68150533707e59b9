"""Ratios under load: only those that were measured on this build and lose little enough, fewer tokens while requests wait, more again when they do not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle.manifest import Pruning
from gap_export.errors import BundleError, GapExportError, InputError, RecipeError
from gap_export.evaluation.bundle_reports import RECOMMENDATION
from gap_export.evaluation.recommend.record import Point, Recommendation
from gap_export.positions import PositionPolicy
from gap_export.serving.adapt import CALM_SECONDS, Adapt, controller

RATIOS = (1.0, 0.5, 0.25, 0.1)
TARGET = 0.4


class Clock:
    """Told how late it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def adapt_of(ratios: tuple[float, ...] = RATIOS) -> tuple[Adapt, Clock]:
    clock = Clock()
    return Adapt(ratios, TARGET, now=clock), clock


# The controller


def test_fewer_while_requests_wait_and_more_when_they_do_not() -> None:
    adapt, clock = adapt_of()
    assert adapt.choose(0.0) == adapt.largest == 1.0
    assert [_after(adapt, clock, TARGET, 0.41) for _ in range(5)] == [0.5, 0.25, 0.1, 0.1, 0.1]
    assert adapt.current == 0.1
    assert _after(adapt, clock, 60.0, TARGET) == 0.1, "as long as is allowed: neither"
    assert _after(adapt, clock, 60.0, TARGET / 2) == 0.1
    assert _after(adapt, clock, 0.0, 0.0) == 0.1
    assert _after(adapt, clock, CALM_SECONDS - 0.1, 0.1) == 0.1
    assert _after(adapt, clock, 0.2, 0.1) == 0.25
    assert _after(adapt, clock, CALM_SECONDS - 0.1, 0.1) == 0.25
    assert _after(adapt, clock, 0.2, 0.2) == 0.25, "no longer calm"
    assert _after(adapt, clock, 0.1, 0.1) == 0.25
    assert _after(adapt, clock, CALM_SECONDS, 0.1) == 0.5
    assert _after(adapt, clock, 3600.0, 0.0) == 1.0


def _after(adapt: Adapt, clock: Clock, seconds: float, oldest_wait: float) -> float:
    clock.now += seconds
    return adapt.choose(oldest_wait)


def test_a_change_is_given_time_to_show() -> None:
    """A hundred requests that begin at once, each of which has waited too long, are one reason for one change."""
    adapt, clock = adapt_of()
    assert {adapt.choose(10 * TARGET) for _ in range(100)} == {0.5}
    assert _after(adapt, clock, TARGET * 0.9, 10.0) == 0.5
    assert _after(adapt, clock, TARGET * 0.2, 10.0) == 0.25


MOMENTS = st.lists(
    st.tuples(st.floats(0, 8), st.one_of(st.floats(0, 3 * TARGET), st.just(0.0), st.just(10.0))), max_size=60
)


@given(MOMENTS, st.lists(st.sampled_from((1.0, 0.75, 0.5, 0.33, 0.25, 0.1)), min_size=1, max_size=6))
def test_whatever_happens(moments: list[tuple[float, float]], ratios: list[float]) -> None:
    adapt, clock = adapt_of(tuple(ratios))
    chosen = [(clock.now, 0.0, adapt.choose(0.0))]
    for seconds, wait in moments:
        chosen.append((clock.now + seconds, wait, _after(adapt, clock, seconds, wait)))
    assert adapt.largest == max(ratios)
    for _, _, ratio in chosen:
        assert ratio in ratios
    changes = []
    for (_, _, before), (now, wait, after) in pairwise(chosen):
        if after < before:
            assert wait > TARGET, "fewer only under load"
            assert adapt.ratios.index(after) == adapt.ratios.index(before) + 1, "one at a time"
        if after > before:
            assert wait < TARGET / 3, "more only in calm"
        if after != before:
            changes.append((now, after > before))
    for (first, _), (second, more) in pairwise(changes):
        assert second - first >= (CALM_SECONDS if more else TARGET) - 1e-9, "no flapping"


@given(st.lists(st.floats(0, 3), min_size=1, max_size=30), st.floats(TARGET * 1.001, 1e6))
def test_under_lasting_load_it_only_becomes_smaller(seconds: list[float], wait: float) -> None:
    adapt, clock = adapt_of()
    chosen = [_after(adapt, clock, each, wait) for each in seconds]
    assert chosen == sorted(chosen, reverse=True)
    assert min(chosen) >= min(RATIOS)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_is_none(target: float) -> None:
    with pytest.raises(InputError, match="is no number of seconds above 0"):
        Adapt(RATIOS, target)
    with pytest.raises(InputError, match="ratios: are none"):
        Adapt((), 1.0)


# Which ratios


def bundle_of(folder: Path, keep: str | None = "range") -> Any:
    """What of a bundle decides: its folder of reports, its hash, and which ratios requests may choose."""
    ranged = keep is not None
    pruning = Pruning(
        pruner="divprune",
        keep=0.25,
        kept=25,
        keep_mode="dynamic" if ranged else "fixed",
        min_tokens=10 if ranged else 25,
        max_tokens=80 if ranged else 25,
        keep_range=(0.1, 0.8) if ranged else None,
        positions=PositionPolicy.GAP,
        seed=0,
    )
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(
        folder=folder,
        reports=folder,
        manifest_sha256="a" * 64,
        manifest=SimpleNamespace(pruning=pruning, spec=SimpleNamespace(token_range=None, visual_tokens=100)),
    )


def record_of(lows: dict[float, float], manifest_sha256: str = "a" * 64) -> Recommendation:
    """Ratio -> lower end of the interval of its difference; the mean is 0 everywhere."""
    points = tuple(
        Point(
            keep=keep,
            mean_kept=100 * keep,
            accuracy=0.8,
            difference=0.0,
            low=low,
            high=0.01,
            inside=low >= -0.5,
        )
        for keep, low in lows.items()
    )
    return Recommendation(
        manifest_sha256=manifest_sha256,
        protocol="unc",
        max_accuracy_drop=0.5,
        expressions=100,
        points=points,
        chosen=min((point.keep for point in points[1:] if point.inside), default=None),
    )


LOWS = {0.8: 0.0, 0.5: -0.01, 0.35: -0.031, 0.25: -0.02, 0.1: -0.3}


def test_only_ratios_that_lose_little_enough_by_the_end_of_their_interval(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    record_of(LOWS).write(tmp_path / RECOMMENDATION)
    adapt = controller(bundle, "1.0:0.1", 0.03, 1.0)
    assert adapt.ratios == (0.8, 0.5, 0.25), "their means are all the same"
    assert adapt.note == (
        "under load, requests keep 0.8, 0.5, 0.25 of the visual tokens: by the end of its interval, "
        "0.35 may lose 0.031, 0.1 may lose 0.3, and 0.03 is allowed"
    )
    assert controller(bundle, "1.0:0.1", 0.5, 1.0).ratios == (0.8, 0.5, 0.35, 0.25, 0.1)
    assert controller(bundle, "0.5:0.25", 0.05, 1.0).ratios == (0.5, 0.35, 0.25)
    assert controller(bundle, "0.6:0.2", 0.025, 1.0).largest == 0.5


def test_ratios_that_the_bundle_does_not_take_are_left_out(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    record_of({1.0: 0.0, 0.8: 0.0, 0.5: 0.0, 0.05: 0.0}).write(tmp_path / RECOMMENDATION)
    assert controller(bundle, "1.0:0.05", 0.03, 1.0).ratios == (0.8, 0.5)


def test_an_interval_that_is_too_wide_leaves_the_default_alone(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    record_of({0.8: 0.0, 0.5: -0.1, 0.25: -0.2}).write(tmp_path / RECOMMENDATION)
    adapt = controller(bundle, "0.8:0.25", 0.03, 1.0)
    assert adapt.note == (
        "nothing is chosen under load, the ratio stays 0.25: by the end of its interval, 0.5 may lose 0.1, 0.25 may lose 0.2, "
        "and 0.03 is allowed"
    )
    assert {adapt.choose(wait) for wait in (0.0, 100.0, 1000.0)} == {0.25}


def test_what_is_refused(tmp_path: Path) -> None:
    bundle, path = bundle_of(tmp_path), tmp_path / RECOMMENDATION

    def refused(kind: type[GapExportError], *told: str, adapt: str = "1.0:0.25", drop: float = 0.03) -> None:
        with pytest.raises(kind) as caught:
            controller(bundle, adapt, drop, 1.0)
        for each in told:
            assert each in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(BundleError, "is not there", f"gap-export recommend {tmp_path}")
    record_of(LOWS, "b" * 64).write(path)
    refused(BundleError, "is of another build of this bundle", f"gap-export recommend {tmp_path}")
    path.write_text('{"manifest_sha256": "' + "a" * 64 + '"}')
    refused(InputError, "run gap-export recommend")
    of_pruners = record_of({1.0: 0.0, 0.5: 0.0}).model_dump() | {"chosen_pruner": "dart", "left_out": ()}
    for point, pruner, time in zip(of_pruners["points"], ("none", "dart"), (8.0, 4.0), strict=True):
        point |= {"pruner": pruner, "front": pruner == "dart", "manifest_sha256": "a" * 64}
        point |= {"ttft_ms": time, "speedup": 8.0 / time}
    path.write_text(Recommendation.model_validate(of_pruners).text())
    refused(InputError, "is of several pruners", f"gap-export recommend {tmp_path}")
    path.unlink()
    record_of(LOWS).write(path)
    refused(
        BundleError, "has no ratio from 0.49 to 0.4", "0.8, 0.5, 0.35", "--keep 0.49,0.4", adapt="0.49:0.4"
    )
    for adapt in ("", "1.0", "0.25:1.0", "1.0:0.25:0.1", "a:b", "1.0:0", "nan:nan", "2:0.5", "0.5:0.5"):
        refused(RecipeError, "is not a range of ratios", adapt=adapt)
    for drop in (-0.1, 1.5, float("nan")):
        refused(InputError, "is not from 0 to 1", drop=drop)
    bundle = bundle_of(tmp_path / "fixed", None)
    refused(BundleError, "lets requests choose no ratio", "--keep 0.1:0.25:1.0")
