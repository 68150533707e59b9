"""Conversations, answers and threads share one cache, and each hears what it would hear alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from gap_export.errors import GapExportError
from gap_export.runtime.model import Model
from tests.runtime.conversation.conftest import OpenModel, Pixels
from tests.runtime.conversation.talking import QUESTIONS, facts, spied, talk

THREADS = 8


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_conversations_alternate_with_each_other_and_with_answers(
    backend: str, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(backend)
    alone = [talk(model.chat(), image, QUESTIONS[:3]) for image in images[:2]]
    grounded = model.ground(images[2], "the red mug").text
    chats = [model.chat(image) for image in images[:2]]
    with spied(model.session) as calls:
        for turn in range(3):
            for chat, expected in zip(chats, alone, strict=True):
                assert facts(chat.ask(QUESTIONS[turn])) == expected[turn]
                if turn == 1:
                    assert model.ground(images[2], "the red mug").text == grounded
    assert calls.count("encode") == 2 + 2, "each image once, and one for every box"


def test_one_conversation_among_many_boxes_reads_itself_again(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    expected = talk(model.chat(), images[0])
    chat = model.chat(images[0])
    for question, told in zip(QUESTIONS, expected, strict=True):
        model.ground(images[1], ["a cat", "the mug", "a square"])
        with spied(model.session) as calls:
            assert facts(chat.ask(question)) == told
        assert (calls.count("prefill"), calls.count("encode")) == (1, question == QUESTIONS[0])


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads are switched in Python often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def mixed(model: Model, image: Pixels, number: int) -> list[Any]:
    """What one thread asks for: a conversation, in part as a stream, a question alone, and boxes."""
    chat, told = model.chat(image), []
    for turn, question in enumerate(QUESTIONS[:3]):
        if (turn + number) % 2:
            stream = chat.stream(question)
            pieces = list(stream)
            assert "".join(pieces) == stream.reply.text
            told.append(facts(stream.reply))
        else:
            told.append(facts(chat.ask(question)))
        if turn == number % 3:
            told.append(model.ground(image, "the red mug").text)
            told.append(facts(model.ask(QUESTIONS[number % 4], image, temperature=1.0, seed=number)))
    return told


def of_all(work: Callable[[int], Any]) -> list[Any]:
    """From all threads, at once."""
    together = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        together.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("torch", marks=pytest.mark.long)])
def test_eight_threads_hear_what_each_hears_alone(
    backend: str, open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model(backend)
    alone = [mixed(model, image, number) for number, image in enumerate(images)]
    assert len({str(each) for each in alone}) == THREADS
    assert of_all(lambda number: mixed(model, images[number], number)) == alone


@pytest.mark.usefixtures("impatient")
def test_without_turns_they_hear_others(open_model: OpenModel, images: list[Pixels]) -> None:
    """What the test above would show if answers did not wait for each other."""
    model = open_model()
    alone = [mixed(model, image, number) for number, image in enumerate(images)]
    model.session.turn = nullcontext  # type: ignore[method-assign]
    try:
        assert of_all(lambda number: mixed(model, images[number], number)) != alone
    except GapExportError:  # caches of another length
        pass
    finally:
        del model.session.turn


@pytest.mark.usefixtures("impatient")
def test_threads_that_share_a_conversation_wait_for_each_other(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    chat = model.chat(images[0])
    replies = of_all(lambda number: chat.ask("a ?", max_new_tokens=1))
    expected = talk(model.chat(), images[0], ["a ?"] * THREADS, max_new_tokens=1)
    assert sorted(facts(reply)[3] for reply in replies) == [told[3] for told in expected]
    assert {facts(reply)[:2] for reply in replies} == {told[:2] for told in expected}
    assert len(chat.turns) == 2 * THREADS
