"""Which share of the visual tokens to keep: the smallest whose loss of accuracy is known to be small enough."""

from __future__ import annotations

from collections.abc import Mapping

from gap_export.evaluation.refer.compare import Run, compare
from gap_export.precision import Thresholds
from gap_export.records import Record

_NO_DEMANDS = Thresholds(max_accuracy_drop=1.0, min_prediction_agreement=0.0, min_box_iou=0.0)


class Point(Record):
    """One share.

    Attributes:
        keep: fraction of the visual tokens kept.
        mean_kept: tokens, on average.
        accuracy: of the data set.
        difference: to the largest share.
        low: lower end of its 95 % interval.
        high: upper end.
        inside: whether the whole interval lies above the loss that was allowed.
        ttft_ms: median time to the first token.
        speedup: time to the first token of the largest share over that of this one.
    """

    keep: float
    mean_kept: float
    accuracy: float
    difference: float
    low: float
    high: float
    inside: bool
    ttft_ms: float | None = None
    speedup: float | None = None


class Recommendation(Record):
    """What was tried, and which of it to take.

    Attributes:
        manifest_sha256: of the build that was asked.
        protocol: of all evaluations.
        max_accuracy_drop: that was allowed.
        expressions: that all shares answered.
        points: from the largest share to the smallest.
        chosen: the smallest share inside; None where only the largest is.
    """

    manifest_sha256: str
    protocol: str
    max_accuracy_drop: float
    expressions: int
    points: tuple[Point, ...]
    chosen: float | None


def recommend(
    runs: Mapping[float, Run],
    max_accuracy_drop: float,
    *,
    manifest_sha256: str,
    ttft_ms: Mapping[float, float] | None = None,
) -> Recommendation:
    """Choose.

    Args:
        runs: share -> evaluation, at least two.
        max_accuracy_drop: loss against the largest share that is allowed, with all of its interval.
        manifest_sha256: of the build that was asked.
        ttft_ms: share -> median time to the first token in one interleaved run, where it was measured.

    Raises:
        InputError: evaluations of different expressions.
    """
    shares = sorted(runs, reverse=True)
    first, points, times = runs[shares[0]], [], ttft_ms or {}
    for keep in shares:
        against = compare(first, runs[keep], _NO_DEMANDS, worst=0)
        points.append(
            Point(
                keep=keep,
                mean_kept=runs[keep].record["mean_kept"],
                accuracy=against.second_accuracy,
                difference=against.difference,
                low=against.low,
                high=against.high,
                inside=against.low >= -max_accuracy_drop,
                ttft_ms=times.get(keep),
                speedup=times[shares[0]] / times[keep] if {keep, shares[0]} <= times.keys() else None,
            )
        )
    inside = [point.keep for point in points[1:] if point.inside]
    return Recommendation(
        manifest_sha256=manifest_sha256,
        protocol=first.record["protocol"],
        max_accuracy_drop=max_accuracy_drop,
        expressions=len(first.ids),
        points=tuple(points),
        chosen=min(inside, default=None),
    )
