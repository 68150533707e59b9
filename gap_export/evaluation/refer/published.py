r"""Scores as published evaluators compute them, number for number: what is read from an answer, where the box lies, what hits.

    codec        evaluator                                            reads                                       hits
    llava        ConvLLaVA, llava/eval/evaluate_grounding.py          the first [a,b,c,d], anything float() takes   >= 0.5
    shikra       Shikra, mllm/.../single_image_dataset/rec.py         [d.d,d.d,d.d,d.d], no space; one box alone    >  0.5
    minigpt_v2   MiniGPT-4, eval_scripts/eval_ref.py                  {<1><2><3><4>} at the start, no other number  >  0.5
    internvl     InternVL, internvl_chat/eval/refcoco/                as ConvLLaVA                                >= 0.5
                 evaluate_grounding.py
    qwen2_vl     Qwen-VL, eval_mm/evaluate_grounding.py               the first (a,b),(c,d), no space between       >= 0.5
    qwen2_5_vl   Qwen2.5-VL, cookbooks/spatial_understanding.ipynb    bbox_2d of the first object of a literal      >= 0.5
    qwen3_vl     Qwen3-VL, cookbooks/2d_grounding.ipynb               the same                                    >= 0.5
    (all)        lmms-eval, lmms_eval/tasks/refcoco/utils_rec.py      the first [a, b, c, d] of plain decimals      >= 0.5

None of them cuts a box at the edge of the image, and none takes one whose corners are exchanged for a hit; Qwen2.5-VL's authors cut boxes
(QwenLM/Qwen3-VL, issue 1035). ConvLLaVA and InternVL take numbers that sum to less than 4 for fractions of the frame, and others for
thousandths.

Codecs that are not named here have no evaluator: of models that were tuned further, and from outside the package. `unc` reads them as `run`
does, takes the box where it lies, uncut, and counts a hit by the row of the codec (`comparator`, `area`).

Qwen2-VL and its successors have no published evaluator. Qwen2-VL is read and compared as Qwen-VL is, in thousandths as its paper says
(arXiv 2409.12191, section 2.2; Qwen-VL's evaluator divides by 999). Of the others, boxes are read and placed as in the authors' notebooks.

The arithmetic decides at the threshold, so it is theirs as well: float32 where they compute in tensors, float64 where in Python's floats.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.boxes.codecs import (
    CODECS,
    Area,
    Box,
    BoxCodec,
    Comparator,
    Frame,
    Size,
    Unparsable,
    from_pixels,
    to_pixels,
)
from gap_export.boxes.metrics import iou
from gap_export.inputs.square import padding

Numbers = tuple[float, float, float, float]
"""Of a box, as an answer writes them; in no way checked."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """What an answer is compared with.

    Attributes:
        box: the true one, in pixels of the image.
        size: of the image.
        frame: that the model writes boxes in.
        seen: size of the image as the model sees it, where it is known.
    """

    box: Box
    size: Size
    frame: Frame
    seen: Size | None


@dataclass(frozen=True)
class Metric:
    """One evaluator.

    Attributes:
        name: for people.
        read: answer -> the numbers of the box that counts; None where the evaluator finds none.
        judge: (numbers, target) -> (box in pixels of the image, its overlap with the true one). The box may leave the image, and be
            inverted or not finite, as the answer has it.
        comparator: whether an overlap of exactly the threshold hits.
        area: how boxes are measured, for people.
        needs_seen: whether boxes are pixels of the image as the model sees it.
    """

    name: str
    read: Callable[[str], Numbers | None]
    judge: Callable[[Numbers, Target], tuple[Box, float]]
    comparator: Comparator
    area: Area = "continuous"
    needs_seen: bool = False


def metric_of(codec: BoxCodec) -> Metric:
    """The evaluator of the authors whose models write boxes so; a plain one for codecs of no published model."""
    return METRICS.get(codec.name) or _plain(codec)


# ------------------------------------------------------------------------------------------------------------
# Reading

_PLAIN_DECIMAL = r"-?\d+(?:\.\d+)?"
_LMMS_EVAL = re.compile(
    rf"\[\s*({_PLAIN_DECIMAL}),\s*({_PLAIN_DECIMAL}),\s*({_PLAIN_DECIMAL}),\s*({_PLAIN_DECIMAL})\s*\]"
)
_ONE_DIGIT = r"\d(?:\.\d*)?"
_SHIKRA_BOX = rf"{_ONE_DIGIT}(?:,{_ONE_DIGIT}){{3}}"
_SHIKRA = re.compile(rf"\[({_SHIKRA_BOX}(?:;{_SHIKRA_BOX})*)\]")
_MINIGPT_V2 = re.compile(r"\{(?:<\d{1,3}>){4}\}")


def _read_lmms_eval(answer: str) -> Numbers | None:
    found = _LMMS_EVAL.search(answer)
    return None if found is None else _floats(found.groups())


def _read_brackets(answer: str) -> Numbers | None:
    r"""The first match of `\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*`, in one pass over each line.

    A match that begins at a later bracket of a line ends at the same place, so the first bracket decides.
    """
    for line in answer.split("\n"):
        start = line.find("[")
        if start < 0:
            continue
        parts = line[start:].lstrip("[").split(",", 3)
        if len(parts) == 4 and "]" in parts[3]:
            return _floats((*parts[:3], parts[3].partition("]")[0]))
    return None


def _read_shikra(answer: str) -> Numbers | None:
    groups = _SHIKRA.findall(answer)
    if len(groups) != 1 or ";" in groups[0]:
        return None
    return _floats(groups[0].split(","))


def _read_minigpt_v2(answer: str) -> Numbers | None:
    text = answer.replace("<unk>", "").replace(" ", "").strip()
    numbers = re.findall(r"\d+", text)
    return _floats(numbers) if _MINIGPT_V2.match(text) and len(numbers) == 4 else None


def _read_points(answer: str) -> Numbers | None:
    r"""The first match of `\((.*?)\),\((.*?)\)`, in one pass over each line; each of its halves must be two numbers."""
    for line in answer.split("\n"):
        start = line.find("(")
        middle = line.find("),(", start + 1) if start >= 0 else -1
        end = line.find(")", middle + 3) if middle >= 0 else -1
        if end >= 0:
            first, second = line[start + 1 : middle].split(","), line[middle + 3 : end].split(",")
            return _floats((*first, *second)) if len(first) == len(second) == 2 else None
    return None


def _read_bbox_2d(answer: str) -> Numbers | None:
    """`bbox_2d` of the first object of a literal, fenced or alone; of one that was cut short, of the objects that are whole."""
    lines = answer.splitlines()
    fence = lines.index("```json") if "```json" in lines else -1
    text = answer if fence < 0 else "\n".join(lines[fence + 1 :]).partition("```")[0]
    value = _literal(text)
    if value is None:
        value = _literal(text[: text.rfind('"}') + 2] + "]")
    first = (value or [None])[0] if isinstance(value, list) else value
    box = first.get("bbox_2d") if isinstance(first, dict) else None
    if not isinstance(box, list | tuple) or len(box) < 4:
        return None
    if not all(isinstance(each, int | float) for each in box[:4]):
        return None
    return _floats(box[:4])


def _literal(text: str) -> Any:
    """A Python literal, which JSON is too but for three words; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _floats(texts: Any) -> Numbers | None:
    """Four numbers, if Python's float() takes all of them."""
    try:
        x1, y1, x2, y2 = map(float, texts)
    except (ValueError, OverflowError):
        return None
    return x1, y1, x2, y2


# ------------------------------------------------------------------------------------------------------------
# Arithmetic


def _overlap_32(box: Float32, truth: Float32) -> float:
    """IoU as torchvision's operators compute it: float32, boxes not ordered first; NaN where neither has area."""
    with np.errstate(all="ignore"):
        extent = np.maximum(np.minimum(box[2:], truth[2:]) - np.maximum(box[:2], truth[:2]), np.float32(0))
        common = extent[0] * extent[1]
        areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, truth)]
        return float(common / (areas[0] + areas[1] - common))


def _on_image_32(box: Float32, target: Target) -> Float32:
    """A normalised box in pixels of the image."""
    width, height = target.size
    if target.frame == "image":
        return box * np.array((width, height) * 2, np.float32)
    side, left, top = padding(width, height)
    # ConvLLaVA shifts the box as Python's floats.
    shifted = (box * np.float32(side)).astype(np.float64) - (left, top, left, top)
    return shifted.astype(np.float32)


def _judge_32(box: Float32, target: Target) -> tuple[Box, float]:
    """Of a normalised box, in pixels."""
    with np.errstate(all="ignore"):
        pixels = _on_image_32(box, target)
        return _as_box(pixels), _overlap_32(pixels, np.array(target.box, np.float32))


def _judge_brackets(numbers: Numbers, target: Target) -> tuple[Box, float]:
    with np.errstate(all="ignore"):
        box = np.array(numbers, np.float32)
        return _judge_32(box / np.float32(1000) if box.sum() >= 4 else box, target)


def _judge_points(numbers: Numbers, target: Target) -> tuple[Box, float]:
    with np.errstate(all="ignore"):
        return _judge_32(np.array(numbers, np.float32) / np.float32(1000), target)


def _judge_thousandths(numbers: Numbers, target: Target) -> tuple[Box, float]:
    x1, y1, x2, y2 = (number / 1000 for number in numbers)
    box = _normalised_to_pixels((x1, y1, x2, y2), target)
    return box, _overlap_64(box, target.box)


def _judge_seen(numbers: Numbers, target: Target) -> tuple[Box, float]:
    """Cut at the edge of the image as seen, as the authors do."""
    assert target.seen is not None, "checked before scoring"
    x1, y1, x2, y2 = (
        min(max(number / extent, 0.0), 1.0) for number, extent in zip(numbers, target.seen * 2, strict=True)
    )
    box = _normalised_to_pixels((x1, y1, x2, y2), target)
    return box, _overlap_64(box, target.box)


def _judge_shikra(numbers: Numbers, target: Target) -> tuple[Box, float]:
    """The truth is what the model was trained to write: within the square, to three digits."""
    truth = (
        round(min(max(edge, 0.0), 1.0), 3) for edge in from_pixels(target.box, target.frame, *target.size)
    )
    boxes = np.array((numbers, tuple(truth)), np.float32) * np.float32(1000)
    return _normalised_to_pixels(numbers, target), _overlap_32(boxes[0], boxes[1])


def _judge_minigpt_v2(numbers: Numbers, target: Target) -> tuple[Box, float]:
    """Both edges count as pixels of a box."""
    x1, y1, x2, y2 = (number / 100.0 for number in numbers)
    box = _normalised_to_pixels((x1, y1, x2, y2), target)
    return box, _overlap_64(box, target.box, edge=1.0)


def _judge_lmms_eval(numbers: Numbers, target: Target) -> tuple[Box, float]:
    """Normalised boxes are compared, whatever the frame that the model writes them in."""
    width, height = target.size
    x1, y1, x2, y2 = numbers
    overlap = _overlap_64(numbers, from_pixels(target.box, "image", width, height))
    return (x1 * width, y1 * height, x2 * width, y2 * height), overlap


def _overlap_64(box: Box, truth: Box, *, edge: float = 0.0) -> float:
    """IoU in Python's floats, boxes not ordered first; 0 where neither has area (the evaluators fail there)."""
    across = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]) + edge)
    down = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]) + edge)
    common = across * down
    areas = [(each[2] - each[0] + edge) * (each[3] - each[1] + edge) for each in (box, truth)]
    union = areas[0] + areas[1] - common
    return common / union if union else 0.0


def _normalised_to_pixels(numbers: Numbers, target: Target) -> Box:
    """As `to_pixels`, of numbers that need not be a sound box."""
    width, height = target.size
    x1, y1, x2, y2 = numbers
    if target.frame == "image":
        return x1 * width, y1 * height, x2 * width, y2 * height
    side, left, top = padding(width, height)
    return x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top


def _as_box(box: Float32) -> Box:
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return x1, y1, x2, y2


def _plain(codec: BoxCodec) -> Metric:
    """Of a codec without a published evaluator: its box on the image, not cut, in float64."""

    def read(answer: str) -> Numbers | None:
        # (Pixels as seen stay what they are here; `judge` scales them.)
        box = codec.decode_one(answer, (1, 1))
        return None if isinstance(box, Unparsable) else box

    def judge(numbers: Numbers, target: Target) -> tuple[Box, float]:
        seen = (1, 1) if codec.unit is not None or target.seen is None else target.seen
        x1, y1, x2, y2 = numbers
        box = (x1 / seen[0], y1 / seen[1], x2 / seen[0], y2 / seen[1])
        pixels = to_pixels(box, target.frame, *target.size)
        return pixels, float(iou(np.array(pixels), np.array(target.box), area=codec.area))

    return Metric(
        f"the codec {codec.name}", read, judge, codec.comparator, codec.area, needs_seen=codec.unit is None
    )


LMMS_EVAL = Metric("lmms-eval", _read_lmms_eval, _judge_lmms_eval, ">=")
"""Reads boxes of all families alike."""

METRICS: dict[str, Metric] = {
    "llava": Metric("ConvLLaVA's evaluator", _read_brackets, _judge_brackets, ">="),
    "shikra": Metric("Shikra's REC metric", _read_shikra, _judge_shikra, ">"),
    "minigpt_v2": Metric(
        "MiniGPT-4's eval_ref.py", _read_minigpt_v2, _judge_minigpt_v2, ">", "inclusive_pixels"
    ),
    "internvl": Metric("InternVL's evaluator", _read_brackets, _judge_brackets, ">="),
    "qwen2_vl": Metric("Qwen-VL's evaluator", _read_points, _judge_points, ">="),
    "qwen2_5_vl": Metric("Qwen2.5-VL's notebook", _read_bbox_2d, _judge_seen, ">=", needs_seen=True),
    "qwen3_vl": Metric("Qwen3-VL's notebook", _read_bbox_2d, _judge_thousandths, ">="),
}
"""Name of a codec -> the evaluator of its models' authors."""

assert METRICS.keys() <= CODECS.keys()
