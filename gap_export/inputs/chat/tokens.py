"""From a conversation to token ids. What the model has said keeps the ids that it was said in: encoded anew, a text may be split otherwise.

Earlier answers are put into the rendered conversation where the template writes them as they are; an answer that a template rewrites (some leave out
what a model thought aloud) is encoded from the text that it writes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

from gap_export.errors import InputError, named
from gap_export.inputs.chat.conversation import Turn, check_conversation, messages_of
from gap_export.inputs.chat.format import ChatFormat, with_image_text
from gap_export.inputs.chat.plain_words import PlainWords
from gap_export.inputs.tokenizer import ids_in_front

IMAGE = -2
"""Stands for an image among token ids. The placeholder's own id may be generated, and is a word then."""

_CONTEXT = 64
"""Characters before a text that decide how its beginning is split into tokens."""


class RendersAll(Protocol):
    """Whatever renders several conversations at once; see `renderer.Renderer`."""

    def render_all(self, conversations: Sequence[tuple[list[dict[str, object]], bool]]) -> list[str]:
        """The text of each."""
        ...


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation, between what the model said.

    Attributes:
        text: as rendered.
        ids: of its tokens, `IMAGE` for every image.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Said:
    """An answer as it was given.

    Attributes:
        before: what was rendered between the answer before it and this one.
        text: as shown.
        ids: that it was generated in.
    """

    before: Piece
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A conversation, ready for the model.

    Attributes:
        ids: of the whole, `IMAGE` for every image.
        last: what follows the last answer; the whole where there is none.
    """

    ids: tuple[int, ...]
    last: Piece


class ChatTokens:
    """Conversations to token ids, by the template of one bundle.

    Args:
        tokenizer: of the prompt.
        chat: how the template is used.
        renderer: of the template.
        image_token_id: the placeholder's id.
        end_token_ids: ids that end an answer.
        vocabulary: rows of the decoder's token embedding.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        renderer: RendersAll,
        *,
        image_token_id: int,
        end_token_ids: Collection[int],
        vocabulary: int,
    ) -> None:
        self._chat, self._renderer = chat, renderer
        self._image_token_id, self._vocabulary = image_token_id, vocabulary
        self._tokenizer = tokenizer
        self._words = PlainWords(tokenizer, {image_token_id, *end_token_ids})
        self._start = ids_in_front(tokenizer)

    def prompt(self, turns: Sequence[Turn], said: Sequence[Said] | None = None) -> Prompt:
        """Token ids of a conversation that the user spoke last in.

        Args:
            turns: of the conversation; texts of its assistant are those of `said`.
            said: every answer in it, in order; None where they are known by their texts alone, and encoded from those.

        Raises:
            InputError: a conversation that cannot be answered, a template that refuses it, or a token without an embedding.
        """
        check_conversation(turns)
        rendered, kept = ([self._rendered(turns)], []) if said is None else self._render(turns, said)
        pieces: list[Piece] = []
        ids: list[int] = []
        for number, text in enumerate(rendered):
            if number < len(kept) and text.rstrip() == kept[number].before.text.rstrip():
                piece = kept[
                    number
                ].before  # as it was read, also where answers have a blank before them later on
            else:
                piece = self._piece(text, kept[number - 1].text if number else None)
            pieces.append(piece)
            ids += piece.ids
            if number < len(kept):
                ids += kept[number].ids
        images = sum(turn.images for turn in turns)
        if ids.count(IMAGE) != images:
            raise InputError(
                f"writes {ids.count(IMAGE)} times {named(self._chat.image_token)} for {images} images",
                subject=self._chat.source,
                hint="compare the template with the one that was published",
            )
        if not ids:
            raise InputError(
                "writes nothing of the conversation",
                subject=self._chat.source,
                hint="compare the template with the one that was published",
            )
        return Prompt(tuple(ids), pieces[-1])

    def continued(self, before: str, text: str) -> tuple[int, ...]:
        """Token ids of a text of the model's own that stands behind another, neither of which is a template's."""
        return self._piece(self._words.hide(text), before).ids if text else ()

    def _rendered(self, turns: Sequence[Turn]) -> str:
        """The whole of a conversation."""
        hidden = [Turn(turn.role, self._words.hide(turn.text), turn.images) for turn in turns]
        return self._texts([hidden])[0]

    def _render(self, turns: Sequence[Turn], said: Sequence[Said]) -> tuple[list[str], list[Said]]:
        """The pieces of a rendered conversation between those answers that the template writes as they are, and these answers."""
        hidden = [Turn(turn.role, self._words.hide(turn.text), turn.images) for turn in turns]
        places = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        assert len(places) == len(said)
        markers = [self._words.marker(number) for number in range(len(said))]

        def with_markers(marked: Sequence[int]) -> list[Turn]:
            changed = list(hidden)
            for number in marked:
                changed[places[number]] = Turn("assistant", markers[number])
            return changed

        everything = list(range(len(said)))
        whole, marked = self._texts([hidden, with_markers(everything)])
        as_is = everything
        if self._unmarked(marked, everything, hidden, places, markers) != whole:
            alone = self._texts([with_markers([number]) for number in everything])
            as_is = [
                number
                for number in everything
                if self._unmarked(alone[number], [number], hidden, places, markers) == whole
            ]
            (marked,) = self._texts([with_markers(as_is)])
            if self._unmarked(marked, as_is, hidden, places, markers) != whole:
                marked, as_is = whole, []
        texts = []
        for number in as_is:
            before, _, marked = marked.partition(markers[number])
            texts.append(before)
        return [*texts, marked], [said[number] for number in as_is]

    @staticmethod
    def _unmarked(
        text: str, marked: Sequence[int], turns: Sequence[Turn], places: Sequence[int], markers: Sequence[str]
    ) -> str | None:
        """A text with its answers in the place of their markers; None where those are not there once each, in order."""
        positions = [text.find(markers[number]) for number in marked]
        if positions != sorted(positions) or any(text.count(markers[number]) != 1 for number in marked):
            return None
        for number in marked:
            text = text.replace(markers[number], turns[places[number]].text)
        return text

    def _texts(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """Rendered, with what surrounds images."""
        chat = self._chat
        rendered = self._renderer.render_all(
            [
                (messages_of(turns, chat.content, f"{chat.image_text}{chat.separator}"), True)
                for turns in conversations
            ]
        )
        return [with_image_text(text, chat.image_token, chat.image_text) for text in rendered]

    def _piece(self, text: str, before: str | None) -> Piece:
        """A rendered text and its tokens.

        Args:
            text: as rendered.
            before: the answer that it follows; None at the beginning of the conversation.
        """
        revealed = self._words.revealed(text)
        if before is None:
            ids = list(self._words.encode(revealed).ids)
            begins = ids[: len(self._start)] == self._start
            if not begins or self._chat.begins_twice:
                ids = self._start + ids
        else:
            ids = self._continued(before[-_CONTEXT:], revealed)
        for id_ in ids:
            if id_ >= self._vocabulary and id_ != self._image_token_id:
                raise InputError(
                    f"has the token {id_} ({self._tokenizer.id_to_token(id_)!r}), and the model has an embedding of {self._vocabulary} tokens",
                    subject="the conversation",
                    hint="use other words: tokenizer and model do not belong together",
                )
        return Piece(text, tuple(IMAGE if id_ == self._image_token_id else id_ for id_ in ids))

    def _continued(self, before: str, text: str) -> list[int]:
        """Token ids of a text behind another: as they are split where both are one text, if a token begins between them."""
        whole = self._words.encode(before + text)
        border = len(before)
        spans = list(zip(whole.ids, whole.offsets, strict=True))
        if all(last <= border or first >= border for _, (first, last) in spans):
            return [id_ for id_, (first, last) in spans if first >= border and last > border]
        return list(self._words.encode(text).ids)
