"""What tests of conversations share: the same conversation read at once, and what a session was asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gap_export.runtime.conversation.chat import Chat, Reply
from gap_export.runtime.model import Model

QUESTIONS = ["where is the red mug ?", "a cat on the left ?", "is it small ?", "the blue circle , below ?"]


def facts(reply: Reply) -> tuple[Any, ...]:
    """Everything of an answer but how long it took and notes."""
    return (
        reply.text,
        reply.ids,
        reply.finish_reason,
        reply.prompt_tokens,
        reply.kept_indices.tolist(),
        reply.boxes,
    )


def talk(
    chat: Chat, images: Any, questions: Sequence[str] = QUESTIONS, **choices: Any
) -> list[tuple[Any, ...]]:
    """Facts of every answer; the images come with the first question."""
    return [
        facts(chat.ask(question, images=None if number else images, **choices))
        for number, question in enumerate(questions)
    ]


def read_at_once(model: Model, chat: Chat) -> Chat:
    """A conversation in which the same was said, and of which nothing was read."""
    other = model.chat()
    other._state = chat._state.copy()
    other._first_images = list(chat._first_images)
    return other


@dataclass
class Calls:
    """What a session was asked to do.

    Attributes:
        names: of its methods, in order.
        appended: how many tokens each `append` read.
        placed: the placement of every call of the decoder.
    """

    names: list[str] = field(default_factory=list)
    appended: list[int] = field(default_factory=list)
    placed: list[Any] = field(default_factory=list)

    def count(self, name: str) -> int:
        return self.names.count(name)


SPIED = ("encode", "splice", "prefill", "append", "step", "clear", "grow", "embed")


@contextmanager
def spied(session: Any) -> Iterator[Calls]:
    """Notes calls of a session's methods."""
    calls = Calls()

    def noting(name: str, method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.names.append(name)
            if name in ("prefill", "append", "step"):
                calls.placed.append(arguments[1])
            if name == "append":
                calls.appended.append(int(arguments[1].position_ids.shape[-1]))
            return method(*arguments, **named)

        return call

    for name in SPIED:
        setattr(session, name, noting(name, getattr(session, name)))
    try:
        yield calls
    finally:
        for name in SPIED:
            delattr(session, name)


@contextmanager
def failing(session: Any, name: str, error: BaseException, after: int = 0) -> Iterator[None]:
    """A method of a session fails at its call `after`, counted from 0, and works before and afterwards."""
    method, count = getattr(session, name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == after + 1:
            raise error
        return method(*arguments, **named)

    setattr(session, name, call)
    try:
        yield
    finally:
        delattr(session, name)


def ids_of(model: Model, text: str) -> list[int]:
    """Of a text of the template and the user, in the small model's words: nothing is added, `<image>` is the placeholder."""
    ids: list[int] = model.prompts.tokenizer.encode(text, add_special_tokens=False).ids
    return ids
