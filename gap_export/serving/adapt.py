"""Fewer visual tokens while the server is behind, and no fewer than a record of what that costs allows.

`recommend` measures, for one build of a bundle, how much accuracy each ratio loses, with an interval. Under load the next smaller of those ratios is
taken, and the next larger when requests have not waited for some time. A ratio whose loss may be larger than allowed, by the end of its interval that is
worse and not by its mean, is never taken, and a ratio that was not measured neither. A request that chooses its own ratio is not touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, GapExportError, InputError, RecipeError
from gap_export.evaluation.bundle_reports import RECOMMENDATION
from gap_export.evaluation.recommend.of_bundle import read_recommendation
from gap_export.evaluation.recommend.record import Point, Recommendation
from gap_export.runtime.keep import check_keep

CALM = 1 / 3
"""Share of the target: as long as requests wait for less, the queue is calm."""
CALM_SECONDS = 5.0
"""Of calm, after which the next larger ratio is taken."""


class Adapt:
    """Which ratio a request is answered with that chose none; may be used from any thread. It is a `choose_keep.ChooseKeep`.

    Args:
        ratios: that may be taken.
        target: seconds that requests may wait.
        note: what an operator should know of the ratios.
        calm_seconds: of calm, after which the next larger ratio is taken.
        now: seconds of a clock that never goes back.

    Attributes:
        ratios: those that may be used, from the largest to the smallest.
        note: as given.

    Raises:
        InputError: there are no ratios, or the target is no time.
    """

    def __init__(
        self,
        ratios: Sequence[float],
        target: float,
        *,
        note: str = "",
        calm_seconds: float = CALM_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ratios:
            raise InputError("are none", subject="ratios", hint="give those that may be taken")
        if not 0 < target < float("inf"):
            raise InputError(
                "is no number of seconds above 0",
                subject=f"target delay {target:g}",
                hint="say how long requests may wait",
            )
        self.ratios, self.note = tuple(sorted(set(ratios), reverse=True)), note
        self._target, self._calm_seconds, self._now = target, calm_seconds, now
        self._place = 0
        self._changed: float | None = None
        self._calm_since: float | None = None
        self._lock = threading.Lock()

    @property
    def largest(self) -> float:
        """The ratio that is taken when no request waits for long."""
        return self.ratios[0]

    @property
    def current(self) -> float:
        """The ratio that was taken last."""
        return self.ratios[self._place]

    def choose(self, oldest_wait: float) -> float:
        """The ratio of a request that begins.

        Args:
            oldest_wait: seconds that a request has waited for others to be begun, the longest of all.
        """
        with self._lock:
            now = self._now()
            if oldest_wait >= self._target * CALM:
                self._calm_since = None
            elif self._calm_since is None:
                self._calm_since = now
            if oldest_wait > self._target:
                # A change shows in the queue only after requests of before have left it.
                if self._changed is None or now - self._changed >= self._target:
                    self._move(1, now)
            elif self._calm_since is not None:
                times = int((now - self._calm_since) / self._calm_seconds)
                if times:  # (several, where no request came for long)
                    self._move(-times, now)
                    self._calm_since = now
            return self.ratios[self._place]

    def _move(self, by: int, now: float) -> None:
        place = min(max(self._place + by, 0), len(self.ratios) - 1)
        if place != self._place:
            self._place, self._changed = place, now


def controller(bundle: Bundle, adapt: str, max_drop: float, target_delay: float) -> Adapt:
    """What chooses ratios of a bundle under load, from the record that `recommend` left beside it.

    Args:
        bundle: opened, built with a range of ratios.
        adapt: `1.0:0.25`, the largest and the smallest ratio that may be taken.
        max_drop: loss of accuracy that is allowed, against the largest ratio of the record.
        target_delay: seconds that requests may wait.

    Returns:
        Of the ratios that the record has, those within the range whose loss is within what is allowed with all of its interval. Where there are no
        two of them, there is nothing to choose: it takes the bundle's own ratio always, and its `note` says why.

    Raises:
        InputError: a loss or a target that is none, or a record that cannot be read.
        RecipeError: a range that is none.
        BundleError: requests to this bundle choose no ratio, there is no record of this build, or it has no ratio within the range.
    """
    high, low = _range(adapt)
    if not 0 <= max_drop <= 1:
        raise InputError(
            "is not from 0 to 1",
            subject=f"max accuracy drop {max_drop:g}",
            hint="0.03 allows three of a hundred answers to become wrong",
        )
    pruning = bundle.manifest.pruning
    if pruning.keep_range is None:
        raise BundleError(
            "lets requests choose no ratio, so that there is none to choose under load",
            subject=str(bundle.folder),
            hint="build it with a range: --keep 0.1:0.25:1.0",
        )
    record = _record(bundle)
    within = [
        point for point in record.points if low <= point.keep <= high and _can_be_chosen(bundle, point.keep)
    ]
    if not within:
        raise BundleError(
            f"has no ratio from {high:g} to {low:g} that this bundle takes (it has {_listed([point.keep for point in record.points])})",
            subject=str(bundle.reports / RECOMMENDATION),
            hint=f"measure those: gap-export recommend {bundle.folder} --keep {high:g},{low:g}",
        )
    largest = record.points[0]
    usable = [point.keep for point in within if point is largest or point.low >= -max_drop]
    left_out = [point for point in within if point.keep not in usable]
    if len(usable) < 2:
        note = f"nothing is chosen under load, the ratio stays {pruning.keep:g}"
        return Adapt([pruning.keep], target_delay, note=note + _because(left_out, max_drop))
    note = f"under load, requests keep {_listed(usable)} of the visual tokens" + _because(left_out, max_drop)
    return Adapt(usable, target_delay, note=note)


def _record(bundle: Bundle) -> Recommendation:
    record = read_recommendation(bundle)
    if record is None or record.manifest_sha256 != bundle.manifest_sha256:
        there = (bundle.reports / RECOMMENDATION).exists()
        raise BundleError(
            "is of another build of this bundle" if there else "is not there",
            subject=str(bundle.reports / RECOMMENDATION),
            hint=f"measure what each ratio loses first: gap-export recommend {bundle.folder}",
        )
    return record


def _because(left_out: Sequence[Point], max_drop: float) -> str:
    """Which ratios within the range are not taken, with what they may lose."""
    if not left_out:
        return ""
    losses = ", ".join(f"{point.keep:g} may lose {-point.low:.3g}" for point in left_out)
    return f": by the end of its interval, {losses}, and {max_drop:g} is allowed"


def _can_be_chosen(bundle: Bundle, keep: float) -> bool:
    try:
        check_keep(bundle.manifest.pruning, bundle.manifest.spec, keep)
    except GapExportError:
        return False
    return True


def _range(adapt: str) -> tuple[float, float]:
    """The largest and the smallest ratio."""
    try:
        high, low = (float(part) for part in adapt.split(":"))
    except ValueError:
        high = low = 0.0
    if not 0 < low < high <= 1:
        raise RecipeError(
            "is not a range of ratios, from the largest to the smallest",
            subject=f"adapt {adapt!r}",
            hint="write for example 1.0:0.25",
        )
    return high, low


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:g}" for ratio in ratios)
