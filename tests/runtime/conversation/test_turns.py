"""A conversation read turn by turn says what it says when the whole is read at once, in every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.errors import InputError, SessionError
from gap_export.graph.trace_cache import Tracer
from gap_export.inputs.chat.conversation import Turn
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.model import load
from tests.conftest import EOS, IMAGE_TOKEN
from tests.runtime.conversation.conftest import LONGEST, OpenModel, Pixels
from tests.runtime.conversation.talking import (
    QUESTIONS,
    facts,
    failing,
    ids_of,
    read_at_once,
    spied,
    talk,
)

BACKENDS = ["onnxruntime", "openvino", "torch"]
SCENE = Path(__file__).parents[3] / "docs" / "images" / "scene.png"


@pytest.mark.parametrize("backend", BACKENDS)
def test_turns_are_answered_as_the_whole_is(
    backend: str, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(backend)
    chat = model.chat(images[0])
    told = []
    for question in QUESTIONS:
        whole = read_at_once(model, chat)
        told.append(facts(chat.ask(question)))
        assert facts(whole.ask(question)) == told[-1]
    assert told == talk(open_model().chat(images[0]), None)
    assert len({each[0] for each in told}) == len(QUESTIONS), "answers that are all alike prove nothing"
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * len(QUESTIONS)


def test_nothing_is_read_twice(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    chat = model.chat(images[0])
    with spied(model.session) as calls:
        first = chat.ask(QUESTIONS[0])
    assert (calls.count("encode"), calls.count("splice"), calls.count("prefill")) == (1, 1, 1)
    assert calls.count("step") == first.new_tokens - 1
    with spied(model.session) as calls:
        chat.ask(QUESTIONS[1])
    assert not {"encode", "splice", "prefill", "clear"} & set(calls.names)
    # The last token of the answer, the question in its frame.
    unread = 1 + len(ids_of(model, f" USER : {QUESTIONS[1]} ASSISTANT :"))
    assert calls.appended == [unread]


def test_turns_are_the_ids_that_follow_from_the_template(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    chat = model.chat(images[0], system="mug .")
    first = chat.ask(QUESTIONS[0])
    second = chat.ask(QUESTIONS[1])
    ids = [1, *ids_of(model, f"mug . USER : <image> {QUESTIONS[0]} ASSISTANT :"), *first.ids]
    ids += [*ids_of(model, f"USER : {QUESTIONS[1]} ASSISTANT :"), *second.ids]
    read = [IMAGE if place == ids.index(IMAGE_TOKEN) else id_ for place, id_ in enumerate(ids)]
    assert list(chat._cache.context.ids) == read[:-1], "the last token of the answer is not read yet"
    assert second.prompt_tokens == len(ids) - len(second.ids) - 1
    assert chat.turns[0] == Turn("system", "mug .")
    assert chat.turns[-2:] == (Turn("user", QUESTIONS[1]), Turn("assistant", second.text))


def test_transformers_says_the_same_of_an_image_that_is_kept_whole(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    """Its own generation, given the whole conversation every time, knows nothing of caches here."""
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    model = open_model(keep="0.1:0.25:1.0")
    reference = LlavaForConditionalGeneration.from_pretrained(
        model.bundle.manifest.recipe.checkpoint, attn_implementation="eager"
    )
    prepared = model.grounder.prepare([Image.fromarray(images[0])])
    pixels = torch.from_numpy(prepared.calls[0]["pixel_values"])
    chat, embedding = model.chat(images[0], keep=1.0), reference.get_input_embeddings()
    ids: list[int] = [1]
    with torch.inference_mode():
        seen = reference.get_image_features(pixel_values=pixels).pooler_output[0]
        for number, question in enumerate(QUESTIONS):
            ids += ids_of(model, f"USER : {'' if number else '<image> '}{question} ASSISTANT :")
            place = ids.index(IMAGE_TOKEN)  # (another one later was generated, and is a word)
            before, behind = (embedding(torch.tensor(part)) for part in (ids[:place], ids[place + 1 :]))
            whole = torch.cat([before, seen, behind])[None]
            generated = reference.generate(
                inputs_embeds=whole,
                attention_mask=torch.ones(1, whole.shape[1], dtype=torch.int64),
                max_new_tokens=LONGEST,
                do_sample=False,
            )
            reply = chat.ask(question)
            assert list(reply.ids) == [id_ for id_ in generated[0].tolist() if id_ != EOS]
            ids += reply.ids


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_may_come_with_any_question(backend: str, open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(backend)
    chat = model.chat()
    brought = [None, images[0], None, [images[1], images[2]], images[3]]
    for question, new in zip((*QUESTIONS, "a mug ?"), brought, strict=True):
        whole = read_at_once(model, chat)
        told = facts(chat.ask(question, images=new, max_new_tokens=4))
        assert facts(whole.ask(question, images=new, max_new_tokens=4)) == told
    assert [turn.images for turn in chat.turns if turn.role == "user"] == [0, 1, 0, 2, 1]


def test_images_count_in_their_order(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    told = facts(model.ask(QUESTIONS[0], images[:2]))
    assert facts(model.ask(QUESTIONS[0], tuple(images[:2]))) == told
    assert facts(model.ask(QUESTIONS[0], images[1::-1])) != told
    assert facts(model.chat(images[0]).ask(QUESTIONS[0], images=images[1])) == told, (
        "those of the chat come first"
    )


def test_a_question_alone_is_a_conversation_of_one_turn(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    told = facts(model.ask(QUESTIONS[0], images[0]))
    assert facts(model.chat(images[0]).ask(QUESTIONS[0])) == told
    assert facts(model.chat().ask(QUESTIONS[0], images=images[0])) == told
    without = model.ask(QUESTIONS[0])
    assert (without.visual_tokens, without.kept_indices.tolist(), without.boxes) == (0, [], ())
    assert facts(without) != told


def test_what_an_answer_says_of_itself(open_model: OpenModel, images: list[Pixels]) -> None:
    reply = open_model().ask(QUESTIONS[0], images[0], max_new_tokens=3)
    assert (reply.finish_reason, reply.new_tokens, len(reply.ids)) == ("length", 3, 3)
    assert (reply.visual_tokens, len(reply.kept_indices)) == (36, 9)
    assert (np.diff(reply.kept_indices) > 0).all()
    assert reply.prompt_tokens == 1 + len(ids_of(open_model(), f"USER : {QUESTIONS[0]} ASSISTANT :"))
    assert reply.notes == ()
    spent = reply.timings
    assert min(spent.preprocess, spent.vision, spent.prefill, spent.decode) > 0


@pytest.mark.parametrize("method", ["step", "append", "prefill", "encode", "splice"])
@pytest.mark.parametrize("error", [SessionError("x", subject="y", hint="z"), KeyboardInterrupt()])
def test_an_answer_that_fails_leaves_the_conversation_as_it_was(
    method: str, error: BaseException, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    expected = talk(model.chat(), images[0], QUESTIONS[:3])
    chat = model.chat()
    with failing(model.session, method, error):
        first = 0 if method in ("encode", "splice", "prefill") else 1
        told = [facts(chat.ask(QUESTIONS[0], images=images[0]))] if first and method != "step" else []
        if method == "step":
            first = 0
        before = chat.turns
        with pytest.raises(type(error)):
            chat.ask(QUESTIONS[first], images=None if first else images[0])
        assert chat.turns == before
        for number in range(first, 3):
            told.append(facts(chat.ask(QUESTIONS[number], images=None if number else images[0])))
    assert told == expected


def test_a_failed_question_leaves_nothing_of_its_image(open_model: OpenModel, images: list[Pixels]) -> None:
    """The next one has another image in the same place."""
    model = open_model()
    expected = facts(model.ask(QUESTIONS[0], images[1]))
    for after in (0, 2):
        chat = model.chat()
        error = SessionError("x", subject="y", hint="z")
        with failing(model.session, "step", error, after), pytest.raises(SessionError, match="x"):
            chat.ask(QUESTIONS[0], images=images[0])
        assert facts(chat.ask(QUESTIONS[0], images=images[1])) == expected
    assert facts(model.ask(QUESTIONS[0], images[0])) != expected


def test_questions_that_cannot_be_asked_are_refused_before_anything_is_read(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    chat = model.chat(images[0])
    with spied(model.session) as calls:
        for wrong in ({"question": ""}, {"question": "a\0"}, {"question": "a", "images": "nowhere.png"},
                      {"question": "a", "temperature": -1}, {"question": "a", "max_new_tokens": 0},
                      {"question": "a", "stopp": "x"}, {"question": "a", "focus": "mug"}, {"question": 7}):  # fmt: skip
            with pytest.raises(InputError) as refused:
                chat.ask(**wrong)  # type: ignore[arg-type]
            assert "\n" not in str(refused.value)
        for of_chat in ({"system": ""}, {"keep": 0.5}, {"focus": "mug"}, {"images": b"no image"}):
            with pytest.raises(InputError):
                model.chat(**of_chat)  # type: ignore[arg-type]
    assert not calls.names
    assert chat.turns == ()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, tracer: Tracer) -> Any:
    """The bundled model."""
    from gap_export.pipeline.build import build

    return build(
        Recipe.load("shapes"), tmp_path_factory.mktemp("bundles") / "shapes", golden=False, tracer=tracer
    ).bundle


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bundled_model_is_asked_for_boxes(backend: str, shapes: Any) -> None:
    with load(shapes, backend=backend, threads=1) as model:
        reply = model.ask("where is the red circle?", SCENE)
        grounded = model.ground(SCENE, "the red circle")
        assert (reply.text, reply.box, reply.finish_reason) == (grounded.text, grounded.box, "stop")
        assert reply.box is not None
        chat = model.chat(SCENE)
        assert facts(chat.ask("where is the red circle?")) == facts(reply)
        whole = read_at_once(model, chat)
        assert facts(chat.ask("where is the blue square?")) == facts(whole.ask("where is the blue square?"))
