"""Two runs over the same expressions: does one ground as the other does, and by how much may they differ?

Expressions about one image stand or fall together, so intervals come from resampling images, not expressions (cluster bootstrap;
Field and Welsh 2007). McNemar's test asks whether gains and losses could be a coin's (exact binomial, two-sided).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.boxes import metrics
from gap_export.boxes.codecs import Box
from gap_export.bundle.folder import MANIFEST, open_bundle
from gap_export.errors import InputError, first_line
from gap_export.evaluation.gates import GROUNDING, Gate, at_least, at_most
from gap_export.evaluation.refer.provenance import FILE as PROVENANCE
from gap_export.evaluation.refer.provenance import read_provenance
from gap_export.precision import Thresholds
from gap_export.records import Record

RESAMPLES = 10000
AGREES_FROM = 0.5


@dataclass(frozen=True)
class Run:
    """Results of an evaluation under one protocol.

    Attributes:
        folder: where they lie.
        record: of the evaluation.
        ids: of the expressions.
        images: that they are about.
        hits: [N] bool.
        boxes: None without one.
    """

    folder: Path
    record: dict[str, Any]
    ids: list[str]
    images: list[str]
    hits: NDArray[np.bool_]
    boxes: list[Box | None]


class Disagreement(Record):
    """One expression, by how far the boxes of both runs overlap."""

    id: str
    image: str
    iou: float
    first_hits: bool
    second_hits: bool


class Comparison(Record):
    """Second run against first.

    Attributes:
        protocol: of both.
        expressions: that both answered.
        images: that they are about.
        first_accuracy: of the first run.
        second_accuracy: of the second.
        difference: second minus first.
        low: lower end of its 95 % interval.
        high: upper end.
        gained: expressions that only the second run hits.
        lost: expressions that only the first run hits.
        mcnemar_p: of as many gains and losses, or fewer of the rarer kind, by chance.
        agreement: share of expressions whose two boxes overlap by half, or that have none in either run.
        mean_box_iou: of the two boxes.
        identical: share of expressions with exactly the same box.
        gates: what was required.
        worst: expressions whose boxes overlap least.
    """

    protocol: str
    expressions: int
    images: int
    first_accuracy: float
    second_accuracy: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    mcnemar_p: float
    agreement: float
    mean_box_iou: float
    identical: float
    gates: tuple[Gate, ...]
    worst: tuple[Disagreement, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return all(gate.passed for gate in self.gates)


def open_run(folder: Path, protocol: str) -> Run:
    """Read an evaluation.

    Raises:
        InputError: none there, not finished, or not under this protocol.
    """
    from pyarrow import ArrowException, parquet

    path, record = folder / f"{protocol}-results.parquet", folder / f"{protocol}-eval.json"
    if not (path.is_file() and record.is_file()):
        raise InputError(
            f"holds no finished evaluation under {protocol}",
            subject=str(folder),
            hint="run gap-export eval with this --protocol and -o; it continues where it was stopped",
        )
    try:
        rows = parquet.read_table(path, columns=["id", "image", "hit", "box"]).to_pylist()
        stored = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(
            f"cannot be read: {first_line(error)}",
            subject=str(path),
            hint="run the evaluation again",
        ) from error
    return Run(
        folder=folder,
        record=stored,
        ids=[row["id"] for row in rows],
        images=[row["image"] for row in rows],
        hits=np.array([row["hit"] for row in rows], np.bool_),
        boxes=[None if row["box"] is None else tuple(row["box"]) for row in rows],
    )


def compare(first: Run, second: Run, thresholds: Thresholds, *, worst: int = 20, seed: int = 0) -> Comparison:
    """Hold the second run against the first.

    Args:
        first: the reference run, such as PyTorch, or the unpruned model.
        second: over the same expressions.
        thresholds: that the second must meet.
        worst: how many disagreements to name.
        seed: of the resampling.

    Raises:
        InputError: other expressions.
    """
    order = {identity: row for row, identity in enumerate(second.ids)}
    if order.keys() != set(first.ids):
        only = len(set(first.ids) - order.keys()), len(order.keys() - set(first.ids))
        raise InputError(
            f"answer different expressions: {only[0]} are only in the first, {only[1]} only in the second",
            subject=f"{first.folder} and {second.folder}",
            hint="compare runs over the same data, split and --limit",
        )
    picked = [order[identity] for identity in first.ids]
    hits, boxes = second.hits[picked], [second.boxes[row] for row in picked]
    change = hits.astype(np.float64) - first.hits
    low, high = bootstrap_interval(change, first.images, seed=seed)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    agreed = metrics.agreement(first.boxes, boxes, threshold=AGREES_FROM)
    overlaps = metrics.box_overlaps(first.boxes, boxes)
    farthest = np.argsort(overlaps, kind="stable")[:worst]
    difference = float(change.mean())
    return Comparison(
        protocol=first.record["protocol"],
        expressions=len(change),
        images=len(set(first.images)),
        first_accuracy=float(first.hits.mean()),
        second_accuracy=float(hits.mean()),
        difference=difference,
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        agreement=agreed.value,
        mean_box_iou=agreed.mean_iou,
        identical=agreed.identical,
        gates=(
            at_most("max_accuracy_drop", 0.0 - difference, thresholds.max_accuracy_drop),
            at_least("min_prediction_agreement", agreed.value, thresholds.min_prediction_agreement),
            at_least("min_box_iou", agreed.mean_iou, thresholds.min_box_iou),
        ),
        worst=tuple(
            Disagreement(
                id=first.ids[row],
                image=first.images[row],
                iou=float(overlaps[row]),
                first_hits=bool(first.hits[row]),
                second_hits=bool(hits[row]),
            )
            for row in farthest
            if overlaps[row] < 1
        ),
    )


def thresholds_on(first: Run, second: Run, **given: float | None) -> Thresholds:
    """What the second run must meet.

    Args:
        first: that it is held against.
        second: the run.
        given: fields of `Thresholds`; None leaves one to its bundle's recipe where the first run is PyTorch's over the same
            bundle, and otherwise to `GROUNDING`.

    Raises:
        InputError: a threshold that nothing could meet.
    """
    base, bundle = GROUNDING, _bundle_folder(second)
    if first.record["backend"] == "torch" and bundle is not None and bundle == _bundle_folder(first):
        base = open_bundle(bundle).manifest.gates
    try:
        return replace(base, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise InputError(
            str(error), subject="a threshold", hint="shares and IoUs are at most 1, losses at least 0"
        ) from error


def _bundle_folder(run: Run) -> Path | None:
    """Of the bundle that answered, where it is still there."""
    if not (run.folder / PROVENANCE).is_file():
        return None
    folder = read_provenance(run.folder).bundle
    return Path(folder) if folder is not None and (Path(folder) / MANIFEST).is_file() else None


def bootstrap_interval(
    change_N: NDArray[np.float64], images: list[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the mean, by resampling images with all that was asked about them.

    Args:
        change_N: of every expression.
        images: [N] that they are about.
        seed: of the draws.
        resamples: how many.
    """
    _, image_N = np.unique(np.array(images), return_inverse=True)
    sums, counts = np.bincount(image_N, weights=change_N), np.bincount(image_N)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # in pieces: 10000 draws of 1500 images need not be held at once
        drawn = rng.integers(0, len(sums), (min(500, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p: as lopsided a split of gains and losses, or more, of a fair coin (McNemar 1947)."""
    total = gained + lost
    if total == 0:
        return 1.0
    tail = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(min(gained, lost) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, tail)))
