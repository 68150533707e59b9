"""How an answer is scored. Numbers of different protocols do not compare, so each is stored with its protocol's name.

    protocol     boxes are read in                       a box hits with                             published by
    unc          the frame that the model writes them in  IoU > or >= 0.5, as the model's own paper   RefCOCO's authors (UNC splits)
    lmms-eval    the image's width and height           IoU >= 0.5                                  lmms-eval's refcoco_bbox_rec tasks

`lmms-eval` reads boxes of the padded square, which is what LLaVA writes, as if they were of the image: a perfect model scores 93.36 on
RefCOCO val. The figures of the GAP paper are most probably of this kind. It has splits of its own, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gap_export.boxes import metrics
from gap_export.boxes.codecs import (
    CODECS,
    Area,
    Box,
    Comparator,
    Frame,
    Size,
    Unparsable,
    from_pixels,
    to_pixels,
)
from gap_export.bundle.manifest import BoxFormat
from gap_export.errors import InputError

ProtocolName = Literal["unc", "lmms-eval"]
NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    Attributes:
        name: as stored.
        codec: key in `CODECS`, which reads answers.
        frame: what 0..1 of a box spans.
        comparator: whether IoU at the threshold hits.
        area: how boxes are measured.
    """

    name: ProtocolName
    codec: str
    frame: Frame
    comparator: Comparator
    area: Area

    @property
    def description(self) -> str:
        """Frame, threshold and area, for people."""
        measured = ", both edges counted" if self.area == "inclusive_pixels" else ""
        return f"{self.name}: boxes of the {self.frame.replace('_', ' ')}, IoU {self.comparator} {metrics.HIT_IOU}{measured}"


@dataclass(frozen=True)
class Score:
    """One answer, scored.

    Attributes:
        box: in pixels of the image, clamped to it; None where the answer holds none.
        reason: why there is none.
        iou: with the true box; 0 without one.
        hit: whether that passes.
    """

    box: Box | None
    reason: str | None
    iou: float
    hit: bool


def protocol_of(name: str, box: BoxFormat) -> Protocol:
    """The protocol of that name, for models that write boxes so.

    Raises:
        InputError: there is none.
    """
    if name == "unc":
        return Protocol(
            name="unc",
            codec=box.codec,
            frame=box.frame,
            comparator=CODECS[box.codec].comparator,
            area=CODECS[box.codec].area,
        )
    if name == "lmms-eval":
        return Protocol(name="lmms-eval", codec=box.codec, frame="image", comparator=">=", area="continuous")
    raise InputError("is not a protocol", subject=repr(name), hint=f"choose one of {', '.join(NAMES)}")


def score(answer: str, truth: Box, size: Size, protocol: Protocol, *, seen: Size | None = None) -> Score:
    """Score one answer.

    Args:
        answer: text.
        truth: in pixels of the image.
        size: of the image.
        protocol: how.
        seen: size of the image as the model sees it, for codecs that write pixels.
    """
    box = CODECS[protocol.codec].decode_one(answer, seen)
    if isinstance(box, Unparsable):
        return Score(None, box.reason, 0.0, False)
    pixels = to_pixels(box, protocol.frame, *size, clamp=True)
    # lmms-eval compares normalised boxes. An overlap does not depend on the unit, but for rounding, which decides at the threshold.
    compared = (box, from_pixels(truth, "image", *size)) if protocol.name == "lmms-eval" else (pixels, truth)
    overlap = float(metrics.iou(np.array(compared[0]), np.array(compared[1]), area=protocol.area))
    hit = overlap > metrics.HIT_IOU if protocol.comparator == ">" else overlap >= metrics.HIT_IOU
    return Score(pixels, None, overlap, hit)
