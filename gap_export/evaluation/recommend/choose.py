"""From evaluations and times to a recommendation: every point against the first, expression by expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gap_export.evaluation.recommend.front import pareto_front
from gap_export.evaluation.recommend.record import LeftOut, Point, Recommendation, fastest, smallest
from gap_export.evaluation.refer.compare import compare
from gap_export.evaluation.refer.results import EvalRun
from gap_export.precision import Thresholds

_NO_THRESHOLDS = Thresholds(max_accuracy_drop=1.0, min_prediction_agreement=0.0, min_box_iou=0.0)


@dataclass(frozen=True)
class Measured:
    """A pruner at one share.

    Attributes:
        pruner: its name.
        keep: fraction of the visual tokens kept.
        run: its evaluation.
        manifest_sha256: of the build that was asked.
        time_share: median time to the first token over that of the unpruned model, in the same interleaved rounds.
    """

    pruner: str
    keep: float
    run: EvalRun
    manifest_sha256: str
    time_share: float


def choose(
    runs: Mapping[float, EvalRun],
    max_accuracy_drop: float,
    *,
    manifest_sha256: str,
    ttft_ms: Mapping[float, float] | None = None,
) -> Recommendation:
    """Choose a share of one bundle: the smallest within the accuracy tolerance.

    Args:
        runs: share -> evaluation, at least two.
        max_accuracy_drop: loss against the largest share that is allowed, with all of its interval.
        manifest_sha256: of the build that was asked.
        ttft_ms: share -> median time to the first token in one interleaved run, where it was measured.

    Raises:
        InputError: evaluations of different expressions.
    """
    shares, times = sorted(runs, reverse=True), ttft_ms or {}
    first = runs[shares[0]]
    points = [
        _point(
            first,
            runs[keep],
            keep,
            max_accuracy_drop,
            ttft_ms=times.get(keep),
            speedup=times[shares[0]] / times[keep] if {keep, shares[0]} <= times.keys() else None,
        )
        for keep in shares
    ]
    chosen = smallest(points)
    return Recommendation(
        manifest_sha256=manifest_sha256,
        protocol=first.record.protocol,
        max_accuracy_drop=max_accuracy_drop,
        expressions=len(first.ids),
        points=tuple(points),
        chosen=None if chosen is None else chosen.keep,
    )


def choose_pruner(
    measured: Sequence[Measured],
    max_accuracy_drop: float,
    *,
    ttft_ms: float,
    left_out: Sequence[LeftOut] = (),
) -> Recommendation:
    """Choose a pruner and its share: the fastest within the accuracy tolerance.

    Args:
        measured: at least two, the unpruned model first.
        max_accuracy_drop: loss against the unpruned model that is allowed, with all of its interval.
        ttft_ms: median time to the first token of the unpruned model, ms.
        left_out: what cannot be.

    Raises:
        InputError: evaluations of different expressions.
    """
    first = measured[0]
    front = pareto_front([(float(each.run.hits.mean()), ttft_ms * each.time_share) for each in measured])
    points = [
        _point(
            first.run,
            each.run,
            each.keep,
            max_accuracy_drop,
            pruner=each.pruner,
            front=on_front,
            manifest_sha256=each.manifest_sha256,
            ttft_ms=ttft_ms * each.time_share,
            speedup=1 / each.time_share,
        )
        for each, on_front in zip(measured, front, strict=True)
    ]
    chosen = fastest(points)
    return Recommendation(
        manifest_sha256=first.manifest_sha256,
        protocol=first.run.record.protocol,
        max_accuracy_drop=max_accuracy_drop,
        expressions=len(first.run.ids),
        points=tuple(points),
        chosen=None if chosen is None else chosen.keep,
        chosen_pruner=None if chosen is None else chosen.pruner,
        left_out=tuple(left_out),
    )


def _point(first: EvalRun, run: EvalRun, keep: float, max_accuracy_drop: float, **more: Any) -> Point:
    """One point against the first, with a paired interval."""
    against = compare(first, run, _NO_THRESHOLDS, worst=0)
    low = min(against.low, against.difference)  # (they differ by rounding, where all images say the same)
    return Point(
        keep=keep,
        mean_kept=run.record.mean_kept,
        accuracy=against.subject_accuracy,
        difference=against.difference,
        low=low,
        high=max(against.high, against.difference),
        inside=low >= -max_accuracy_drop,
        **more,
    )
