"""Scores of referring expression comprehension, each with the convention it was computed under.

Two evaluators give different numbers for the same boxes: at the threshold (Shikra and MiniGPT-v2
ask for IoU > 0.5, lmms-eval, InternVL and ConvLLaVA for >=) and in the area of a box (MiniGPT-v2 counts
pixels, both edges included). Hence no default for the comparator, and results carry it with them. All
arithmetic is float64.

A missing box (an answer that could not be read) is a row of NaN; its IoU is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gap_export.boxes.codecs import Area, Box, Comparator

Floats = NDArray[np.float64]

HIT_IOU = 0.5
"""The overlap at which a box hits, or two boxes agree, by custom: accuracy@0.5."""


@dataclass(frozen=True)
class Accuracy:
    """Share of boxes that hit.

    Attributes:
        value: hits / count.
        standard_error: sqrt(p (1 - p) / n); 0 at 0% and 100%, where `interval` says more.
        hits: boxes whose IoU passes.
        count: expressions, unreadable answers included.
        threshold: IoU that decides.
        comparator: whether IoU at the threshold passes.
    """

    value: float
    standard_error: float
    hits: int
    count: int
    threshold: float
    comparator: Comparator

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927), 95% by default; sound at 0% and 100% and for few cases."""
        n, p = self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class MeanIou:
    """Mean IoU and its standard error, sqrt(variance / n)."""

    value: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Accuracy of one run minus accuracy of another, over the same expressions.

    Attributes:
        value: the difference.
        low: lower end of its 95% interval.
        high: upper end.
        gained: expressions that only the first run hits.
        lost: expressions that only the second run hits.
        count: expressions.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int
    count: int


@dataclass(frozen=True)
class Agreement:
    """How far two runs gave the same boxes, whatever the truth.

    Attributes:
        value: share of rows that agree: IoU at least `threshold`, or no box in either run.
        identical: share of rows with exactly the same box, or no box in either run.
        mean_iou: over all rows, two missing boxes counting 1.
        lowest_iou: of the worst row.
        missing_in_one: rows where only one run gave a box.
        count: rows.
        threshold: IoU from which two boxes agree.
    """

    value: float
    identical: float
    mean_iou: float
    lowest_iou: float
    missing_in_one: int
    count: int
    threshold: float


def as_rows(boxes: Sequence[Box | None]) -> Floats:
    """[N, 4] float64 of boxes; None becomes a row of NaN."""
    return np.array([(np.nan,) * 4 if box is None else box for box in boxes], np.float64).reshape(-1, 4)


def iou(first: ArrayLike, second: ArrayLike, *, area: Area = "continuous") -> Floats:
    """Intersection over union, row by row.

    Args:
        first: [..., 4] boxes (x1, y1, x2, y2).
        second: [..., 4], broadcast against `first`.
        area: `continuous` is (x2 - x1)(y2 - y1); `inclusive_pixels` is (x2 - x1 + 1)(y2 - y1 + 1) and makes
            sense for pixels only (MiniGPT-4's `computeIoU`).

    Returns:
        [...] float64 in 0..1. 0 where a box is not finite or inverted, and where neither box has area.
    """
    if area not in ("continuous", "inclusive_pixels"):
        raise ValueError(f"unknown area {area!r}")
    boxes_a, boxes_b = np.broadcast_arrays(np.asarray(first, np.float64), np.asarray(second, np.float64))
    if boxes_a.ndim == 0 or boxes_a.shape[-1] != 4:
        raise ValueError(f"boxes need four coordinates in the last axis, got shape {boxes_a.shape}")
    usable = _usable(boxes_a) & _usable(boxes_b)
    boxes_a, boxes_b = (np.where(usable[..., None], boxes, 0.0) for boxes in (boxes_a, boxes_b))
    edge = 1.0 if area == "inclusive_pixels" else 0.0
    overlap_from = np.maximum(boxes_a[..., :2], boxes_b[..., :2])
    overlap_to = np.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    intersection = np.prod(np.maximum(overlap_to - overlap_from + edge, 0.0), axis=-1)
    area_a, area_b = (
        np.prod(boxes[..., 2:] - boxes[..., :2] + edge, axis=-1) for boxes in (boxes_a, boxes_b)
    )
    union = area_a + area_b - intersection
    ratio = np.divide(intersection, union, out=np.zeros_like(union), where=usable & (union > 0.0))
    return np.asarray(np.clip(ratio, 0.0, 1.0), np.float64)


def accuracy(ious: ArrayLike, *, comparator: Comparator, threshold: float = HIT_IOU) -> Accuracy:
    """Share of rows whose IoU passes the threshold.

    Args:
        ious: [N], N >= 1; NaN is refused, because it would pass for a miss or for a hit depending on the
            comparator.
        comparator: `>` (Shikra, MiniGPT-v2) or `>=` (lmms-eval, InternVL, ConvLLaVA).
        threshold: IoU from which on a box is a hit.

    Raises:
        ValueError: no rows, NaN, an unknown comparator.
    """
    values = _rows_of(ious)
    if comparator == ">":
        hits = int(np.count_nonzero(values > threshold))
    elif comparator == ">=":
        hits = int(np.count_nonzero(values >= threshold))
    else:
        raise ValueError(f"unknown comparator {comparator!r}")
    share = hits / len(values)
    return Accuracy(
        value=share,
        standard_error=math.sqrt(share * (1 - share) / len(values)),
        hits=hits,
        count=len(values),
        threshold=threshold,
        comparator=comparator,
    )


def mean_iou(ious: ArrayLike) -> MeanIou:
    """Mean of [N] IoUs, N >= 1.

    Raises:
        ValueError: no rows, NaN.
    """
    values = _rows_of(ious)
    return MeanIou(float(values.mean()), float(values.std() / math.sqrt(len(values))), len(values))


def paired_difference(first: ArrayLike, second: ArrayLike, *, z: float = 1.96) -> Difference:
    """Compare the accuracy of two runs that answered the same expressions.

    What both hit and what both miss says nothing about the difference, so that the interval is narrower than that of two
    independent runs. It is Bonett and Price's (2012): Wald's with one expression added to either side, which is sound for
    few expressions and for runs that never disagree.

    Args:
        first: [N] bool, which expressions were hit, N >= 1.
        second: [N] bool, the same expressions in the same order.
        z: 1.96 for 95%.

    Raises:
        ValueError: different lengths, or no rows.
    """
    hits_a, hits_b = np.asarray(first, np.bool_), np.asarray(second, np.bool_)
    if hits_a.shape != hits_b.shape or hits_a.ndim != 1 or hits_a.size == 0:
        raise ValueError(f"expected two times [N] with N >= 1, got {hits_a.shape} and {hits_b.shape}")
    count = len(hits_a)
    gained, lost = int((hits_a & ~hits_b).sum()), int((hits_b & ~hits_a).sum())
    share_a, share_b = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    centre = share_a - share_b
    half = z * math.sqrt((share_a + share_b - centre * centre) / (count + 2))
    return Difference(
        value=(gained - lost) / count,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        gained=gained,
        lost=lost,
        count=count,
    )


def box_overlaps(first: Sequence[Box | None], second: Sequence[Box | None]) -> Floats:
    """[N] IoU of the boxes that two runs gave; 1 where they are the same, without area too, or where neither run gave one.

    Raises:
        ValueError: different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"runs of different length: {len(first)} and {len(second)}")
    same = np.array([a == b for a, b in zip(first, second, strict=True)], np.bool_)
    return np.where(same, 1.0, iou(as_rows(first), as_rows(second)))


def agreement(
    first: Sequence[Box | None], second: Sequence[Box | None], *, threshold: float = HIT_IOU
) -> Agreement:
    """Compare the boxes of two runs over the same expressions, e.g. of PyTorch and of an engine.

    Args:
        first: one box per expression, None where the answer could not be read.
        second: over the expressions of the first, in their order.
        threshold: IoU from which two boxes agree (`>=`).

    Raises:
        ValueError: different lengths, or no rows.
    """
    if not first:
        raise ValueError("no rows")
    overlaps = box_overlaps(first, second)
    same = [a == b for a, b in zip(first, second, strict=True)]
    missing_a, missing_b = (np.array([box is None for box in boxes]) for boxes in (first, second))
    return Agreement(
        value=float(np.mean(overlaps >= threshold)),
        identical=float(np.mean(same)),
        mean_iou=float(np.mean(overlaps)),
        lowest_iou=float(np.min(overlaps)),
        missing_in_one=int(np.count_nonzero(missing_a ^ missing_b)),
        count=len(first),
        threshold=threshold,
    )


def _usable(boxes: Floats) -> NDArray[np.bool_]:
    """[...] whether each of [..., 4] boxes is finite and not inverted."""
    finite = np.isfinite(boxes).all(axis=-1)
    ordered = (boxes[..., :2] <= boxes[..., 2:]).all(axis=-1)
    return np.asarray(finite & ordered)


def _rows_of(ious: ArrayLike) -> Floats:
    values = np.asarray(ious, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected [N] IoUs with N >= 1, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError("an IoU is NaN; a missing box has IoU 0")
    return values
