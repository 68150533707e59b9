"""Protocols by name, and the number that tells them apart: a perfect model of LLaVA's kind on RefCOCO val."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export import families
from gap_export.boxes.codecs import CODECS, Frame, from_pixels
from gap_export.bundle.manifest import BoxFormat
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import read_annotations
from gap_export.evaluation.refer.protocols import NAMES, protocol_of, score

PADDED = BoxFormat(codec="llava", frame="padded_square")


@pytest.mark.parametrize(("name", "expected"), [("unc", 10834), ("lmms-eval", 10115)])
def test_a_perfect_model_of_the_padded_square(refcoco: Path, name: str, expected: int) -> None:
    """100.00 and 93.36. Answers have all digits: 14 truths lie at an IoU of exactly one half under lmms-eval."""
    protocol, hits = protocol_of(name, PADDED), 0
    for each in read_annotations(refcoco).expressions:
        assert each.width is not None
        assert each.height is not None
        box = from_pixels(each.box, "padded_square", each.width, each.height, clamp=True)
        answer = "[" + ", ".join(f"{edge:.17f}" for edge in box) + "]"
        hits += score(answer, each.box, (each.width, each.height), protocol).hit
    assert hits == expected


def test_the_comparison_is_that_of_the_paper() -> None:
    size, truth = (100, 100), (0.0, 0.0, 50.0, 50.0)
    answers = {"llava": "[0, 0, 0.50, 1.00]", "shikra": "[0.000,0.000,0.500,1.000]"}
    for codec, hit in (("llava", True), ("shikra", False)):
        protocol = protocol_of("unc", BoxFormat(codec=codec, frame="image"))
        result = score(answers[codec], truth, size, protocol)
        assert result.iou == 0.5
        assert result.hit is hit
    minigpt = protocol_of("unc", BoxFormat(codec="minigpt_v2", frame="image"))
    counted = score("{<0><0><50><100>}", truth, size, minigpt)
    assert counted.iou == pytest.approx(51 * 51 / (51 * 101))
    assert counted.hit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", families.names())
def test_every_family_has_every_protocol(name: str, family: str) -> None:
    """lmms-eval reads fractions in square brackets alone."""
    protocol = protocol_of(name, families.row(family).box)
    size = (640, 480)
    truth = (64.0, 96.0, 320.0, 288.0)
    box = from_pixels(truth, protocol.frame, *size)
    result = score(CODECS[protocol.codec].encode(box, size), truth, size, protocol, seen=size)
    assert result.hit is protocol.reads_the_codec
    assert (result.iou > 0.9) is protocol.reads_the_codec
    assert name in protocol.description


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frame", ["image", "padded_square"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_can_be_scored_in_either_frame(name: str, frame: Frame, codec: str) -> None:
    """Pixels are of what the model saw: of the image at half its size, or of its padded square on 336 pixels."""
    protocol = protocol_of(name, BoxFormat(codec=codec, frame=frame))
    size, seen = (640, 480), (320, 240) if frame == "image" else (336, 336)
    truth = (64.0, 96.0, 320.0, 288.0)
    answer = CODECS[codec].encode(from_pixels(truth, protocol.frame, *size), seen)
    result = score(answer, truth, size, protocol, seen=seen)
    assert result.hit is protocol.reads_the_codec
    if protocol.reads_the_codec:
        assert result.box == pytest.approx(truth, abs=8)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no box that ConvLLaVA's evaluator reads"),
        ("no box", "no box"),
        ("[0.1, 0.2, nan, 0.4]", "not finite"),
        ("[0.5, 0.5, 0.1, 0.1]", "is inverted"),
    ],
)
def test_answers_without_a_box(answer: str, reason: str) -> None:
    result = score(answer, (0.0, 0.0, 10.0, 10.0), (100, 100), protocol_of("unc", PADDED))
    assert (result.box, result.iou, result.hit) == (None, 0.0, False)
    assert result.reason is not None
    assert reason in result.reason


def test_another_name() -> None:
    with pytest.raises(InputError, match="not a protocol"):
        protocol_of("coco", PADDED)
