"""How an answer is scored. Numbers of different protocols do not compare, so each is stored with its protocol's name.

    protocol     an answer is scored by                                        splits published by
    unc          the evaluator of the authors of the model's family            RefCOCO's authors (UNC)
    lmms-eval    lmms-eval's refcoco_bbox_rec tasks, whatever the family        lmms-eval

`published` says what each of these evaluators does. `lmms-eval` reads boxes of the padded square, which is what LLaVA writes, as if they
were of the image: a perfect model scores 93.36 on RefCOCO val. The figures of the GAP paper are most probably of this kind. Boxes that are
not fractions in square brackets are misses under it, so that it is 0 for families that write them otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from gap_export.boxes import metrics
from gap_export.boxes.codecs import CODECS, Box, Frame, Size
from gap_export.bundle.manifest import BoxFormat
from gap_export.errors import InputError
from gap_export.evaluation.refer.published import LMMS_EVAL, Metric, Target, metric_of

ProtocolName = Literal["unc", "lmms-eval"]
NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    Attributes:
        name: as stored.
        metric: of the evaluator that is followed.
        frame: what 0..1 of a box spans.
        codec: key in `CODECS`, by which the model writes boxes.
    """

    name: ProtocolName
    metric: Metric
    frame: Frame
    codec: str

    @property
    def description(self) -> str:
        """Evaluator, frame, threshold and area, for people."""
        by = "" if self.metric.name == self.name else f" ({self.metric.name})"
        measured = ", both edges counted" if self.metric.area == "inclusive_pixels" else ""
        reads = "" if self.reads_the_codec else f"; boxes as {self.codec} writes them are not read"
        frame = self.frame.replace("_", " ")
        return f"{self.name}{by}: boxes of the {frame}, IoU {self.metric.comparator} {metrics.HIT_IOU}{measured}{reads}"

    @property
    def reads_the_codec(self) -> bool:
        """Whether the evaluator takes boxes as the model writes them for what they are."""
        if self.metric is not LMMS_EVAL:
            return True
        numbers = self.metric.read(CODECS[self.codec].example)
        return numbers is not None and all(0.0 <= number <= 1.0 for number in numbers)


@dataclass(frozen=True)
class Score:
    """One answer, scored.

    Attributes:
        box: in pixels of the image, as the evaluator places it, so that it may leave the image; None where the answer holds none, or
            one that is inverted or not finite.
        reason: why there is none.
        iou: with the true box; 0 without one.
        hit: whether that passes.
    """

    box: Box | None
    reason: str | None
    iou: float
    hit: bool


def check_protocol(name: str) -> None:
    """Refuse what is no name of a protocol: files are called by it.

    Raises:
        InputError: there is none.
    """
    if name not in NAMES:
        raise InputError("is not a protocol", subject=repr(name), hint=f"choose one of {', '.join(NAMES)}")


def protocol_of(name: str, box: BoxFormat) -> Protocol:
    """The protocol of that name, for models that write boxes so.

    Raises:
        InputError: there is none.
    """
    check_protocol(name)
    if name == "unc":
        return Protocol("unc", metric_of(CODECS[box.codec]), box.frame, box.codec)
    return Protocol("lmms-eval", LMMS_EVAL, "image", box.codec)


def score(answer: str, truth: Box, size: Size, protocol: Protocol, *, seen: Size | None = None) -> Score:
    """Score one answer.

    Args:
        answer: text.
        truth: in pixels of the image.
        size: of the image.
        protocol: how.
        seen: size of the image as the model sees it, for evaluators that need it.
    """
    metric = protocol.metric
    numbers = metric.read(answer)
    if numbers is None:
        return Score(None, f"no box that {metric.name} reads", 0.0, False)
    box, overlap = metric.judge(numbers, Target(truth, size, protocol.frame, seen))
    hit = overlap > metrics.HIT_IOU if metric.comparator == ">" else overlap >= metrics.HIT_IOU
    # (NaN, of boxes without area, is no hit.)
    overlap = max(0.0, overlap) if math.isfinite(overlap) else 0.0
    if not all(map(math.isfinite, box)):
        return Score(None, f"the box {numbers} is not finite", overlap, hit)
    if box[0] > box[2] or box[1] > box[3]:
        return Score(None, f"the box {numbers} is inverted", overlap, hit)
    return Score(box, None, overlap, hit)
