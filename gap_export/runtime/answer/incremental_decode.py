"""Token ids one by one into text that later tokens cannot change.

Text after a place where it can be cut (see `decoder_stages`) is decoded behind an anchor, a token of the vocabulary that stands for
all tokens before, and costs therefore the same at the end of a long answer as at its beginning. Text that cannot be cut comes at the
end, in one piece: exact all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from tokenizers import Tokenizer

from gap_export.inputs.tokenizer import tokenizer_errors
from gap_export.runtime.answer.decoder_stages import StagedText, Stages, read_stages

REPLACEMENT = "\ufffd"

_LONGEST_WINDOW = 8
"""Tokens that are decoded again with every further one while the text ends in a replacement character."""
_OVERLAP = 4
"""Tokens that are enough to hold a character: none has more than four bytes, and a token has at least one."""


class _Anchor(NamedTuple):
    """A token that is complete text by itself, and the length of that text."""

    token: str
    length: int


class IncrementalDecoder:
    """The text of a growing list of token ids, special tokens left out.

    Args:
        tokenizer: of the model.

    Attributes:
        ids: all that were pushed.
        length: characters of text that were given.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
        }
        self._stages = read_stages(tokenizer.decoder)
        self._anchor = None if self._stages is None else self._find_anchor(self._stages)
        if self._anchor is None:
            self._stages = None
        self._staged = StagedText(() if self._stages is None else self._stages.text)
        self.ids: list[int] = []
        self.length = 0
        self._tokens: list[str] = []  # those that have a say in the text
        self._places: list[int] = []  # of those, in `ids`
        self._start = 0  # of the window, in `_tokens`
        self._given = 0  # characters of the window that were given, or lie before what is new in it
        self._joint_counts = [0]  # how many of `_tokens` make exactly ...
        self._joint_ends = [0]  # ... so many characters of the text

    def push(self, id_: int) -> str:
        """Take a token.

        Args:
            id_: of the token; one that is not in the vocabulary has no text.

        Returns:
            The further text that no later token changes; may be empty.

        Raises:
            CheckpointError: the tokenizer cannot decode its own tokens.
        """
        stages, token = self._stages, self._tokenizer.id_to_token(id_)
        self.ids.append(id_)
        if token is None or token in self._special or (stages is not None and stages.lossy and not token):
            return ""
        self._tokens.append(token)
        self._places.append(len(self.ids) - 1)
        if stages is None or stages.may_be_byte(token):
            return ""
        return self._advance(stages, last=False)

    def finish(self) -> str:
        """The rest of the text, when no token follows.

        Raises:
            CheckpointError: the tokenizer cannot decode its own tokens.
        """
        if self._stages is not None:
            return self._advance(self._stages, last=True)
        text = self._whole(len(self._tokens))
        self.length = len(text)
        self._note_joint()
        return text

    def covered(self, length: int) -> tuple[int, int]:
        """Which ids have their text within the first characters.

        Args:
            length: characters of the text that was given.

        Returns:
            How many of `ids`, and how many characters their text has: decoded alone, they give exactly the beginning of the text that
            has so many. They are the most that do where the text can be cut; otherwise they may be fewer.
        """
        joint = bisect_right(self._joint_ends, length) - 1
        count, end = self._joint_counts[joint], self._joint_ends[joint]
        last = joint + 1 == len(self._joint_counts)
        if not (last and self._stages is None):
            until = len(self._tokens) if last else self._joint_counts[joint + 1]
            most = length - end
            whole = self._between(count, until)
            inner = range(count + 1, until)
            inside = bisect_right(inner, most, key=lambda stop: len(self._between(count, stop)))
            for stop in reversed(inner[:inside]):
                text = self._between(count, stop)
                if len(text) <= most and whole.startswith(text):
                    count, end = stop, end + len(text)
                    break
        return self._places[count] if count < len(self._places) else len(self.ids), end

    def _advance(self, stages: Stages, *, last: bool) -> str:
        """Decode the window and give what is new in it, but for a character that may be incomplete."""
        window = self._joined(stages, self._start, len(self._tokens))
        held = stages.lossy and not last and window.endswith(REPLACEMENT)
        settled = len(window) - held
        text = self._staged.push(window[self._given : settled], last=last)
        self._given = settled
        self.length += len(text)
        # Before there is any text, characters may still be taken from its beginning: no joint yet.
        if last or (self.length and not held and not self._staged.waits):
            self._note_joint()
        if not held:
            self._start, self._given = len(self._tokens), 0
        elif len(self._tokens) - self._start > _LONGEST_WINDOW:
            # Bytes that are no text, or tokens that all end inside a character. A window that begins inside a character differs from
            # the whole in its first characters alone, and all but the last character are given.
            self._start = len(self._tokens) - _OVERLAP
            self._given = len(self._joined(stages, self._start, len(self._tokens))) - 1
        return text

    def _note_joint(self) -> None:
        """The text that was given is exactly that of all tokens so far."""
        self._joint_counts.append(len(self._tokens))
        self._joint_ends.append(self.length)

    def _joined(self, stages: Stages, start: int, stop: int) -> str:
        """Text of the tokens from one number to another, where they stand, before the stages that act on text."""
        tokens = self._tokens[start:stop]
        with tokenizer_errors("tokenizer", "cannot decode its own tokens"):
            if start == 0 or self._anchor is None:
                return stages.join(tokens)
            return stages.join([self._anchor.token, *tokens])[self._anchor.length :]

    def _between(self, start: int, stop: int) -> str:
        """Text of the tokens from a joint to another number, if the answer ended there."""
        if self._stages is None or start == 0:
            return self._whole(stop)
        return self._staged.between(self._joined(self._stages, start, stop))

    def _whole(self, stop: int) -> str:
        """Text of the first tokens."""
        ids = [self.ids[place] for place in self._places[:stop]]
        with tokenizer_errors("tokenizer", "cannot decode its own tokens"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _find_anchor(self, stages: Stages) -> _Anchor | None:
        """None where no token is complete text by itself."""
        for id_ in range(self._tokenizer.get_vocab_size()):
            token = self._tokenizer.id_to_token(id_)
            if not token or token in self._special or stages.may_be_byte(token):
                continue
            with tokenizer_errors("tokenizer", "cannot decode its own tokens"):
                text = stages.join([token])
            if REPLACEMENT not in text:
                return _Anchor(token, len(text))
        return None
