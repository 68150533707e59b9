"""The record of a recommendation: what was tried, of one bundle or of many, and which of it to take.

Of one bundle, points are its shares, and the smallest within the accuracy tolerance is taken. Of many, points are pruners with their shares, and the
fastest within it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from gap_export.evaluation.recommend.front import pareto_front
from gap_export.records import Amount, Change, Count, Flag, Number, Record, Share, Text

_ROUNDING = 1e-6
"""By which numbers may differ that are computed from each other."""


def _of_pruners() -> Any:
    """A field that records of one bundle do not have, so that they are what they were before there was any."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Point(Record):
    """One share, of a bundle or of a pruner.

    Attributes:
        pruner: that chose the tokens; None in records of one bundle, as are the next two.
        front: whether no other point is at least as accurate and as fast, and better in one of both.
        manifest_sha256: of the build that was asked.
        keep: fraction of the visual tokens kept.
        mean_kept: tokens, on average.
        accuracy: of the data set.
        difference: to the first point: the largest share, or the unpruned model.
        low: lower end of its 95 % interval.
        high: upper end.
        inside: whether the whole interval lies above the loss that was allowed.
        ttft_ms: median time to the first token; of many bundles, on the scale of the first point.
        speedup: time to the first token of the first point over that of this one, in the same interleaved rounds.
    """

    pruner: Text | None = _of_pruners()
    front: Flag | None = _of_pruners()
    manifest_sha256: Text | None = _of_pruners()
    keep: Share
    mean_kept: Amount
    accuracy: Share
    difference: Change
    low: Change
    high: Change
    inside: Flag
    ttft_ms: Amount | None = None
    speedup: Amount | None = None

    @property
    def time_ms(self) -> float:
        """To the first token; 0 where it was not measured."""
        return self.ttft_ms or 0.0

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"keep {self.keep:g}" if self.pruner is None else f"{self.pruner}, keep {self.keep:g}"


class LeftOut(Record):
    """Shares of a pruner that cannot be, and why."""

    pruner: Text
    keeps: tuple[Share, ...]
    reason: str


class Recommendation(Record):
    """What was tried, and which of it to take.

    Attributes:
        manifest_sha256: of the build that was asked; of many, of the unpruned one.
        protocol: of all evaluations.
        max_accuracy_drop: that was allowed.
        expressions: that all points answered.
        points: from the largest share to the smallest; of many bundles, the unpruned model and then pruner by pruner.
        chosen: the share to take; None where only the first point is within the loss that was allowed, or nothing within it is faster.
        chosen_pruner: the pruner to take it with; None in records of one bundle.
        left_out: pruners that cannot be asked; None in records of one bundle.
    """

    manifest_sha256: str
    protocol: str
    max_accuracy_drop: Number
    expressions: Count
    points: tuple[Point, ...]
    chosen: Share | None
    chosen_pruner: Text | None = _of_pruners()
    left_out: tuple[LeftOut, ...] | None = _of_pruners()

    @property
    def of_pruners(self) -> bool:
        """Whether it is of many bundles, and its points have pruners."""
        return self.points[0].pruner is not None

    @property
    def choice(self) -> Point | None:
        """The point to take."""
        taken = (self.chosen_pruner, self.chosen)
        return next((point for point in self.points if (point.pruner, point.keep) == taken), None)

    @model_validator(mode="after")
    def _says_what_was_measured(self) -> Self:
        if len(self.points) < 2:
            raise ValueError("points are not at least two")
        if self.of_pruners:
            _check_pruners(self.points, self.left_out)
            chosen = fastest(self.points)
        else:
            _check_shares(self.points, self.left_out)
            chosen = smallest(self.points)
        for point in self.points:
            if point.inside != (point.low >= -self.max_accuracy_drop):
                raise ValueError(
                    f"inside is {point.inside} at {point.label}, where low is {point.low:g} and max_accuracy_drop "
                    f"{self.max_accuracy_drop:g}"
                )
        wanted = (None, None) if chosen is None else (chosen.pruner, chosen.keep)
        if (self.chosen_pruner, self.chosen) != wanted:
            raise ValueError(
                f"chosen {self.chosen} and chosen_pruner {self.chosen_pruner} are not the "
                f"{'fastest point' if self.of_pruners else 'smallest share'} inside"
            )
        return self


def smallest(points: Sequence[Point]) -> Point | None:
    """Of one bundle: the smallest share inside; None where only the largest is."""
    return min((point for point in points[1:] if point.inside), key=lambda point: point.keep, default=None)


def fastest(points: Sequence[Point]) -> Point | None:
    """Of many bundles: the fastest point inside, the more accurate of two that are as fast; None where that is the unpruned model."""
    found = min(
        (point for point in points if point.inside),
        key=lambda point: (point.time_ms, -point.accuracy),
        default=None,
    )
    return None if found is points[0] else found


def _check_shares(points: Sequence[Point], left_out: Sequence[LeftOut] | None) -> None:
    """Refuse what is no record of one bundle.

    Raises:
        ValueError: its points are not shares in their order, or it says something of pruners.
    """
    keeps = [point.keep for point in points]
    if keeps != sorted(set(keeps), reverse=True):
        raise ValueError("points are not at least two shares, from the largest to the smallest")
    if left_out is not None or any(
        (point.pruner, point.front, point.manifest_sha256) != (None,) * 3 for point in points
    ):
        raise ValueError(
            "points have pruner, front or manifest_sha256, or there is left_out, and the first point has no pruner"
        )


def _check_pruners(points: Sequence[Point], left_out: Sequence[LeftOut] | None) -> None:
    """Refuse what is no record of many bundles.

    Raises:
        ValueError: a point lacks something, comes twice, is not on the front as it says, or is not what it says against the first.
    """
    for point in points:
        if None in (point.pruner, point.front, point.manifest_sha256, point.ttft_ms, point.speedup):
            raise ValueError(
                "points lack pruner, front, manifest_sha256, ttft_ms or speedup, and the first has a pruner"
            )
    if left_out is None:
        raise ValueError("left_out is not there, and points have a pruner")
    if points[0].keep != 1 or len({(point.pruner, point.keep) for point in points}) < len(points):
        raise ValueError("points do not begin with keep 1, or one comes twice by pruner and keep")
    front = pareto_front([(point.accuracy, point.time_ms) for point in points])
    for point, on_front in zip(points, front, strict=True):
        if point.front != on_front:
            raise ValueError(f"front is {point.front} at {point.label}, by accuracy and ttft_ms it is not so")
    for point in points:
        _check_against(point, points[0])


def _check_against(point: Point, first: Point) -> None:
    """Refuse a point whose numbers are not those against the first, but for rounding.

    Raises:
        ValueError: names point and field.
    """
    if not point.low - _ROUNDING <= point.difference <= point.high + _ROUNDING:
        raise ValueError(
            f"difference is {point.difference:g} at {point.label}, and does not lie from low {point.low:g} to high {point.high:g}"
        )
    if abs(point.difference - (point.accuracy - first.accuracy)) > _ROUNDING:
        raise ValueError(
            f"difference is {point.difference:g} at {point.label}, and accuracy {point.accuracy:g}, "
            f"where that of the first point is {first.accuracy:g}"
        )
    speedup = point.speedup or 0.0
    if not math.isclose(speedup * point.time_ms, first.time_ms, rel_tol=_ROUNDING):
        raise ValueError(
            f"speedup is {speedup:g} at {point.label}, and ttft_ms {point.time_ms:g}, "
            f"where that of the first point is {first.time_ms:g}"
        )
