"""What tests of the engine share: requests of every kind, the same asked one at a time, and a session that can be made to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from gap_export.boxes.scenes import Case, cases
from gap_export.inputs.chat.conversation import Turn
from gap_export.runtime.answer.sampling import choose
from gap_export.runtime.answer.text_stream import TextStream
from gap_export.runtime.conversation.cache import ConversationCache
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.runtime.model import Model
from gap_export.serving.engine import Engine
from gap_export.serving.work import Conversation, Expression, Question, Result, Work

WAIT = 60.0
"""Seconds after which a test that waits has failed."""

Facts = tuple[Any, ...]
Answer = Callable[[Work, int], Facts]


@cache
def scenes(count: int) -> tuple[Case, ...]:
    """Images of 96 x 96 pixels with an expression each."""
    return tuple(cases(count))


def work_of(images: Sequence[Image.Image], *questions: str | Question, **options: Any) -> Work:
    """A request; expressions as texts, options of `AskOptions.of` and of `Work`."""
    own = {name: options.pop(name) for name in ("keep", "deadline", "trace") if name in options}
    return Work(
        questions=tuple(Expression(each) if isinstance(each, str) else each for each in questions),
        open_images=lambda: list(images),
        images=len(images),
        options=AskOptions.of(**options),
        **own,
    )


def talk(*texts: str, images: int = 1) -> Conversation:
    """A conversation: texts of the user and the assistant, images with the first."""
    roles = ("user", "assistant")
    turns = [
        Turn(roles[number % 2], text, 0 if number else images)  # type: ignore[arg-type]
        for number, text in enumerate(texts)
    ]
    return Conversation(tuple(turns))


def facts(result: Any) -> Facts:
    """Everything of an answer but how long it took."""
    assert isinstance(result, Result), result
    return (
        result.text,
        result.ids,
        result.finish_reason,
        result.boxes,
        result.kept_indices.tolist(),
        result.prompt_tokens,
    )


def alone(model: Model, work: Work, number: int, keep: float | None = None) -> Facts:
    """What a request of one question is answered with, by a model that does nothing else.

    Args:
        model: loaded.
        work: with images that can be opened again.
        number: of the question.
        keep: fraction of the visual tokens, in place of the request's.
    """
    keep = work.keep if keep is None else keep
    images, question = list(work.open_images()), work.questions[number]
    conversation, prompt = isinstance(question, Conversation), None
    with model.session.turn():
        if isinstance(question, Expression) and work.options.sampling.is_greedy:
            shown = images[0] if len(images) == 1 else tuple(images)
            answer = model.ground(shown, question.text, keep=keep, max_new_tokens=work.options.max_new_tokens)
            told = model.grounder.prompts([question.text]).input_ids[0]
            placeholders = int((told == model.bundle.manifest.prompt.image_token_id).sum())
            return (
                answer.text,
                None,
                answer.finish_reason,
                answer.boxes,
                answer.kept_indices.tolist(),
                int((told >= 0).sum()) - placeholders,
            )
        assert conversation, "expressions that are sampled have nothing to be compared with"
        prompt = model.prompts.tokens.prompt(question.turns, None).ids
        seen, left = [], images
        for turn in question.turns:
            if turn.images:
                text_ids = model.prompts.text_ids(turn.text, whole=False)
                seen += model.prompts.seen_images(left[: turn.images], keep, text_ids)
                left = left[turn.images :]
        longest = work.options.max_new_tokens or model.bundle.manifest.max_new_tokens
        held = ConversationCache(model.session, model.bundle.manifest)
        logits_V = held.read(prompt, seen, longest)
        text, ids, reason = TextStream(model.grounder.tokenizer, work.options.stop), [], "length"
        met = {model.bundle.manifest.prompt.image_token_id if id_ < 0 else id_ for id_ in prompt}
        while True:
            token = choose(logits_V, work.options.sampling, met, len(ids))
            if token in model.bundle.manifest.prompt.eos_token_ids:
                reason = "stop"
                break
            ids.append(token)
            met.add(token)
            text.push(token)
            if text.stopped or len(ids) == longest:
                break
            logits_V = held.step(token)
        text.finish()
        kept = seen[-1].kept_indices()[-1].tolist() if seen else []
        boxes = model.grounder.boxes_in(text.text, images[-1].size) if images else ()
        words = sum(id_ >= 0 for id_ in prompt)
        return (text.text, tuple(ids), "stop" if text.stopped else reason, boxes, kept, words)


def equal(mine: Facts, theirs: Facts) -> bool:
    """Whether two answers are the same; ids where both tell them."""
    told = [number for number in range(len(mine)) if theirs[number] is not None]
    return all(mine[number] == theirs[number] for number in told)


@dataclass
class Held:
    """A session that waits before it computes, until it is let go.

    Attributes:
        waits: whether somebody waits for it.
        calls: names of what it was asked.
    """

    go: threading.Event = field(default_factory=threading.Event)
    waits: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)


@contextmanager
def held(session: Any, *names: str) -> Iterator[Held]:
    """Methods of a session wait until they are let go."""
    state, before = Held(), {name: getattr(session, name) for name in names}

    def waiting(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            state.calls.append(name)
            state.waits.set()
            assert state.go.wait(WAIT)
            return before[name](*arguments, **named)

        return call

    for name in names:
        setattr(session, name, waiting(name))
    try:
        yield state
    finally:
        state.go.set()
        for name in names:
            delattr(session, name)


def soon(check: Callable[[], bool]) -> bool:
    """Whether something becomes so within the time that tests wait."""
    pause = threading.Event()
    for _ in range(int(WAIT * 200)):
        if check():
            return True
        pause.wait(0.005)
    return False


def assert_empty(engine: Engine) -> None:
    """Every row is free, and no request and no image is left anywhere."""
    assert engine.drain(WAIT)
    assert soon(lambda: engine._queue.prepared == 0), "images that were given up are decoded to their end"
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine.used_slots == 0
    assert not engine._queue._unprepared
    assert engine._spare is None or not engine._queue._ready


def noise(seed: int, width: int = 36, height: int = 36) -> Image.Image:
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(samples)
