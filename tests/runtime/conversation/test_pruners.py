"""Which visual tokens a conversation goes by: ratios that are chosen, texts that are read, layers that drop tokens."""

from __future__ import annotations

from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.model import Model, load
from tests.runtime.conversation.conftest import OpenModel, Pixels
from tests.runtime.conversation.talking import QUESTIONS, facts, read_at_once, spied, talk

BACKENDS = ["onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch"))]
"""Others run the same loop over graphs that `test_turns` has them run."""
RANGE = "0.1:0.25:1.0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_chooses_its_ratio(backend: str, open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(backend, keep=RANGE)
    kept = {None: 9, 0.5: 18, 1.0: 36, 0.1: 4}
    told = {}
    for keep, count in kept.items():
        chat = model.chat(images[0], keep=keep)
        told[keep] = [facts(chat.ask(question)) for question in QUESTIONS[:2]]
        whole = read_at_once(model, chat)
        whole._keep = keep
        third = facts(chat.ask(QUESTIONS[2], images=images[1]))
        assert facts(whole.ask(QUESTIONS[2], images=images[1])) == third
        assert [len(each[4]) for each in (*told[keep], third)] == [count] * 3
    assert len({str(each) for each in told.values()}) == 4
    assert facts(model.ask(QUESTIONS[0], images[0], keep=0.5)) == told[0.5][0]
    if backend != "onnxruntime":
        assert talk(open_model(keep=RANGE).chat(keep=0.5), images[0], QUESTIONS[:2]) == told[0.5]


def test_ratios_that_cannot_be_chosen_are_refused(open_model: OpenModel, images: list[Pixels]) -> None:
    with pytest.raises(InputError, match="keep"):
        open_model(keep=RANGE).ask(QUESTIONS[0], images[0], keep=0.05)
    with pytest.raises(InputError, match="keep"):
        open_model().chat(images[0], keep=0.5)


FOCUSED = {"pruner": "cdpruner"}


@pytest.fixture
def focused(open_model: OpenModel) -> Model:
    return open_model(**FOCUSED)


@pytest.mark.long
def test_visual_tokens_are_chosen_by_the_first_question(focused: Model, images: list[Pixels]) -> None:
    chat = focused.chat(images[0])
    with spied(focused.session) as calls:
        first, second = chat.ask("the red mug ?"), chat.ask("a cat on the left ?")
    assert calls.count("encode") == 1
    assert first.kept_indices.tolist() == second.kept_indices.tolist()
    assert first.notes == ()
    assert second.notes == ("cdpruner chose visual tokens by an earlier question; focus chooses them anew",)
    other = focused.ask("a cat on the left ?", images[0])
    assert other.kept_indices.tolist() != first.kept_indices.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_focus_stands_in_the_place_of_the_question(
    backend: str, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(backend, **FOCUSED)
    question = "the red mug ?"
    plain = model.ask(question, images[0])
    about = model.ask(question, images[0], focus="square")
    assert about.kept_indices.tolist() != plain.kept_indices.tolist()
    assert about.kept_indices.tolist() == model.ground(images[0], "square").kept_indices.tolist()
    assert facts(model.ask(question, images[0], focus="square")) == facts(about)
    assert facts(model.chat(images[0]).ask(question, focus="square")) == facts(about)


def test_focus_in_a_later_turn_chooses_anew_for_all_that_was_seen(
    focused: Model, images: list[Pixels]
) -> None:
    model = focused
    chat = model.chat(images[0])
    before = chat.ask("the red mug ?")
    chat.ask("a cat on the left ?", images=images[1])
    whole = read_at_once(model, chat)
    with spied(model.session) as calls:
        told = chat.ask("is it small ?", focus="square")
    assert calls.count("encode") == 2
    assert told.notes == ()
    assert told.kept_indices.tolist() == model.ground(images[1], "square").kept_indices.tolist()
    # As a conversation that had this focus from the beginning, and in which the same was said.
    for each in whole._state.seen:
        each.visual, each.text_ids = None, model.prompts.text_ids("square", whole=True)
    whole._state.focus = "square"
    assert facts(whole.ask("is it small ?")) == facts(told)
    assert before.kept_indices.tolist() != model.ground(images[0], "square").kept_indices.tolist()
    with spied(model.session) as calls:
        later = chat.ask("a mug ?", images=images[2])
    assert calls.count("encode") == 1
    assert later.kept_indices.tolist() == model.ground(images[2], "square").kept_indices.tolist()


def test_focus_of_an_answer_that_failed_is_forgotten(focused: Model, images: list[Pixels]) -> None:
    chat = focused.chat(images[0])
    chat.ask("the red mug ?")
    with pytest.raises(InputError):
        chat.ask("is it small ?" * 99, focus="square")
    stream = chat.stream("is it small ?", focus="square")
    next(stream)
    del stream
    told = chat.ask("is it small ?")
    expected = focused.chat(images[0])
    expected.ask("the red mug ?")
    assert facts(told) == facts(expected.ask("is it small ?"))


def test_texts_that_the_text_tower_cannot_read_are_refused_with_a_way_out(
    focused: Model, images: list[Pixels]
) -> None:
    long = "the red mug on the left of the small blue circle below the cat ?"
    with (
        spied(focused.session) as calls,
        pytest.raises(InputError, match=r"the question: .*cdpruner") as refused,
    ):
        focused.ask(long, images[0])
    assert "--focus" in refused.value.hint
    with pytest.raises(InputError, match="focus: "):
        focused.ask("a cat ?", images[0], focus=long)
    assert not calls.names
    assert focused.ask(long, images[0], focus="the red mug").visual_tokens == 36
    assert focused.ask(long).visual_tokens == 0, "without an image nothing is chosen"


@pytest.mark.long
def test_focus_where_no_text_is_read_is_refused(open_model: OpenModel, images: list[Pixels]) -> None:
    for pruner in ({}, {"deep": True, "pruner": "fastv"}):
        model = open_model(**pruner)
        with pytest.raises(InputError, match="focus, pruner"):
            model.ask(QUESTIONS[0], images[0], focus="mug")
        with pytest.raises(InputError, match="focus, pruner"):
            model.chat(images[0]).ask(QUESTIONS[0], focus="mug")


STAGED: dict[str, Any] = {"deep": True, "pruner": "fastv"}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_a_decoder_that_drops_tokens_is_talked_to(
    backend: str, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(backend, **STAGED)
    chat, lost = model.chat(images[0]), model.chat(images[0])
    told = []
    for number, question in enumerate(QUESTIONS[:3]):
        with spied(model.session) as calls:
            reply = chat.ask(question)
        assert calls.count("prefill") == (0 if number else 1)
        told.append(facts(reply))
        assert reply.notes == (
            ("fastv chose visual tokens by the first question; a new conversation chooses them anew",)
            if number
            else ()
        )
    for question, expected in zip(QUESTIONS, told, strict=False):
        model.ground(images[1], "a cat")
        assert facts(lost.ask(question)) == expected, (
            "what the stages keep does not change when it is read again"
        )
    assert told == talk(open_model(**STAGED).chat(), images[0], QUESTIONS[:3])


def test_a_staged_conversation_is_cut_off_anywhere(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(**STAGED)
    expected = talk(model.chat(), images[0], QUESTIONS[:3])
    chat = model.chat(images[0])
    for question, told in zip(QUESTIONS, expected, strict=False):
        for pieces in (1, 2):
            stream = chat.stream("a mug ?", max_new_tokens=20)
            for _ in range(pieces):
                next(stream)
            assert not stream.ended
            del stream
        assert facts(chat.ask(question)) == told


def test_a_staged_image_may_come_later_but_not_twice(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(**STAGED)
    chat = model.chat()
    chat.ask(QUESTIONS[0])
    whole = read_at_once(model, chat)
    told = facts(chat.ask(QUESTIONS[1], images=images[0]))
    assert facts(whole.ask(QUESTIONS[1], images=images[0])) == told
    third = facts(chat.ask(QUESTIONS[2]))
    model.ground(images[1], "a cat")
    assert facts(whole.ask(QUESTIONS[2])) == third
    turns = chat.turns
    for refusing, new in ((chat, images[1]), (model.chat(), images[:2])):
        with pytest.raises(InputError, match="fastv drops tokens inside the decoder"):
            refusing.ask("a mug ?", images=new)
    assert chat.turns == turns


@pytest.mark.long
@pytest.mark.parametrize("pruner", ["trim", "cdpruner"])
def test_the_bundled_text_tower_looks_for_what_is_asked_about(
    pruner: str, tmp_path: Any, tracer: Any
) -> None:
    from pathlib import Path

    from gap_export.pipeline.build import build

    scene = Path(__file__).parents[3] / "docs" / "images" / "scene.png"
    bundle = build(
        Recipe.load("shapes", pruner=pruner, max_text=150), tmp_path / pruner, tracer=tracer
    ).bundle
    with load(bundle, threads=1) as model:
        chat = model.chat(scene)
        first = chat.ask("where is the red circle?")
        later = chat.ask("where is the blue square?")
        assert later.notes
        anew = chat.ask("where is the blue square?", focus="the blue square")
        assert anew.kept_indices.tolist() == model.ground(scene, "the blue square").kept_indices.tolist()
        assert first.kept_indices.tolist() != anew.kept_indices.tolist()
        for backend in ("openvino", "torch"):
            with load(bundle, backend=backend, threads=1) as other:
                assert other.ask("where is the red circle?", scene).text == first.text
