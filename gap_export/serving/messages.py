"""What was asked in a conversation, read again from the messages that were sent: for whoever checks its receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.environment import check_serve_extra
from gap_export.errors import InputError
from gap_export.files import kinds, read_json
from gap_export.inputs.chat.conversation import check_conversation
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.serving.work import Conversation

Messages = Sequence[Mapping[str, Any]] | Mapping[str, Any] | Path | str
"""OpenAI's `messages`, the whole body of a request, or a JSON file of either."""


@dataclass(frozen=True)
class Sent:
    """How an answer was to be made, as the body of a request says it.

    Attributes:
        options: of the answer.
        keep: fraction of the visual tokens; None where the request chose none.
    """

    options: AskOptions
    keep: float | None


@dataclass(frozen=True)
class SentConversation:
    """A conversation as it was sent.

    Attributes:
        conversation: that was asked; of its images the places alone.
        sent: what else the request said; None where the messages alone are given.
    """

    conversation: Conversation
    sent: Sent | None


def read_messages(source: Messages) -> SentConversation:
    """A conversation, from the messages that were sent, read as the server reads them.

    Args:
        source: of them. Images in them are not looked at: their addresses may be left empty.

    Raises:
        InputError: they cannot be read, or are no conversation.
        MissingRequirementError: the serve extra is not installed.
    """
    check_serve_extra("messages of a conversation")
    from gap_export.serving.http.errors import HttpError
    from gap_export.serving.http.fields import checked
    from gap_export.serving.http.openai_fields import NOT_IMPLEMENTED, ChatRequest, conversation_of

    content: Any = source
    if isinstance(source, str | Path):
        content = read_json(Path(source), kinds.MESSAGES)
    body = {"model": "", **content} if isinstance(content, Mapping) else {"model": "", "messages": content}
    if isinstance(body.get("messages"), tuple):
        body["messages"] = list(body["messages"])
    try:
        asked = checked(ChatRequest, body, not_implemented=NOT_IMPLEMENTED)
        turns, _ = conversation_of(asked)
        options = asked.options
    except HttpError as error:
        subject = str(source) if isinstance(source, str | Path) else "messages"
        raise InputError(
            f"cannot be read: {error.message}", subject=subject, hint=kinds.MESSAGES.hint
        ) from error
    check_conversation(turns)
    keep = None if asked.gap is None else asked.gap.keep
    return SentConversation(
        Conversation(turns), Sent(options, keep) if isinstance(content, Mapping) else None
    )
