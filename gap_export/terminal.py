"""Text on its way to a terminal, where it is text: names of files, tokens, expressions and nodes come from outside.

Square brackets are no markup here, and control characters are written as escapes. Style is given beside the text, never in it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from gap_export.errors import OutputError

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""What moves the cursor, changes colours, turns the direction of writing, or is half a character; not tabs and line feeds."""


class Terminal(Console):
    """A console that shows every text as it is: no markup, no emoji, no control characters.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every plain string that is printed passes here, in tables and titles too."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print to a stream; messages that cannot be written are let go, and the work is finished.

        Raises:
            OutputError: results cannot be written.
        """
        with self._writing():
            super().print(*objects, **options)

    def write_line(self, text: str) -> None:
        """Write a line as it is, for programs.

        Raises:
            OutputError: it cannot be written.
        """
        with self._writing():
            self.file.write(f"{text}\n")
            self.file.flush()

    def write_piece(self, text: str) -> None:
        """Write a part of a line at once, with what cannot be seen as escapes.

        Args:
            text: follows what was written before, and ends no line of its own accord.

        Raises:
            OutputError: it cannot be written.
        """
        with self._writing():
            self.file.write(visible(text))
            self.file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.stderr:
                raise lost_output(error) from error

    def on_broken_pipe(self) -> None:
        """Say so as of any other stream that takes no more; rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Print parts of one paragraph, each plain or `(text, style)`; the terminal breaks it, not we, so that it can be copied."""
        self.print(styled(*parts), soft_wrap=True)


def lost_output(error: OSError) -> OutputError:
    """The error of an answer that could not be written to standard output."""
    return OutputError(
        f"cannot be written: {error.strerror}",
        subject="standard output",
        hint="the answer is not complete; what was written to files is",
    )


def styled(*parts: str | tuple[str, str]) -> Text:
    """Parts, each plain or `(text, style)`, as one text."""
    return Text.assemble(
        *(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts)
    )


def visible(text: str) -> str:
    r"""The text with what cannot be seen written as escapes: `\x1b`, `\u202e`, `\udcff`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text, visible, with its line breaks and tabs written as escapes too."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")
