"""Which share of the visual tokens to keep: the smallest whose loss of accuracy is known to be small enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import model_validator

from gap_export import bounds
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import InputError
from gap_export.evaluation.bundle_reports import RECOMMENDATION, check_reports_can_be_written
from gap_export.evaluation.latency.candidate import candidate
from gap_export.evaluation.latency.measure import measure
from gap_export.evaluation.refer.compare import compare
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.evaluation.refer.evaluate import evaluate
from gap_export.evaluation.refer.results import EvalRun
from gap_export.precision import Thresholds
from gap_export.progress import SILENT, Prefixed, Progress
from gap_export.records import Amount, Change, Count, Flag, Number, Record, Share
from gap_export.runtime.backends import open_session

KEEPS = (1.0, 0.5, 0.35, 0.25, 0.15, 0.1)
"""Shares that are tried where nothing else is said."""

_WARMUP = 5
_NO_THRESHOLDS = Thresholds(max_accuracy_drop=1.0, min_prediction_agreement=0.0, min_box_iou=0.0)


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

    keep: Share
    mean_kept: Amount
    accuracy: Share
    difference: Change
    low: Change
    high: Change
    inside: Flag
    ttft_ms: Amount | None = None
    speedup: Amount | None = None


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
    max_accuracy_drop: Number
    expressions: Count
    points: tuple[Point, ...]
    chosen: Share | None

    @model_validator(mode="after")
    def _says_what_was_measured(self) -> Self:
        keeps = [point.keep for point in self.points]
        if len(keeps) < 2 or keeps != sorted(set(keeps), reverse=True):
            raise ValueError("points are not at least two shares, from the largest to the smallest")
        for point in self.points:
            if point.inside != (point.low >= -self.max_accuracy_drop):
                raise ValueError(
                    f"inside is {point.inside} at keep {point.keep:g}, where low is {point.low:g} and max_accuracy_drop "
                    f"{self.max_accuracy_drop:g}"
                )
        if self.chosen != min((point.keep for point in self.points[1:] if point.inside), default=None):
            raise ValueError(f"chosen {self.chosen} is not the smallest share inside")
        return self


def recommend(
    bundle: Bundle | Path | str,
    dataset: Dataset | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    max_accuracy_drop: float = 0.02,
    protocol: str = "unc",
    limit: int | None = None,
    requests: int = 30,
    backend: str = "onnxruntime",
    threads: int = 0,
    rescale_boxes: bool = False,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Recommendation:
    """The smallest share of visual tokens within the accuracy tolerance, and how much sooner its first token comes.

    The bundle is evaluated at every share (these evaluations lie beside it and are kept), then all shares answer in turn.

    Args:
        bundle: built with a range of shares.
        dataset: 2000 generated scenes with seven expressions each when left out.
        keeps: fractions of the visual tokens, at least two; losses are against the largest.
        max_accuracy_drop: loss that is allowed, with all of its 95 % interval.
        protocol: under which answers are scored.
        limit: only so many expressions.
        requests: per share, whose time is measured.
        backend: runtime.
        threads: of ONNX Runtime; 0 lets it choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations; refused otherwise.
        replace: throw evaluations of other settings away, for example those of another build.
        progress: told of every answer and every round.

    Returns:
        What was tried and which of it to take, also stored among the reports of the bundle.

    Raises:
        InputError: fewer than two shares, one that the bundle was not built for, or a data set without images.
        GapExportError: the bundle could not be asked.
    """
    bounds.check(max_accuracy_drop=max_accuracy_drop, limit=limit, requests=requests, threads=threads)
    shares = sorted(set(keeps), reverse=True)
    if len(shares) < 2:
        raise InputError(
            "is one fraction",
            subject=f"keep {', '.join(f'{share:g}' for share in shares)}",
            hint="give at least two: losses are against the largest",
        )
    opened = open_bundle(bundle)
    check_reports_can_be_written(opened, RECOMMENDATION)
    asked = dataset or open_dataset("scenes:7")
    asking = len(asked.expressions[:limit])
    progress.stage("evaluating", total=len(shares) * asking)
    runs = {
        share: evaluate(
            opened,
            asked,
            protocol=protocol,
            backend=backend,
            keep=share,
            limit=limit,
            threads=threads,
            rescale_boxes=rescale_boxes,
            replace=replace,
            progress=Prefixed(progress, f"keep {share:g}"),
        )
        for share in shares
    }
    with open_session(opened, backend, threads=threads) as session:
        candidates = [candidate(f"{share:g}", opened, session, keep=share) for share in shares]
        measured = measure(candidates, requests=requests, new_tokens=1, warmup=_WARMUP, progress=progress)
    times = {float(row.name): row.ttft_ms.p50 for row in measured.rows}
    found = choose(runs, max_accuracy_drop, manifest_sha256=opened.manifest_sha256, ttft_ms=times)
    found.write(opened.reports / RECOMMENDATION)
    return found


def choose(
    runs: Mapping[float, EvalRun],
    max_accuracy_drop: float,
    *,
    manifest_sha256: str,
    ttft_ms: Mapping[float, float] | None = None,
) -> Recommendation:
    """Choose a share.

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
        against = compare(first, runs[keep], _NO_THRESHOLDS, worst=0)
        points.append(
            Point(
                keep=keep,
                mean_kept=runs[keep].record.mean_kept,
                accuracy=against.subject_accuracy,
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
        protocol=first.record.protocol,
        max_accuracy_drop=max_accuracy_drop,
        expressions=len(first.ids),
        points=tuple(points),
        chosen=min(inside, default=None),
    )
