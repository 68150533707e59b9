"""Scenes through a session: the answers that validation, calibration and sweeps are made of.

Shape letters: B batch, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from gap_export.boxes import metrics
from gap_export.boxes.codecs import Box
from gap_export.boxes.scenes import Case
from gap_export.positions import Ids, Placement
from gap_export.progress import SILENT, Progress
from gap_export.runtime.generate import Adjust
from gap_export.runtime.grounder import Grounded, Grounder
from gap_export.runtime.session import Session

Wrong = Callable[[Placement, Ids, Ids], Placement]
"""(placement, text tokens before the image [B], kept visual tokens [B]) -> a placement that is wrong on purpose."""


def run_cases(
    grounder: Grounder,
    session: Session,
    cases: Sequence[Case],
    *,
    batch: int,
    progress: Progress = SILENT,
    keep: float | None = None,
    adjust: Wrong | None = None,
    keep_logits: bool = False,
) -> list[Grounded]:
    """Answer all cases in batches.

    Args:
        grounder: of the bundle.
        session: whose answers are wanted.
        cases: in order.
        batch: rows per call.
        progress: told of every case that is answered.
        keep: fraction of the visual tokens to keep, where the bundle lets requests choose.
        adjust: for negative controls.
        keep_logits: needed to measure parity, not to measure accuracy.
    """
    results = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        images, expressions = _shown(part, grounder.images_per_prompt), [case.expression for case in part]
        change = None if adjust is None else _change(adjust, grounder.text_before(expressions))
        results.append(
            grounder.ground(session, images, expressions, keep=keep, adjust=change, keep_logits=keep_logits)
        )
        progress.advance(len(part))
    return results


def _shown(cases: Sequence[Case], per_prompt: int) -> list[Image.Image]:
    """The images of every prompt: a case's own comes last, after those of the cases before it."""
    return [
        cases[(number - back) % len(cases)].image
        for number in range(len(cases))
        for back in range(per_prompt - 1, -1, -1)
    ]


def _change(adjust: Wrong, text_before: Ids) -> Adjust:
    return lambda placement, visual: adjust(placement, text_before, counts_of(visual.kept_indices))


def counts_of(kept_BK: Ids) -> Ids:
    """[B] int64: how many visual tokens each row keeps; the rest is padding."""
    return np.asarray((kept_BK >= 0).sum(axis=1), np.int64)


def boxes_of(runs: Sequence[Grounded]) -> list[Box | None]:
    """One box per case; see `Grounded.boxes`."""
    return [box for run in runs for box in run.boxes]


def accuracy_of(runs: Sequence[Grounded], cases: Sequence[Case]) -> float:
    """Accuracy@0.5 (IoU >= 0.5) against the true boxes; an answer without a box is a miss."""
    overlaps = metrics.iou(metrics.as_rows(boxes_of(runs)), metrics.as_rows([case.box for case in cases]))
    return metrics.accuracy(overlaps, comparator=">=").value
