"""What a conversation is: turns of a system, a user and an assistant, in the forms that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gap_export.errors import InputError

Role = Literal["system", "user", "assistant"]

Content = Literal["parts", "parts_without_images", "text"]
"""What a template takes as the content of a turn: a list of images and texts; such a list, of whose images it writes nothing; a text."""

LONGEST_TEXT = 1_000_000
"""Characters of a turn."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        text: what is said.
        images: how many images stand before the text.
    """

    role: Role
    text: str
    images: int = 0


def check_text(text: object, subject: str) -> str:
    """Refuse what is no text to ask a model, and give it back where it is.

    Args:
        text: of a turn, with white space as it is.
        subject: what it is, for the message.

    Raises:
        InputError: no text, nothing visible in it, NUL, not valid Unicode, or too long.
    """
    if not isinstance(text, str):
        raise InputError(f"is of type {type(text).__name__}", subject=subject, hint="give a text")
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"has {len(text)} characters, and at most {LONGEST_TEXT} are read",
            subject=subject,
            hint="shorten it",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("is not valid text", subject=subject, hint="give it in UTF-8") from error
    if "\0" in text:
        raise InputError("contains a NUL character", subject=subject, hint="remove it")
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise InputError("is empty", subject=subject, hint="ask something: 'What is on the table?'")
    return text


def check_conversation(turns: Sequence[Turn]) -> None:
    """Refuse a conversation that cannot be answered.

    Args:
        turns: from the first one on; texts of assistants may be empty, as answers may be.

    Raises:
        InputError: its last turn is not the user's, turns do not alternate, or a text is none.
    """
    if not turns or turns[-1].role != "user":
        raise InputError(
            f"ends with a turn of the {turns[-1].role}" if turns else "is empty",
            subject="the conversation",
            hint="end it with a question of the user: there is nothing to answer",
        )
    expected: Role = "user"
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            check_text(turn.text, "the system prompt")
            continue
        if turn.role != expected:
            raise InputError(
                f"is the {turn.role}'s where the {expected}'s is due",
                subject=f"turn {number}",
                hint="a conversation may begin with a system prompt, and user and assistant alternate after it",
            )
        if turn.role == "user":
            check_text(turn.text, "the question")
        expected = "assistant" if turn.role == "user" else "user"


def messages_of(turns: Sequence[Turn], content: Content, image_text: str = "") -> list[dict[str, Any]]:
    """Turns as chat templates read them.

    Args:
        turns: of the conversation.
        content: what the template takes.
        image_text: what is written for an image in front of the text, where the template itself writes nothing for it.

    Returns:
        a message of each turn, with `role` and `content`.
    """
    return [{"role": turn.role, "content": _content_of(turn, content, image_text)} for turn in turns]


def _content_of(turn: Turn, content: Content, image_text: str) -> str | list[dict[str, str]]:
    if content == "parts":
        return [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}]
    whole = image_text * turn.images + turn.text
    return whole if content == "text" else [{"type": "text", "text": whole}]
