"""A loaded bundle answers: one or many, about one image or each about its own, whatever images are given as."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, GapExportError, InputError, SessionError
from gap_export.inputs.images import load_image
from gap_export.runtime import grounder
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Answer, Grounder
from gap_export.runtime.model import Model, load

BuildBundle = Callable[..., Bundle]
EXPRESSIONS = ["the red mug", "a cat on the left", "the small blue circle", "square", "a cat", "the mug"]


@pytest.fixture(scope="module")
def model(tiny_bundle: BuildBundle) -> Iterator[Model]:
    with load(tiny_bundle(), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    levels = np.random.default_rng(4).integers(0, 256, (len(EXPRESSIONS), 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in levels]


def said(answers: list[Answer]) -> list[tuple[str, list[int]]]:
    return [(answer.text, answer.kept_indices.tolist()) for answer in answers]


def test_pairs_are_answered_in_order_whatever_fits_into_a_batch(
    model: Model, images: list[Image.Image]
) -> None:
    """The bundle takes four at a time, and six are asked."""
    answers = model.ground(images, EXPRESSIONS)  # type: ignore[arg-type]
    one_by_one = [model.ground(image, text) for image, text in zip(images, EXPRESSIONS, strict=True)]
    assert said(answers) == said(one_by_one)
    assert len({text for text, _ in said(answers)}) > 1


def test_expressions_about_one_image_share_it(model: Model, images: list[Image.Image]) -> None:
    encoded: list[Any] = []
    encode = model.session.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.session, "encode", lambda *args, **kw: encoded.append(1) or encode(*args, **kw))
        answers = model.ground(images[0], EXPRESSIONS)
    assert len(encoded) == 1
    assert said(answers) == said([model.ground(images[0], text) for text in EXPRESSIONS])


def test_an_answer_says_how_it_came_about(model: Model, tiny_bundle: BuildBundle, image_file: Path) -> None:
    answer = model.ground(image_file, "the red mug")
    assert (answer.visual_tokens, len(answer.kept_indices), answer.keep) == (36, 9, 0.25)
    assert answer.kept_indices.tolist() == sorted(set(answer.kept_indices.tolist()))
    timings = answer.timings
    assert min(timings.preprocess, timings.vision, timings.prefill, timings.decode) > 0
    assert timings.total == sum((timings.preprocess, timings.vision, timings.prefill, timings.decode))
    short = model.ground(image_file, "the red mug", max_new_tokens=1)
    assert short.new_tokens <= 1
    assert {answer.finish_reason, short.finish_reason} <= {"stop", "length"}
    assert (answer.finish_reason == "stop") == (answer.new_tokens < 5)
    with open_session(tiny_bundle(), threads=1) as session:
        generation = (
            Grounder(tiny_bundle()).ground(session, [load_image(image_file)], ["the red mug"]).generation
        )
    assert generation.ended[0] == (answer.finish_reason == "stop")


def test_every_box_of_an_answer_is_there(
    model: Model, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is 48 x 40 on a square of 48: its upper edge lies at 4 of 48."""
    text = "[0.25, 0.25, 0.5, 0.5] or [0.00, 0.00, 0.10, 0.05] or [0.5, 0.0, 1.0, 1.0]"
    monkeypatch.setattr(grounder, "decode_answer", lambda tokenizer, ids: text)
    answer = model.ground(image_file, "the red mug")
    assert answer.boxes == ((12, 8, 24, 20), (24, 0, 48, 40))  # the second lies in the padding
    assert answer.box == answer.boxes[0]
    monkeypatch.setattr(grounder, "decode_answer", lambda tokenizer, ids: "nothing")
    answer = model.ground(image_file, "the red mug")
    assert (answer.boxes, answer.box) == ((), None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list_pixels", "[9, 9, 18, 18]"),
        ("bbox_pixels", '{"bbox": [9, 9, 18, 18], "label": "mug"}'),
        ("qwen2_5_vl", '[{"bbox_2d": [9, 9, 18, 18]}]'),
        ("bbox_1000", '{"bbox": [250, 250, 500, 500]}'),
        ("qwen2_vl", "<|box_start|>(250,250),(500,500)<|box_end|>"),
        ("minigpt_v2", "{<25><25><50><50>}"),
    ],
)
def test_answers_are_read_in_another_format(
    name: str, text: str, tiny_bundle: BuildBundle, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model sees the image, 48 x 40, on a square of 48 that is scaled to 36 pixels: its pixels are of that square."""
    monkeypatch.setattr(grounder, "decode_answer", lambda tokenizer, ids: text)
    with load(tiny_bundle(), threads=1, box_format=name) as model:
        assert model.ground(image_file, "the red mug").box == pytest.approx((12, 8, 24, 20))
    with load(tiny_bundle().written_as(name), threads=1) as model:
        assert model.ground(image_file, "the red mug").box == pytest.approx((12, 8, 24, 20))
    with load(tiny_bundle(), threads=1) as model:
        assert model.ground(image_file, "the red mug").box != pytest.approx((12, 8, 24, 20))


def test_a_format_that_there_is_not(tiny_bundle: BuildBundle) -> None:
    with pytest.raises(InputError, match="did you mean 'bbox_1000'"):
        load(tiny_bundle(), box_format="bbox1000")


def test_an_image_may_be_given_in_any_form(model: Model, image_file: Path, tmp_path: Path) -> None:
    pixels = np.asarray(load_image(image_file))
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned by a quarter
    turned = tmp_path / "turned.png"
    Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
    forms = [str(image_file), image_file.read_bytes(), load_image(image_file), pixels, turned]
    expected = said([model.ground(image_file, "a cat")])
    for form in forms:
        assert said([model.ground(form, "a cat")]) == expected  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("image", "expression", "message"),
    [
        ("IMAGE", 3, "give a text, or a list of texts"),
        ("IMAGE", ["a cat", 3], "give a text, or a list of texts"),
        ("IMAGE", ("a cat", "the mug"), "give a text, or a list of texts"),
        ("IMAGE", "", "is empty"),
        ("IMAGE", ["a cat", " "], "is empty"),
        (["IMAGE"], "a cat", "1 images: stand with one expression"),
        (["IMAGE"], ["a cat", "the mug"], "1 images and 2 expressions: do not belong together"),
        (("IMAGE",), "a cat", "by itself, not in a tuple"),
        (("IMAGE", "IMAGE"), "a cat", "shows 1 image, and 2 were given"),
        (("IMAGE", "IMAGE"), ["a cat", "the mug"], "shows 1 image, and 2 were given"),
        (None, "a cat", "of type NoneType"),
        (np.zeros((4, 4), np.uint8), "a cat", r"uint8 \[4, 4\]"),
        ([], ["a cat"], "0 images and 1 expressions"),
    ],
    ids=str,
)
def test_what_does_not_belong_together_is_refused(
    model: Model, image: Any, expression: Any, message: str, image_file: Path
) -> None:
    def filled(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return type(given)(filled(each) for each in given)
        return image_file if isinstance(given, str) and given == "IMAGE" else given

    with pytest.raises(InputError, match=message):
        model.ground(filled(image), expression)


def test_no_question_has_no_answer(model: Model, image_file: Path) -> None:
    assert model.ground([], []) == model.ground(image_file, []) == []


def test_a_fraction_can_be_chosen_where_the_bundle_lets_requests_choose(
    model: Model, tiny_bundle: BuildBundle, image_file: Path
) -> None:
    with load(tiny_bundle(keep="0.1:0.25:1.0").folder, threads=1) as chosen:
        for share in (None, 0.5, 1.0):
            single = chosen.ground(image_file, "a cat", keep=share)
            (shared, _) = chosen.ground(image_file, ["a cat", "the mug"], keep=share)
            assert single.keep == shared.keep == (share or 0.25)
    with pytest.raises(GapExportError, match="cannot be chosen"):
        model.ground(image_file, "a cat", keep=0.5)


def test_the_end_of_a_model(tiny_bundle: BuildBundle, image_file: Path, tmp_path: Path) -> None:
    with load(str(tiny_bundle().folder), threads=1) as loaded:
        assert loaded.ground(image_file, "a cat").text is not None
    loaded.close()
    for call in (lambda: loaded.ground(image_file, "a cat"), loaded.__enter__):
        with pytest.raises(SessionError, match="is closed"):
            call()
    with pytest.raises(BundleError, match="not a bundle"):
        load(tmp_path)
    with pytest.raises(SessionError, match="unknown backend"):
        load(tiny_bundle(), backend="tflite")


def test_an_answer_can_be_drawn(model: Model, image_file: Path) -> None:
    drawn = model.draw(image_file, model.ground(image_file, "a cat"), caption="a cat")
    assert drawn.mode == "RGB"
    assert min(drawn.size) > 40
