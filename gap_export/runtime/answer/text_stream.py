"""The text of an answer while it is generated, up to the first stop string.

All pieces joined are the text of the whole answer, so a piece is shown when neither a later token nor a stop string that may have
begun can change it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from gap_export.errors import InputError, shown
from gap_export.runtime.answer.incremental_decode import IncrementalDecoder

MOST_STOP_STRINGS = 100
LONGEST_STOP_STRING = 1000
"""In characters."""


class TextStream:
    """Token ids in, text out.

    `text` is at any time the beginning of `tokenizer.decode(ids, skip_special_tokens=True)` of all ids pushed, and after `finish` the
    whole of it, or all before the first stop string in it. The stop string that begins first counts, whichever is complete first.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer, wherever they stand in its text.

    Raises:
        InputError: too many stop strings, or one that is empty, too long, or no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._search = _StopSearch(check_stop(stop))
        self._pieces: list[str] = []
        self._shown = 0  # characters of all pieces
        self._waiting = ""
        self._stopped = self._finished = False

    def push(self, id_: int) -> str:
        """Take a generated token.

        Args:
            id_: of the token. After a stop string tokens are left out.

        Returns:
            The further text that can be shown now; may be empty.

        Raises:
            CheckpointError: the tokenizer cannot decode its own tokens.
            RuntimeError: after `finish`.
        """
        if self._finished:
            raise RuntimeError("the answer has ended")
        return "" if self._stopped else self._show(self._decoder.push(id_), last=False)

    def finish(self) -> str:
        """End the answer.

        Returns:
            What was held back; a stop string in it, and all after it, left out.

        Raises:
            CheckpointError: the tokenizer cannot decode its own tokens.
        """
        if self._finished or self._stopped:
            self._finished = True
            return ""
        self._finished = True
        return self._show(self._decoder.finish(), last=True)

    @property
    def text(self) -> str:
        """All pieces."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: it and all after it are not shown."""
        return self._stopped

    @property
    def ids(self) -> list[int]:
        """The first ids pushed whose text lies wholly within `text`; after `finish` without a stop string, all.

        Decoded, they give exactly the beginning of `text`. Tokens that share a character, or a run of bytes, with one that is not
        shown wholly are not among them; special tokens are, as they have no text.
        """
        count, _ = self._decoder.covered(self._shown)
        return self._decoder.ids[:count]

    @property
    def remainder(self) -> str:
        """The end of `text` that `ids` do not have: what stands before a stop string in the tokens that it begins in.

        `tokenizer.decode(ids, skip_special_tokens=True) + remainder == text`, always.
        """
        _, length = self._decoder.covered(self._shown)
        return self.text[length:]

    def _show(self, piece: str, *, last: bool) -> str:
        """Add text that tokens do not change any more, and give what no stop string can take back."""
        self._waiting += piece
        self._search.push(piece)
        settled = self._search.settled(last) - self._shown
        out, self._waiting = self._waiting[:settled], self._waiting[settled:]
        self._stopped = self._search.found(last)
        if out:
            self._pieces.append(out)
            self._shown += len(out)
        return out


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Stop strings from a user; one alone may be given as it is.

    Args:
        stop: at most 100, of 1 to 1,000 characters each.

    Raises:
        InputError: too many, or one that is empty, too long, or no text.
    """
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes | bytearray):
        raise InputError(
            "is not a list of texts",
            subject=f"stop {shown(stop)}",
            hint="give the strings that end an answer",
        )
    if len(stop) > MOST_STOP_STRINGS:
        raise InputError(
            f"are more than {MOST_STOP_STRINGS}",
            subject=f"{len(stop)} stop strings",
            hint="give those that matter",
        )
    for each in stop:
        fault = _fault(each)
        if fault:
            raise InputError(
                fault,
                subject=f"stop string {shown(each)}",
                hint=f"a stop string is a text of 1 to {LONGEST_STOP_STRING} characters",
            )
    return tuple(stop)


def _fault(stop: object) -> str | None:
    """What is wrong with a stop string; None where nothing is."""
    if not isinstance(stop, str):
        return "is not text"
    if not stop:
        return "is empty"
    if len(stop) > LONGEST_STOP_STRING:
        return f"has {len(stop)} characters"
    try:
        stop.encode()
    except UnicodeEncodeError:
        return "is not valid text"
    return None


class _StopSearch:
    """Where the first stop string of a growing text begins.

    Of every stop string it is known how much of it the text ends with. That is kept up to date character by character, and from it
    follows where a stop string may have begun that is not complete yet.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = [(each, _borders(each)) for each in stop]
        self._matched = [0] * len(stop)
        self._length = 0
        self._first: int | None = None  # where the first complete one begins

    def push(self, text: str) -> None:
        """Add to the text."""
        if not self._stop:
            self._length += len(text)
            return
        for character in text:
            self._length += 1
            for number, (stop, borders) in enumerate(self._stop):
                matched = self._matched[number]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    begins = self._length - matched
                    self._first = begins if self._first is None else min(self._first, begins)
                    matched = borders[-1]
                self._matched[number] = matched

    def settled(self, last: bool) -> int:
        """How many characters stand before all stop strings, complete or not; those that are not do not count at the end."""
        ends = [self._length]
        if self._first is not None:
            ends.append(self._first)
        if not last:
            ends.append(self._length - max(self._matched, default=0))
        return min(ends)

    def found(self, last: bool) -> bool:
        """Whether the first stop string is complete, and none that began before it can become so."""
        return self._first is not None and self._first == self.settled(last)


def _borders(text: str) -> list[int]:
    """Of every beginning of a text: how long its longest shorter beginning is that it also ends with."""
    borders = [0] * len(text)
    matched = 0
    for place in range(1, len(text)):
        while matched and text[matched] != text[place]:
            matched = borders[matched - 1]
        matched += text[matched] == text[place]
        borders[place] = matched
    return borders
