"""Conversations with a bundle that are watched: what was said, with which logits, and where every token was put.

Shape letters: S tokens in the cache, R rows of position ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.positions import Ids, Placement
from gap_export.runtime.answer.sampling import choose
from gap_export.runtime.conversation import chat as chat_module
from gap_export.runtime.conversation.cache import SeenImages
from gap_export.runtime.conversation.chat import Chat, Reply
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.session import Prefilled, Session

Mislead = Callable[[Placement], Placement]
"""Changes where tokens are put."""


@dataclass(frozen=True)
class Question:
    """One turn of the user."""

    text: str
    images: tuple[Image.Image, ...] = ()
    focus: str | None = None


class Watched:
    """A session that notes where tokens are put.

    Args:
        session: watched.
        mislead: changes placements first.

    Attributes:
        encoded: how often images were.
        fed: slot -> position ids of the token in it.
        fed_alone: slot -> slots in all stages, of tokens that were read one by one.
    """

    def __init__(self, session: Session, mislead: Mislead | None = None) -> None:
        self._session, self._mislead = session, mislead
        self.encoded = 0
        self.fed: dict[int, tuple[int, ...]] = {}
        self.fed_alone: dict[int, tuple[int, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def encode(self, *given: Any, **options: Any) -> Any:
        self.encoded += 1
        return self._session.encode(*given, **options)

    def prefill(self, embeds: Any, placement: Placement, **options: Any) -> Prefilled:
        return self._session.prefill(embeds, self._noted(placement), **options)

    def append(self, embeds: Any, placement: Placement) -> NDArray[np.float32]:
        return self._session.append(embeds, self._noted(placement))

    def step(self, ids: Ids, placement: Placement) -> NDArray[np.float32]:
        return self._session.step(ids, self._noted(placement))

    def _noted(self, placement: Placement) -> Placement:
        placement = placement if self._mislead is None else self._mislead(placement)
        first = int(placement.write_index[0])
        ids_RS = placement.position_ids.reshape(-1, placement.position_ids.shape[-1])
        self.fed = {slot: ids for slot, ids in self.fed.items() if slot < first}
        self.fed |= {first + place: tuple(column) for place, column in enumerate(ids_RS.T.tolist())}
        if ids_RS.shape[1] == 1:
            self.fed_alone[first] = (first, *(int(slot[0]) for slot in placement.stage_write_index))
        return placement


@dataclass
class Talk:
    """A conversation.

    Attributes:
        questions: asked.
        replies: to every one.
        logits: of every reply, [n, V] that its tokens were chosen by.
        watched: the session.
        chat: the conversation itself.
    """

    questions: Sequence[Question]
    chat: Chat
    watched: Watched
    replies: list[Reply] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Ids of every reply."""
        return [reply.ids for reply in self.replies]

    @property
    def seen(self) -> list[SeenImages]:
        """Images, in the calls that they were encoded in."""
        return self.chat._state.seen

    @property
    def ids(self) -> tuple[int, ...]:
        """What was read, as far as it was: all but the last token."""
        return self.chat._cache.context.ids


def talk(
    prompts: ChatPrompts,
    session: Session,
    questions: Sequence[Question],
    new_tokens: int,
    *,
    forced: Sequence[Sequence[int]] | None = None,
    mislead: Mislead | None = None,
    **options: Any,
) -> Talk:
    """Ask one question after the other.

    Args:
        prompts: of the bundle.
        session: that answers.
        questions: from the first on.
        new_tokens: of every answer.
        forced: what is answered, whatever the logits say.
        mislead: changes where tokens are put.
        options: of `Chat`.
    """
    watched = Watched(session, mislead)
    made = Talk(questions, Chat(prompts, watched, **options), watched)  # type: ignore[arg-type]
    for number, question in enumerate(questions):
        logits: list[NDArray[np.float32]] = []
        given = None if forced is None else forced[number]

        def chosen(
            logits_V: NDArray[np.float32],
            *rest: Any,
            into: list[NDArray[np.float32]] = logits,
            given: Sequence[int] | None = given,
        ) -> int:
            into.append(logits_V.copy())
            return choose(logits_V, *rest) if given is None else given[len(into) - 1]

        with patch.object(chat_module, "choose", chosen):
            reply = made.chat.ask(
                question.text,
                images=list(question.images),
                focus=question.focus,
                max_new_tokens=new_tokens,
            )
        assert len(reply.ids) == len(logits) == new_tokens
        assert reply.finish_reason == "length"
        made.replies.append(reply)
        made.logits.append(np.stack(logits))
    return made


# Wrong on purpose


def at_the_slot(placement: Placement) -> Placement:
    """Answers are numbered by their slots: the ids go on at the kept length."""
    if placement.position_ids.shape[-1] > 1:
        return placement
    ids = np.broadcast_to(placement.write_index[:, None], placement.position_ids.shape)
    return replace(placement, position_ids=np.array(ids))


def one_further(placement: Placement) -> Placement:
    """All that comes after the first prompt is moved by one."""
    moved = 0 if placement.write_index[0] == 0 else 1
    return replace(placement, position_ids=placement.position_ids + moved)
