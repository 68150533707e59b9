"""Two runs over the same expressions: does one ground as the other does, and by how much may they differ?

Expressions about one image stand or fall together, so intervals come from resampling images, not expressions (cluster bootstrap;
Field and Welsh 2007). McNemar's test asks whether gains and losses could be a coin's (exact binomial, two-sided).
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gap_export import bounds
from gap_export.boxes import metrics
from gap_export.bundle.folder import MANIFEST, open_bundle
from gap_export.errors import InputError
from gap_export.evaluation.gates import GROUNDING, Gate, at_least, at_most, check_gates
from gap_export.evaluation.refer.results import PROVENANCE, EvalRun, open_run, read_provenance
from gap_export.files import is_file
from gap_export.precision import Thresholds
from gap_export.records import Change, Count, Record, Share

RESAMPLES = 10000


class Disagreement(Record):
    """One expression, by how far the boxes of both runs overlap."""

    id: str
    image: str
    iou: Share
    reference_hits: bool
    subject_hits: bool


class Comparison(Record):
    """A subject against the reference run.

    Attributes:
        protocol: of both.
        expressions: that both answered.
        images: that they are about.
        reference_accuracy: of the reference run.
        subject_accuracy: of the subject.
        difference: subject minus reference.
        low: lower end of its 95 % interval.
        high: upper end.
        gained: expressions that only the subject hits.
        lost: expressions that only the reference hits.
        mcnemar_p: of as many gains and losses, or fewer of the rarer kind, by chance.
        agreement: share of expressions whose two boxes overlap by half, or that have none in either run.
        mean_box_iou: of the two boxes.
        identical: share of expressions with exactly the same box.
        gates: what was demanded.
        worst: expressions whose boxes overlap least.
    """

    protocol: str
    expressions: Count
    images: Count
    reference_accuracy: Share
    subject_accuracy: Share
    difference: Change
    low: Change
    high: Change
    gained: Count
    lost: Count
    mcnemar_p: Share
    agreement: Share
    mean_box_iou: Share
    identical: Share
    gates: tuple[Gate, ...]
    worst: tuple[Disagreement, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return all(gate.passed for gate in self.gates)

    def raise_for_gates(self) -> None:
        """Go on only where every gate was met.

        Raises:
            GateError: one was not.
        """
        check_gates(self.gates, subject=f"{self.expressions} expressions under {self.protocol}")


def compare(
    reference: EvalRun | Path | str,
    subject: EvalRun | Path | str,
    thresholds: Thresholds | None = None,
    *,
    protocol: str = "unc",
    worst: int = 20,
    seed: int = 0,
) -> Comparison:
    """Compare a subject with the reference run, expression by expression.

    Args:
        reference: the run that the other is measured against, say PyTorch's or the unpruned model's; or its folder.
        subject: over the same expressions; or its folder.
        thresholds: that the subject must meet; `thresholds_on` when left out.
        protocol: of runs that are given as folders.
        worst: how many disagreements to name.
        seed: of the resampling.

    Raises:
        InputError: other expressions, other images or true boxes of the same ids, or no finished evaluation in a folder.
    """
    reference, subject = _opened(reference, protocol), _opened(subject, protocol)
    if thresholds is None:
        thresholds = thresholds_on(reference, subject)
    order = {identity: row for row, identity in enumerate(subject.ids)}
    if order.keys() != set(reference.ids):
        only = len(set(reference.ids) - order.keys()), len(order.keys() - set(reference.ids))
        raise InputError(
            f"answer different expressions: {only[0]} are only in the reference, {only[1]} only in the subject",
            subject=f"{reference.folder} and {subject.folder}",
            hint="compare runs over the same data, split and --limit",
        )
    picked = [order[identity] for identity in reference.ids]
    _check_same_questions(reference, subject, picked)
    hits, boxes = subject.hits[picked], [subject.boxes[row] for row in picked]
    change = hits.astype(np.float64) - reference.hits
    low, high = bootstrap_interval(change, reference.images, seed=seed)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    agreed = metrics.agreement(reference.boxes, boxes, threshold=metrics.HIT_IOU)
    overlaps = metrics.box_overlaps(reference.boxes, boxes)
    farthest = np.argsort(overlaps, kind="stable")[:worst]
    difference = float(change.mean())
    return Comparison(
        protocol=reference.record.protocol,
        expressions=len(change),
        images=len(set(reference.images)),
        reference_accuracy=float(reference.hits.mean()),
        subject_accuracy=float(hits.mean()),
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
                id=reference.ids[row],
                image=reference.images[row],
                iou=float(overlaps[row]),
                reference_hits=bool(reference.hits[row]),
                subject_hits=bool(hits[row]),
            )
            for row in farthest
            if overlaps[row] < 1
        ),
    )


def _check_same_questions(reference: EvalRun, subject: EvalRun, picked: list[int]) -> None:
    """Refuse ids that stand for something else in either run: other images, or other true boxes.

    Args:
        reference: one run.
        subject: the other.
        picked: its rows, in the order of the reference.

    Raises:
        InputError: one does.
    """
    for mine, theirs in enumerate(picked):
        what = ""
        if reference.images[mine] != subject.images[theirs]:
            what = f"about {reference.images[mine]} in one and {subject.images[theirs]} in the other"
        elif reference.rows and subject.rows and reference.rows[mine].truth != subject.rows[theirs].truth:
            what = f"of the box {reference.rows[mine].truth} in one and {subject.rows[theirs].truth} in the other"
        if what:
            raise InputError(
                f"expression {reference.ids[mine]} is {what}",
                subject=f"{reference.folder} and {subject.folder}",
                hint="compare runs over the same annotations, and images of the same size",
            )


def _opened(run: EvalRun | Path | str, protocol: str) -> EvalRun:
    return run if isinstance(run, EvalRun) else open_run(run, protocol)


def thresholds_on(reference: EvalRun, subject: EvalRun, **given: float | None) -> Thresholds:
    """What a subject must meet.

    Args:
        reference: the run that it is compared with.
        subject: the run.
        given: fields of `Thresholds`; None leaves one to its bundle's recipe where the reference is PyTorch over the same
            bundle, and otherwise to `GROUNDING`.

    Raises:
        InputError: a threshold that nothing could meet.
    """
    bounds.check(**given)
    base, bundle = GROUNDING, _bundle_folder(subject)
    if reference.record.backend == "torch" and bundle is not None and bundle == _bundle_folder(reference):
        base = open_bundle(bundle).manifest.gates
    try:
        return replace(base, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise InputError(
            str(error), subject="a threshold", hint="shares and IoUs are at most 1, losses at least 0"
        ) from error


def _bundle_folder(run: EvalRun) -> Path | None:
    """Of the bundle that answered, where it is still there."""
    if not os.path.lexists(run.folder / PROVENANCE):
        return None
    folder = read_provenance(run.folder).bundle
    return Path(folder) if folder is not None and is_file(Path(folder) / MANIFEST) else None


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
