"""A conversation on the command line: a question a line, from a terminal or from standard input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.cli.app import console
from gap_export.cli.replies import Replies, interrupts_noted
from gap_export.errors import InputError
from gap_export.inputs.chat.conversation import LONGEST_TEXT
from gap_export.terminal import one_line

if TYPE_CHECKING:
    from PIL import Image

    from gap_export.runtime.conversation.chat import AskOptions, Chat
    from gap_export.runtime.model import Model

PROMPT = "> "
_COMMANDS = "/image PATH, /focus WORDS, /new, /quit"
_LONGEST_LINE = 4 * LONGEST_TEXT
"""Bytes of a line: those of the longest question."""


class Dialogue:
    """Questions, commands and answers, until the questions end. An error is said, and the conversation stays as it was.

    Args:
        model: that answers.
        replies: prints answers.
        options: how answers are made.
        images: that every conversation begins with.
        system: what the system says.
        keep: fraction of the visual tokens to keep.
        focus: text that visual tokens are chosen by.
    """

    def __init__(
        self,
        model: Model,
        replies: Replies,
        options: AskOptions,
        images: Sequence[Image.Image],
        *,
        system: str | None = None,
        keep: float | None = None,
        focus: str | None = None,
    ) -> None:
        self._model, self._replies, self._options = model, replies, options
        self._first_images = tuple(images)
        self._system, self._keep, self._first_focus = system, keep, focus
        self._chat = self._begun()

    def hold(self) -> None:
        """Answer question after question.

        Raises:
            InputError: standard input had no question, or one that was not answered; each says so by itself before.
            OutputError: standard output takes no more.
            SessionError: the runtime failed.
        """
        is_terminal = _is_terminal(sys.stdin)
        if is_terminal:
            console.say(f"a question a line, or {_COMMANDS}; an empty line or Ctrl-D ends")
        asked = failed = 0
        for line in _lines_of_terminal() if is_terminal else _lines_of_input():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(line):
                        break
                    continue
                asked += 1
                self._answer(line[1:] if line.startswith("/") else line, can_be_ended=is_terminal)
            except InputError as error:
                failed += 1
                console.say((error.stage, "bold red"), one_line(str(error).removeprefix(error.stage)))
        if is_terminal:
            return
        if failed:
            raise InputError(
                "could not be used: each says why above, and the others were answered",
                subject=f"{failed} line{'' if failed == 1 else 's'} of standard input",
                hint="correct them, and ask again",
            )
        if not asked:
            raise InputError(
                "has no question", subject="standard input", hint="give the question, or one a line"
            )

    def _begun(self) -> Chat:
        """A new conversation."""
        self._images: list[Image.Image] = []
        self._focus: str | None = None
        self._size = self._first_images[-1].size if self._first_images else None
        return self._model.chat(
            self._first_images, system=self._system, keep=self._keep, focus=self._first_focus
        )

    def _answer(self, question: str, *, can_be_ended: bool) -> None:
        """Ask, and print the answer; what was said with commands before is asked with it, and again with the next question where it fails."""
        size = self._images[-1].size if self._images else self._size
        with interrupts_noted() if can_be_ended else contextlib.nullcontext() as is_ended:
            stream = self._chat.stream(
                question, images=tuple(self._images), focus=self._focus, options=self._options
            )
            self._replies.show(stream, size, is_ended=is_ended)
        self._images, self._focus, self._size = [], None, size

    def _command(self, line: str) -> bool:
        """Do what a line says; whether the conversation continues.

        Raises:
            InputError: there is no such command, or it cannot be done.
        """
        from gap_export.inputs.images import load_image

        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/image", "/focus") and not rest:
            raise InputError("is given nothing", subject=name, hint=f"commands are {_COMMANDS}")
        if name == "/image":
            self._images.append(load_image(Path(rest)))
        elif name == "/focus":
            self._chat.check_focus(rest)
            self._focus = rest
        elif name == "/new" and not rest:
            self._chat = self._begun()
        elif name == "/quit" and not rest:
            return False
        else:
            raise InputError(
                "is no command",
                subject=name,
                hint=f"commands are {_COMMANDS}; a question that begins with / is written with //",
            )
        return True


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and not getattr(stream, "closed", False) and bool(isatty())


def _lines_of_terminal() -> Iterator[str]:
    """Lines as they are typed, up to an empty one; with the arrow keys, where there is a library for them.

    Ctrl-C at the prompt ends the command as Ctrl-C does.
    """
    shown = _is_terminal(sys.stdout)
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() uses it once it is imported)
    while True:
        if not shown:  # the prompt is no part of what is printed
            console.write_piece(PROMPT)
        try:
            line = input(PROMPT if shown else "").strip()
        except EOFError:
            console.say()
            return
        except UnicodeDecodeError:
            console.say(("input", "bold red"), ": the line is not valid text (give it in UTF-8)")
            continue
        if not line:
            return
        yield line


def _lines_of_input() -> Iterator[str]:
    """Lines of standard input, blank ones left out.

    Raises:
        InputError: one is not UTF-8, or too long.
    """
    if sys.stdin is None:
        return
    number = 0
    while True:
        content = sys.stdin.buffer.readline(_LONGEST_LINE + 1)
        number += 1
        if not content:
            return
        where = f"line {number} of standard input"
        if len(content) > _LONGEST_LINE:
            raise InputError(
                f"has more than {_LONGEST_LINE} bytes", subject=where, hint="give one question a line"
            )
        try:
            line = content.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError("is not valid text", subject=where, hint="give it in UTF-8") from error
        if line:
            yield line
