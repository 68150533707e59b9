"""Answers read as they are made, ended early, dropped, and ended by strings: what was shown is what was said."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import SessionError
from gap_export.inputs.chat.conversation import Turn
from gap_export.inputs.chat.tokens import IMAGE, Said
from gap_export.runtime.conversation.chat import Chat, Reply
from gap_export.runtime.model import Model, load
from tests.runtime.conversation.conftest import OpenModel, Pixels
from tests.runtime.conversation.talking import QUESTIONS, facts, ids_of, read_at_once, spied, talk

LONG = 16
"""Tokens of answers in which there is enough to be shown."""


@pytest.fixture
def model(open_model: OpenModel) -> Model:
    return open_model()


@pytest.fixture
def whole(model: Model, images: list[Pixels]) -> Reply:
    """The first answer, to its end."""
    return model.ask(QUESTIONS[0], images[0], max_new_tokens=LONG)


def ids_read(model: Model, *said: list[int]) -> list[int]:
    """Of the first question about an image and those that follow, with these answers."""
    ids = [1, *ids_of(model, "USER :"), IMAGE, *ids_of(model, f"{QUESTIONS[0]} ASSISTANT :")]
    for number, answer in enumerate(said[:-1], 1):
        ids += [*answer, *ids_of(model, f"USER : {QUESTIONS[number]} ASSISTANT :")]
    return ids + said[-1]


def told_as(model: Model, chat: Chat, text: str, ids: list[int]) -> Chat:
    """A conversation whose first answer was told in these ids, however it came about."""
    other = read_at_once(model, chat)
    said = other._state.said[0]
    other._state.said[0] = Said(said.before, text, tuple(ids))
    other._state.turns[1] = Turn("assistant", text)
    return other


def test_pieces_are_the_text_of_the_answer(model: Model, whole: Reply, images: list[Pixels]) -> None:
    stream = model.stream(QUESTIONS[0], images[0], max_new_tokens=LONG)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.reply.text == whole.text
    assert facts(stream.reply) == facts(whole)
    assert list(stream) == []
    assert stream.ended
    with model.stream(QUESTIONS[0], images[0], max_new_tokens=LONG) as again:
        first = next(again)
        assert facts(again.reply) == facts(whole), "the rest is made at once"
    assert whole.text.startswith(first)


def test_what_is_not_read_is_not_made(model: Model, images: list[Pixels]) -> None:
    with spied(model.session) as calls:
        stream = model.stream(QUESTIONS[0], images[0])
        assert not calls.names
        next(stream)
        made = calls.count("step")
        assert calls.count("prefill") == 1
        stream.close()
        assert calls.count("step") == made


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_a_stream_closed_half_way_leaves_what_was_shown(
    shown: int, model: Model, whole: Reply, images: list[Pixels]
) -> None:
    chat = model.chat(images[0])
    stream = chat.stream(QUESTIONS[0], max_new_tokens=LONG)
    pieces = [next(stream) for _ in range(shown)]
    stream.close()
    stream.close()
    reply = stream.reply
    assert reply.text == "".join(pieces)
    assert reply.finish_reason == "closed"
    assert reply.ids == whole.ids[: len(reply.ids)]
    assert model.prompts.tokenizer.decode(reply.ids, skip_special_tokens=True) == reply.text
    assert chat.turns[-1] == Turn("assistant", reply.text)
    assert list(stream) == []
    other = told_as(model, chat, reply.text, list(reply.ids))
    second = chat.ask(QUESTIONS[1])
    assert facts(second) == facts(other.ask(QUESTIONS[1]))
    context = ids_read(model, list(reply.ids), list(second.ids))
    assert list(chat._cache.context.ids) == context[:-1]


def test_leaving_with_closes(model: Model, images: list[Pixels]) -> None:
    chat = model.chat(images[0])
    with chat.stream(QUESTIONS[0]) as stream:
        next(stream)
    assert stream.reply.finish_reason == "closed"
    assert len(chat.turns) == 2


def test_text_that_was_held_back_was_not_shown(model: Model, whole: Reply, images: list[Pixels]) -> None:
    """A stop string may have begun: where its reader ends the answer, that was never given."""
    words = whole.text.split(" ")
    chat = model.chat(images[0])
    stream = chat.stream(QUESTIONS[0], stop=f"{words[1]} {words[2]} never", max_new_tokens=LONG)
    shown = ""
    while words[2] not in model.prompts.tokenizer.decode(stream._ids):
        shown += stream._advance()
    stream.close()
    assert stream.reply.text == shown == f"{words[0]} "
    assert stream.reply.ids == whole.ids[: len(stream.reply.ids)]
    assert facts(told_as(model, chat, shown, list(stream.reply.ids)).ask("a ?")) == facts(chat.ask("a ?"))


def test_a_stream_that_was_dropped_was_never_asked(model: Model, images: list[Pixels]) -> None:
    expected = talk(model.chat(), images[0])
    chat = model.chat()
    for question, image in zip(QUESTIONS, (images[0], None, None, None), strict=True):
        for pieces in (0, 1, 4):
            stream = chat.stream("what is in a picture ?", images=images[1], max_new_tokens=20)
            for _ in range(pieces):
                next(stream)
            assert not stream.ended
            del stream
        before = len(chat.turns)
        told = facts(chat.ask(question, images=image))
        assert told == expected[before // 2]


def test_a_second_question_waits_for_the_first_answer(
    model: Model, whole: Reply, images: list[Pixels]
) -> None:
    chat = model.chat(images[0])
    stream = chat.stream(QUESTIONS[0], max_new_tokens=LONG)
    next(stream)
    for ask in (chat.ask, chat.stream):
        with pytest.raises(SessionError, match="the last answer of this conversation: is still being read"):
            ask(QUESTIONS[1])
    assert facts(stream.reply) == facts(whole)
    chat.ask(QUESTIONS[1])
    assert len(chat.turns) == 4


def test_streams_of_two_conversations_are_read_in_turns(open_model: OpenModel, images: list[Pixels]) -> None:
    for backend in ("onnxruntime", "openvino", "torch"):
        model = open_model(backend)
        alone = [talk(model.chat(), image, QUESTIONS[:2]) for image in images[:2]]
        chats = [model.chat(image) for image in images[:2]]
        for turn in range(2):
            streams = [chat.stream(QUESTIONS[turn]) for chat in chats]
            with spied(model.session) as calls:
                pieces = in_turns(streams)
            assert calls.count("encode") == (0 if turn else 2), "images are encoded once"
            for number, stream in enumerate(streams):
                assert facts(stream.reply) == alone[number][turn]
                assert "".join(pieces[number]) == stream.reply.text


def in_turns(streams: list[Iterator[str]]) -> list[list[str]]:  # type: ignore[type-arg]
    pieces: list[list[str]] = [[] for _ in streams]
    left = dict(enumerate(streams))
    while left:
        for number, stream in list(left.items()):
            piece = next(stream, None)
            if piece is None:
                del left[number]
            else:
                pieces[number].append(piece)
    return pieces


def test_an_answer_that_finds_its_cache_taken_reads_it_again(
    model: Model, whole: Reply, images: list[Pixels]
) -> None:
    stream = model.stream(QUESTIONS[0], images[0], max_new_tokens=LONG)
    for _ in range(LONG):
        model.ground(images[1], "a cat")
        with spied(model.session) as calls:
            if next(stream, None) is None:
                break
        assert calls.count("prefill") == 1
        assert calls.count("encode") == (0 if len(stream._ids) > 1 else 1)
    assert facts(stream.reply) == facts(whole)


@pytest.mark.parametrize("inside", [False, True])
def test_stop_strings_end_answer_history_and_cache(
    inside: bool, model: Model, whole: Reply, images: list[Pixels]
) -> None:
    words = whole.text.split(" ")
    stop = words[3][1:] if inside and len(words[3]) > 1 else words[3]
    shown = whole.text[: whole.text.index(stop)]
    chat = model.chat(images[0])
    stream = chat.stream(QUESTIONS[0], stop=["never", stop], max_new_tokens=LONG)
    assert "".join(stream) == shown
    reply = stream.reply
    assert (reply.text, reply.finish_reason) == (shown, "stop")
    # Special tokens that were generated have no text.
    counts = [
        len(model.prompts.tokenizer.decode(whole.ids[:n], skip_special_tokens=True)) for n in range(LONG)
    ]
    full = max(n for n, length in enumerate(counts) if length <= len(shown))
    rest = shown[counts[full] :]
    expected = [*whole.ids[:full], *ids_of(model, rest)]
    assert list(reply.ids) == expected
    assert chat.turns[-1] == Turn("assistant", shown)
    second = chat.ask(QUESTIONS[1])
    assert list(chat._cache.context.ids) == ids_read(model, expected, list(second.ids))[:-1]
    assert facts(told_as(model, chat, shown, expected).ask(QUESTIONS[2])) == facts(chat.ask(QUESTIONS[2]))


def test_a_stop_string_that_comes_with_the_last_token(
    model: Model, whole: Reply, images: list[Pixels]
) -> None:
    last = whole.text.split(" ")[-1]
    reply = model.ask(QUESTIONS[0], images[0], stop=f" {last}", max_new_tokens=LONG)
    assert reply.finish_reason == "stop"
    assert reply.text == whole.text[: whole.text.index(f" {last}")]


def test_a_session_closed_in_the_middle_is_one_error(
    chat_bundle: Callable[..., Bundle], images: list[Pixels]
) -> None:
    model = load(chat_bundle(), threads=1)
    chat = model.chat(images[0])
    stream = chat.stream(QUESTIONS[0])
    next(stream)
    model.close()
    with pytest.raises(SessionError, match="is closed"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(SessionError, match="has no answer"):
        stream.reply  # noqa: B018
    stream.close()
    assert chat.turns == ()
    with pytest.raises(SessionError, match="is closed"):
        chat.ask(QUESTIONS[0])


def test_logits_that_are_no_numbers_are_one_error(
    model: Model, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda *given: step(*given) * float("nan"))
    chat = model.chat(images[0])
    with pytest.raises(SessionError, match="not finite"):
        chat.ask(QUESTIONS[0])
    assert chat.turns == ()
