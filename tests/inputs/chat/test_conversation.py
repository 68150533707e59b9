"""Conversations that can be answered, and the forms in which templates read them."""

from __future__ import annotations

import pytest

from gap_export.errors import InputError
from gap_export.inputs.chat.conversation import (
    LONGEST_TEXT,
    Turn,
    check_conversation,
    check_text,
    messages_of,
)

ASKED = [
    Turn("system", "Be kind."),
    Turn("user", "What is it?", 2),
    Turn("assistant", ""),
    Turn("user", "Why?"),
]


@pytest.mark.parametrize("first", range(4))
def test_what_alternates_and_ends_with_a_question_is_a_conversation(first: int) -> None:
    if ASKED[first].role != "assistant":
        check_conversation(ASKED[first:])
        check_conversation([*ASKED[first:], Turn("assistant", "x"), Turn("user", "y")])


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "the conversation: is empty"),
        (ASKED[:3], "ends with a turn of the assistant"),
        (ASKED[:1], "ends with a turn of the system"),
        (ASKED[2:], "turn 1: is the assistant's where the user's is due"),
        ([ASKED[1], ASKED[3]], "turn 2: is the user's where the assistant's is due"),
        ([*ASKED[1:3], ASKED[2], ASKED[3]], "turn 3: is the assistant's where the user's is due"),
        ([ASKED[1], ASKED[0], ASKED[3]], "turn 2: is the system's where the assistant's is due"),
        ([ASKED[0], ASKED[0], ASKED[3]], "turn 2: is the system's where the user's is due"),
        ([Turn("system", " "), ASKED[3]], "the system prompt: is empty"),
        ([Turn("user", "", 1)], "the question: is empty"),
        ([ASKED[1], ASKED[2], Turn("user", "\u200b\n")], "the question: is empty"),
    ],
)
def test_another_order_is_refused_by_the_turn(turns: list[Turn], message: str) -> None:
    with pytest.raises(InputError) as refused:
        check_conversation(turns)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("text", ["x", "  x\n", "❤", "</s>", "x" * LONGEST_TEXT, "\ufeffx"])
def test_a_text_is_given_back_as_it_is(text: str) -> None:
    assert check_text(text, "the question") is text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x", "is of type bytes"),
        (None, "is of type NoneType"),
        ("x" * (LONGEST_TEXT + 1), f"has {LONGEST_TEXT + 1} characters"),
        ("a\ud800", "is not valid text"),
        ("a\0b", "contains a NUL character"),
        ("", "is empty"),
        (" \t\n\u3000", "is empty"),
        ("\x1b\x07", "is empty"),
    ],
)
def test_what_is_no_text_is_refused(text: object, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check_text(text, "the question")
    assert str(refused.value).startswith("input: the question: " + message)
    assert "\n" not in str(refused.value)


def test_templates_of_parts_read_images_and_texts() -> None:
    system, user, assistant, _ = messages_of(ASKED, "parts", "not written")
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    assert user["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


def test_where_a_template_writes_nothing_for_images_they_stand_in_the_text() -> None:
    texts = ["Be kind.", "<i>\n<i>\nWhat is it?", "", "Why?"]
    assert [each["content"] for each in messages_of(ASKED, "text", "<i>\n")] == texts
    parts = [each["content"] for each in messages_of(ASKED, "parts_without_images", "<i>\n")]
    assert parts == [[{"type": "text", "text": text}] for text in texts]
