"""What fits: a conversation that does not is refused before anything is encoded, and caches grow with those that do."""

from __future__ import annotations

from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.runtime.ort import OnnxRuntimeSession
from tests.runtime.conversation.conftest import LONGEST, OpenModel, Pixels
from tests.runtime.conversation.talking import QUESTIONS, facts, ids_of, read_at_once, spied

MUGS = "mug " * 1000


def of_tokens(model: Any, count: int, images: int = 1) -> str:
    """A first question with which the prompt has so many text tokens."""
    frame = 1 + len(ids_of(model, f"USER :{' <image>' * images} ASSISTANT :")) - images
    return " ".join(["mug"] * (count - frame))


def test_the_longest_conversation_that_fits_is_answered(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    capacity = model.bundle.manifest.capacity
    for new_tokens in (1, 5):
        fits = capacity - 9 - new_tokens + 1  # the last token is not read
        with spied(model.session) as calls:
            reply = model.ask(of_tokens(model, fits), images[0], max_new_tokens=new_tokens)
        assert (reply.prompt_tokens, reply.new_tokens) == (fits, new_tokens)
        assert calls.placed[-1].next_slot.max() <= capacity
        with spied(model.session) as calls, pytest.raises(InputError) as refused:
            model.ask(of_tokens(model, fits + 1), images[0], max_new_tokens=new_tokens)
        assert not calls.names
        message = (
            f"has {fits + 1} text tokens and 9 visual tokens, and with {new_tokens} new tokens needs "
            f"{capacity + 1} slots of a cache of {capacity}"
        )
        assert message in str(refused.value)
        assert "--max-text" in refused.value.hint
        assert "\n" not in str(refused.value)


def test_positions_that_the_model_does_not_know_are_refused(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(max_text=212)
    longest = model.bundle.manifest.spec.max_positions - 36 - 2
    assert model.ask(of_tokens(model, longest), images[0], max_new_tokens=2).new_tokens == 2
    with spied(model.session) as calls, pytest.raises(InputError, match=r"reaches position 257 .*knows 256"):
        model.ask(of_tokens(model, longest + 1), images[0], max_new_tokens=2)
    assert not calls.names


def test_a_conversation_that_has_become_too_long_stays_as_it_is(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    chat = model.chat(images[0])
    chat.ask(QUESTIONS[0])
    turns = chat.turns
    with spied(model.session) as calls, pytest.raises(InputError, match="of a cache of"):
        chat.ask(of_tokens(model, 110))
    assert not calls.names
    assert chat.turns == turns
    whole = read_at_once(model, chat)
    assert facts(chat.ask(QUESTIONS[1])) == facts(whole.ask(QUESTIONS[1]))


def test_answers_are_as_long_as_asked_for(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    longest = model.ask(QUESTIONS[0], images[0], max_new_tokens=LONGEST + 6)
    assert longest.ids[:LONGEST] == model.ask(QUESTIONS[0], images[0]).ids
    assert longest.new_tokens == LONGEST + 6
    assert model.ask(QUESTIONS[0], images[0], max_new_tokens=1).ids == longest.ids[:1]


def test_a_cache_grows_with_its_conversation(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(max_text=212)
    session = model.session
    assert isinstance(session, OnnxRuntimeSession)
    whole = model.bundle.manifest.capacity
    model.ground(images[1], "a cat")
    growing, lengths = model.chat(images[0]), []
    at_once = model.chat(images[0])
    for number in range(9):
        question = QUESTIONS[number % 4]
        told = facts(growing.ask(question, max_new_tokens=4))
        lengths.append(session._cache.layout.capacities[0])
        # As if the whole cache had been laid out with the first prompt.
        prefill = session.prefill
        session.prefill = lambda *given, reserve=None, prefill=prefill: prefill(*given)  # type: ignore[method-assign]
        try:
            assert facts(at_once.ask(question, max_new_tokens=4)) == told
        finally:
            del session.prefill
        assert session._cache.layout.capacities[0] == whole
    assert len(set(lengths)) > 4
    assert lengths == sorted(lengths)
    assert lengths[0] < whole // 2


def test_growing_alone_is_no_reason_to_read_again(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(max_text=212)
    chat = model.chat(images[0])
    with spied(model.session) as calls:
        for number in range(8):
            chat.ask(QUESTIONS[number % 4], max_new_tokens=3)
    assert (calls.count("prefill"), calls.count("append"), calls.count("grow")) == (1, 7, 7)


@pytest.mark.long
def test_text_is_read_in_calls_as_long_as_graphs_take(open_model: OpenModel, images: list[Pixels]) -> None:
    """Engines take no longer ones; a conversation may become longer, turn by turn."""
    model = open_model(max_text=40, capacity=160)
    chat = model.chat(images[0])
    chat.ask(of_tokens(model, 30), max_new_tokens=2)
    for question in ("mug " * 60, "a cat ?"):
        whole = read_at_once(model, chat)
        with spied(model.session) as calls:
            told = facts(chat.ask(question, max_new_tokens=2))
        assert max([0, *calls.appended]) <= 40
        with spied(model.session) as calls:
            assert facts(whole.ask(question, max_new_tokens=2)) == told
        assert calls.count("splice") == 1
        lengths = [placement.position_ids.shape[-1] for placement in calls.placed]
        assert max(lengths) <= 40 + 9 - 1
        assert lengths[:3] == [48, 40, lengths[2]]


@pytest.mark.long
def test_text_before_an_image_may_be_long(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model(max_text=40, capacity=160)
    told = facts(model.ask("a cat ?", images[0], system="mug " * 70, max_new_tokens=3))
    longer = open_model(max_text=212)
    assert facts(longer.ask("a cat ?", images[0], system="mug " * 70, max_new_tokens=3)) == told
