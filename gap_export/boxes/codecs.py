"""How models write a box, and in which frame it is meant.

A box is (x1, y1, x2, y2). A codec knows the text, a frame knows the image:

    codec        text                                  several boxes   source
    llava        [0.12, 0.30, 0.55, 0.90]              the first       lmms-eval's and ConvLLaVA's evaluators
    shikra       [0.123,0.300,0.550,0.900]             refused         Shikra's REC metric
    minigpt_v2   {<12><30><55><90>}                    refused         MiniGPT-4's eval_ref.py
    internvl     <box>[[123, 300, 550, 900]]</box>     the first       InternVL's evaluate_grounding.py
    qwen2_vl     <|box_start|>(123,300),(550,900)      the first       Qwen2-VL (arXiv 2409.12191), section 2.2
                 <|box_end|>
    qwen2_5_vl   {"bbox_2d": [79, 129, 352, 387]}      the first       Qwen2.5-VL's notebook on grounding
    qwen3_vl     {"bbox_2d": [123, 300, 550, 900]}     the first       Qwen3-VL's notebook on grounding
    box_start_   <|box_start|>(79,129),(352,387)       the first       models that were tuned further
    pixels       <|box_end|>
    list_pixels  [79, 129, 352, 387]                   the first       models that were tuned further
    bbox_pixels  {"bbox": [79, 129, 352, 387]}         the first       the same; the key may be bbox_2d
    bbox_1000    {"bbox": [123, 300, 550, 900]}        the first       the same; the key may be bbox_2d

    frame           0..1 spans
    image           the image's own width and height
    padded_square   the square of the longer side, the image centred on it with offset (max - min) // 2

Qwen2.5-VL writes pixels of the image as it sees it, scaled by its preprocessing, and so do the codecs of pixels. So they must be told that
size (`seen`).

What is read here is what `run` draws; how published evaluators read answers, each strictly in its way, is in
`evaluation.refer.published`.

Normalised boxes in the wrong frame look plausible and score low; nothing in the text tells the frame.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gap_export.errors import InputError, shown
from gap_export.inputs.square import padding

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, normalised or in pixels."""

Size = tuple[int, int]
"""(width, height) in pixels."""

Frame = Literal["padded_square", "image"]

Comparator = Literal[">", ">="]
"""Whether an overlap of exactly the threshold is no hit, or one."""

Area = Literal["continuous", "inclusive_pixels"]
"""Width times height, or both edges counted: (width + 1) times (height + 1) pixels."""

# ------------------------------------------------------------------------------------------------------------
# Codecs


@dataclass(frozen=True)
class Unparsable:
    """An answer from which no box could be read. It counts as a miss, and the reason can be reported.

    Attributes:
        text: the whole answer.
        reason: what is wrong with it.
    """

    text: str
    reason: str


@dataclass(frozen=True)
class BoxCodec:
    """Reads and writes boxes the way one model family does.

    Attributes:
        name: key in `CODECS`.
        pattern: finds one box, or one group of boxes, in an answer; its numbers are those of its group, where it has one.
        unit: the number that stands for the far edge of the frame; None where that is the size of the image as seen.
        write: box in those numbers -> text.
        several: what an answer with more than one box means: the first counts, or the answer is refused.
        fractions: whether numbers that sum to less than 4 are fractions of the frame, whatever the unit.
        frame: in which answers are meant of which nothing but the codec is known.
        comparator: how an overlap is compared with the threshold, for codecs without a published evaluator
            (`evaluation.refer.published` has those that there are).
        area: how boxes are measured, for the same codecs.
    """

    name: str
    pattern: re.Pattern[str]
    unit: float | None
    write: Callable[[Box], str]
    several: Literal["first", "refuse"]
    fractions: bool = False
    frame: Frame = "image"
    comparator: Comparator = ">="
    area: Area = "continuous"

    @property
    def pixels(self) -> bool:
        """Whether numbers are pixels of the image as the model sees it."""
        return self.unit is None

    @property
    def example(self) -> str:
        """A box as this codec writes it; of an image of 640 by 480 pixels, where it writes pixels."""
        return self.encode(_EXAMPLE, _EXAMPLE_SIZE)

    def encode(self, box: Box, seen: Size | None = None) -> str:
        """Text of a normalised box.

        Args:
            box: to be written.
            seen: size of the image as the model sees it; codecs that write pixels need it.

        Raises:
            ValueError: a coordinate that is not finite or not within 0..1, or an inverted box; no size where it is needed.
        """
        fault = _fault(box)
        if fault is None and not all(0.0 <= value <= 1.0 for value in box):
            fault = "leaves its frame"
        if fault:
            raise ValueError(f"box {box} {fault}")
        across, down = self._units(seen)
        x1, y1, x2, y2 = (abs(value) for value in box)  # -0.0 would be written with its sign
        return self.write((x1 * across, y1 * down, x2 * across, y2 * down))

    def decode(self, text: str, seen: Size | None = None) -> tuple[Box, ...] | Unparsable:
        """All boxes of an answer, normalised, in the order in which they are written.

        Args:
            text: the answer.
            seen: size of the image as the model sees it; codecs that read pixels need it.

        Returns:
            At least one box, which may leave 0..1: models overshoot a little, and whoever draws cuts at the edge of the image. Or
            `Unparsable` if there is none, or if one that counts is inverted or not finite. Where the first box alone counts, unsound
            later ones are left out.
        """
        across, down = self._units(seen)
        boxes: list[Box] = []
        for match in self.pattern.finditer(text):
            # (0.0 is added because -0 would keep its sign.)
            numbers = [float(number) for number in _NUMBER.findall(match.group(match.lastindex or 0))]
            x, y = (1.0, 1.0) if self.fractions and sum(numbers) < 4 else (across, down)
            boxes.extend(
                (x1 / x + 0.0, y1 / y + 0.0, x2 / x + 0.0, y2 / y + 0.0)
                for x1, y1, x2, y2 in zip(*[iter(numbers)] * 4, strict=True)
            )
        if not boxes:
            return Unparsable(text, f"no box of the form {self.example}")
        for box in boxes[:1] if self.several == "first" else boxes:
            fault = _fault(box)
            if fault:
                return Unparsable(text, f"box {box} {fault}")
        return tuple(box for box in boxes if not _fault(box))

    def decode_one(self, text: str, seen: Size | None = None) -> Box | Unparsable:
        """The one box that answers a referring expression.

        Args:
            text: the answer.
            seen: size of the image as the model sees it; codecs that read pixels need it.

        Returns:
            The box; or `Unparsable`, also where several boxes stand and the family's protocol accepts only
            one.
        """
        boxes = self.decode(text, seen)
        if isinstance(boxes, Unparsable):
            return boxes
        if len(boxes) > 1 and self.several == "refuse":
            return Unparsable(text, f"{len(boxes)} boxes where one is expected")
        return boxes[0]

    def _units(self, seen: Size | None) -> tuple[float, float]:
        """The numbers that stand for the far edges, across and down."""
        if self.unit is not None:
            return self.unit, self.unit
        if seen is None:
            raise ValueError(f"boxes of {self.name} are in pixels of the image as seen, whose size is needed")
        return float(seen[0]), float(seen[1])


def _fault(box: Box) -> str | None:
    """What makes a normalised box unusable, or None."""
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box):
        return "is not finite"
    if x1 > x2 or y1 > y2:
        return "is inverted"
    return None


def _write_llava(box: Box) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def _write_shikra(box: Box) -> str:
    return "[" + ",".join(f"{value:.3f}" for value in box) + "]"


def _write_minigpt_v2(box: Box) -> str:
    # Truncated, as the training boxes were; the 1e-9 keeps 0.29 * 100 = 28.999... at 29.
    return "{" + "".join(f"<{int(value + 1e-9)}>" for value in box) + "}"


def _write_internvl(box: Box) -> str:
    return f"<box>[{_write_list(box)}]</box>"


def _write_qwen2_vl(box: Box) -> str:
    x1, y1, x2, y2 = (round(value) for value in box)
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def _write_list(box: Box) -> str:
    return "[" + ", ".join(str(round(value)) for value in box) + "]"


def _write_bbox_2d(box: Box) -> str:
    return '{"bbox_2d": ' + _write_list(box) + "}"


def _write_bbox(box: Box) -> str:
    return '{"bbox": ' + _write_list(box) + "}"


_LONGEST_NAME = 100
_EXAMPLE: Box = (0.1, 0.2, 0.3, 0.4)
_EXAMPLE_SIZE: Size = (640, 480)
_DECIMAL = r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(_DECIMAL)
_FOUR = rf"{_DECIMAL}(?:\s*,\s*{_DECIMAL}){{3}}"
_POINT = rf"\(\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*\)"
_LIST = re.compile(rf"\[\s*{_FOUR}\s*\]")
_BBOX_2D = re.compile(rf"[\"']bbox_2d[\"']\s*:\s*\[\s*({_FOUR})\s*\]")
_BBOX = re.compile(rf"[\"']bbox(?:_2d)?[\"']\s*:\s*\[\s*({_FOUR})\s*\]")

CODECS: dict[str, BoxCodec] = {}
"""name -> codec. Names are what `BoxFormat.codec` stores and `--box-format` takes; `register` adds to them."""


def box_codec(name: str) -> BoxCodec:
    """The codec of that name.

    Args:
        name: key in `CODECS`.

    Raises:
        InputError: there is none; the message names the nearest, and the hint all.
    """
    if name in CODECS:
        return CODECS[name]
    near = difflib.get_close_matches(name[:_LONGEST_NAME], CODECS, n=1)
    raise InputError(
        "is not a box format" + (f"; did you mean {near[0]!r}?" if near else ""),
        subject=shown(name),
        hint=f"box formats: {', '.join(CODECS)}",
    )


def known(name: str) -> str:
    """The name itself: what pydantic's validators of stored fields call.

    Args:
        name: key in `CODECS`.

    Raises:
        ValueError: there is no such codec.
    """
    try:
        return box_codec(name).name
    except InputError as error:
        raise ValueError(f"{error.message} ({error.hint})") from error


def register(codec: BoxCodec) -> None:
    """Add a codec to the table.

    Raises:
        ValueError: there is one of that name.
    """
    if codec.name in CODECS:
        raise ValueError(f"a box codec named {codec.name!r} is in the table already")
    CODECS[codec.name] = codec


for _codec in (
    BoxCodec("llava", _LIST, 1.0, _write_llava, "first", frame="padded_square"),
    BoxCodec(
        "shikra",
        re.compile(rf"\[\s*{_FOUR}(?:\s*;\s*{_FOUR})*\s*\]"),
        1.0,
        _write_shikra,
        "refuse",
        frame="padded_square",
    ),
    BoxCodec(
        "minigpt_v2",
        re.compile(r"\{\s*(?:<\s*\d{1,3}\s*>\s*){4}\}"),
        100.0,
        _write_minigpt_v2,
        "refuse",
    ),
    # The tags are special tokens, and those at the end of an answer are dropped before it is read.
    BoxCodec("internvl", _LIST, 1000.0, _write_internvl, "first", fractions=True),
    # The same goes for its tags.
    BoxCodec("qwen2_vl", re.compile(rf"{_POINT}\s*,\s*{_POINT}"), 1000.0, _write_qwen2_vl, "first"),
    BoxCodec("qwen2_5_vl", _BBOX_2D, None, _write_bbox_2d, "first"),
    BoxCodec("qwen3_vl", _BBOX_2D, 1000.0, _write_bbox_2d, "first"),
    BoxCodec("box_start_pixels", re.compile(rf"{_POINT}\s*,\s*{_POINT}"), None, _write_qwen2_vl, "first"),
    BoxCodec("list_pixels", _LIST, None, _write_list, "first"),
    BoxCodec("bbox_pixels", _BBOX, None, _write_bbox, "first"),
    BoxCodec("bbox_1000", _BBOX, 1000.0, _write_bbox, "first"),
):
    register(_codec)

# ------------------------------------------------------------------------------------------------------------
# Frames


def to_pixels(box: Box, frame: Frame, width: int, height: int, *, clamp: bool = False) -> Box:
    """A normalised box in pixels of the original image.

    Args:
        box: normalised in `frame`; may leave 0..1.
        frame: what 0..1 spans.
        width: of the image, pixels.
        height: of the image, pixels.
        clamp: cut to the image. A box that lies wholly in the padding becomes one without area on the edge.

    Returns:
        (x1, y1, x2, y2) in pixels, not rounded.

    Raises:
        ValueError: a coordinate that is not finite, an inverted box, an image without area.
    """
    span_x, span_y, left, top = _spans(frame, width, height)
    x1, y1, x2, y2 = _ordered(box)
    pixels = (x1 * span_x - left, y1 * span_y - top, x2 * span_x - left, y2 * span_y - top)
    return _clamped(pixels, width, height) if clamp else pixels


def from_pixels(box: Box, frame: Frame, width: int, height: int, *, clamp: bool = False) -> Box:
    """A box in pixels of the original image, normalised.

    Args:
        box: in pixels; may leave the image.
        frame: what 0..1 shall span.
        width: of the image, pixels.
        height: of the image, pixels.
        clamp: cut to the frame, 0..1.

    Returns:
        (x1, y1, x2, y2) normalised; the inverse of `to_pixels` up to float64 rounding.

    Raises:
        ValueError: as `to_pixels`.
    """
    span_x, span_y, left, top = _spans(frame, width, height)
    x1, y1, x2, y2 = _ordered(box)
    normalised = ((x1 + left) / span_x, (y1 + top) / span_y, (x2 + left) / span_x, (y2 + top) / span_y)
    return _clamped(normalised, 1, 1) if clamp else normalised


def _spans(frame: Frame, width: int, height: int) -> tuple[int, int, int, int]:
    """(pixels of 0..1 across, down, pixels left of the image, above it)."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no area")
    if frame == "image":
        return width, height, 0, 0
    if frame == "padded_square":
        side, left, top = padding(width, height)
        return side, side, left, top
    raise ValueError(f"unknown frame {frame!r}")


def _ordered(box: Box) -> Box:
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box):
        raise ValueError(f"box {box} is not finite")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"box {box} is inverted")
    return box


def _clamped(box: Box, width: float, height: float) -> Box:
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )
