"""From a request to what a row reads: the prompts that models ask themselves, images as they are encoded, and what is refused before anything is computed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.inputs.chat.conversation import Turn
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.runtime.keep import KeepCounts
from gap_export.runtime.model import Model, load
from gap_export.serving.preparing import Preparing
from gap_export.serving.work import Conversation, Work
from tests.conftest import BuildBundle
from tests.families.answers import Tiny
from tests.serving.asking import noise, scenes, talk, work_of


def preparing_of(model: Model) -> Preparing:
    return Preparing(model.bundle, model.grounder, model.prompts if model.bundle.manifest.chat else None)


@pytest.fixture(scope="module")
def shapes(shapes_alone: Model) -> Preparing:
    return preparing_of(shapes_alone)


def test_prompts_are_those_of_the_model(shapes: Preparing, shapes_alone: Model) -> None:
    case = scenes(1)[0]
    prepared = shapes.prepare(work_of([case.image], "the red mug", talk("a mug?"), max_new_tokens=5), None)
    assert prepared.sizes == [case.image.size]
    assert not prepared.faults
    assert prepared.seconds > 0
    box, free = prepared.prompts
    image = shapes_alone.bundle.manifest.prompt.image_token_id
    (told,) = shapes_alone.grounder.prompts(["the red mug"]).input_ids
    assert [image if id_ == IMAGE else id_ for id_ in box.ids] == told.tolist()
    assert box.longest == free.longest == 5
    assert free.ids == shapes_alone.prompts.tokens.prompt((Turn("user", "a mug?", 1),), []).ids
    assert box.text_ids == free.text_ids == (None,)
    assert [each.number for each in prepared.prompts] == [0, 1]


def test_images_are_kept_as_pixels_of_the_model_alone(shapes: Preparing) -> None:
    images = [noise(1, 300, 200)]
    gone = weakref.ref(images[0])
    prepared = shapes.prepare(Work(work_of([], "circle").questions, lambda: [images.pop()], 1), None)
    gc.collect()
    assert gone() is None, "an image of many megapixels must not wait for a row"
    assert prepared.sizes == [(300, 200)]


def test_questions_share_images_where_the_pruner_reads_no_text(shapes: Preparing) -> None:
    prepared = shapes.prepare(work_of([scenes(1)[0].image], "circle", "square", keep=0.5), 0.5)
    first, second = (shapes.seen(prepared, each, 0.5) for each in prepared.prompts)
    assert first is second
    assert first[0].keep_counts == KeepCounts((72,))


@pytest.mark.long
def test_every_image_is_seen_with_the_question_it_came_with(tiny_bundle: BuildBundle) -> None:
    """Pruners that read text: as in a conversation that is asked turn by turn."""
    with load(tiny_bundle(pruner="cdpruner", max_text=60), threads=1) as model:
        preparing, images = preparing_of(model), [noise(1), noise(2)]
        turns = (Turn("user", "the red mug", 1), Turn("assistant", "cat"), Turn("user", "a cat", 1))
        prepared = preparing.prepare(work_of(images, Conversation(turns)), None)
        assert not prepared.faults
        (prompted,) = prepared.prompts
        seen = preparing.seen(prepared, prompted, None)
        for each, text in zip(seen, ("the red mug", "a cat"), strict=True):
            np.testing.assert_array_equal(each.text_ids, model.prompts.text_ids(text, whole=False))
        assert seen[0].text_ids is not seen[1].text_ids
        several = preparing.prepare(work_of(images[:1], "the red mug", "a cat", "the red mug"), None)
        one, other, again = (preparing.seen(several, each, None) for each in several.prompts)
        assert one is again
        assert one is not other


def test_several_images_of_one_call(qwen: Tiny) -> None:
    bundle = qwen.bundle(images=2, **qwen.family.builds[2][0])
    with load(bundle, threads=1) as model:
        preparing = preparing_of(model)
        pair = [noise(1, 40, 30), noise(2, 30, 90)]
        prepared = preparing.prepare(work_of(pair, "the red mug"), None)
        (prompted,) = prepared.prompts
        assert prompted.ids.count(IMAGE) == 2
        assert prompted.text_ids == (None,)
        assert prepared.sizes == [(40, 30), (30, 90)]
        for count in (1, 3):
            with pytest.raises(InputError, match="this bundle takes 2 at a time"):
                preparing.prepare(work_of((pair * 2)[:count], "the red mug"), None)
        fault = preparing.prepare(work_of(pair * 2, "the red mug"), None).faults[0]
        assert "has 2 images, and 4 were given" in str(fault)
        turns = (Turn("user", "a", 1), Turn("assistant", "b"), Turn("user", "c", 1))
        told: Any = SimpleNamespace(
            tokens=SimpleNamespace(prompt=lambda *_: SimpleNamespace(ids=(IMAGE, 5, IMAGE, 6))),
            text_ids=lambda *_, **__: None,
        )
        preparing = Preparing(bundle, model.grounder, told)
        fault = preparing.prepare(work_of(pair, Conversation(turns)), None).faults[0]
        assert "1 image: is given, and this bundle takes 2 at a time" in str(fault)


@pytest.mark.parametrize(
    ("questions", "images", "told"),
    [
        ([""], 1, "expression"),
        (["a <image> b"], 1, "contains '<image>', which the tokenizer reads as a control token"),
        (["circle " * 200], 1, "tokens"),
        ([talk("circle " * 300)], 1, "the conversation: has"),
        ([talk("a", "b")], 1, "ends with a turn of the assistant"),
        ([Conversation(())], 0, "the conversation: is empty"),
        (
            [Conversation((Turn("assistant", "a"), Turn("user", "b", 1)))],
            1,
            "is the assistant's where the user's is due",
        ),
        ([talk("a", images=0)], 1, "has 0 images, and 1 were given"),
        ([talk("a")], 0, "has 1 images, and 0 were given"),
        (["circle"], 0, "has 1 images, and 0 were given"),
        ([talk("a", images=2)], 2, "288 visual tokens"),
    ],
)
def test_what_is_refused_before_anything_is_computed(
    questions: list[Any], images: int, told: str, shapes: Preparing
) -> None:
    given = [scenes(1)[0].image] * images
    prepared = shapes.prepare(work_of(given, *questions, talk("circle?", images=images)), 1.0)
    fault = prepared.faults[0]
    assert isinstance(fault, InputError)
    assert told in str(fault)
    assert "\n" not in str(fault)
    if images < 2:
        assert [each.number for each in prepared.prompts] == [1], "others are asked"


@pytest.mark.parametrize("keep", [0.05, 1.5, 0.0, -1.0, float("nan")])
def test_a_fraction_that_cannot_be_chosen(keep: float, shapes: Preparing) -> None:
    prepared = shapes.prepare(work_of([scenes(1)[0].image], "circle", "square", keep=keep), keep)
    assert set(prepared.faults) == {0, 1}
    assert not prepared.prompts


def test_longest_answers(shapes: Preparing) -> None:
    prepared = shapes.prepare(
        work_of([scenes(1)[0].image], "circle", talk("circle?"), max_new_tokens=13), None
    )
    assert "max_new_tokens 13: must be between 1 and 12" in str(prepared.faults[0])
    assert prepared.prompts[0].longest == 13, "as long as it fits into the cache"


def test_images_that_fail_fail_the_request(shapes: Preparing) -> None:
    def images() -> list[Image.Image]:
        raise InputError("is no image", subject="image 1", hint="x")

    with pytest.raises(InputError, match="is no image"):
        shapes.prepare(Work(work_of([], "circle").questions, images, 1), None)


def test_bundles_without_a_template_answer_no_free_questions(
    shapes_bundle: Bundle, shapes_alone: Model
) -> None:
    preparing = Preparing(shapes_bundle, shapes_alone.grounder, None)
    prepared = preparing.prepare(work_of([scenes(1)[0].image], talk("circle?"), "circle"), None)
    assert "it has no chat template" in str(prepared.faults[0])
    assert len(prepared.prompts) == 1
