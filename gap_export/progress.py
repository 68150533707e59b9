"""How far long work is: the one callback between the code that does it and the code that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Is told how far work is.

    It is called from whatever thread does the work. An exception that it raises ends the work: Ctrl-C arrives in this way too.
    """

    def stage(self, message: str, total: int | None = None) -> None:
        """A stage begins.

        Args:
            message: what is being done, in short.
            total: units of work from here on, in this stage and those after it; None where the count continues, or there is none.
        """
        ...

    def advance(self, count: int = 1) -> None:
        """Units of work were finished.

        Args:
            count: how many since the last call.
        """
        ...


class Silent:
    """Shows nothing."""

    def stage(self, message: str, total: int | None = None) -> None:
        """Do nothing."""

    def advance(self, count: int = 1) -> None:
        """Do nothing."""


SILENT: Progress = Silent()


class Prefixed:
    """The stages of work that is one part of other work: their messages say of which, their totals are not the other work's.

    Args:
        progress: of the other work.
        prefix: name of the part.
    """

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def stage(self, message: str, total: int | None = None) -> None:
        """A stage of the part begins."""
        self._progress.stage(f"{self._prefix}: {message}")

    def advance(self, count: int = 1) -> None:
        """Units of the other work were finished."""
        self._progress.advance(count)


class Stages:
    """Tells a function the message of every stage, and nothing else.

    Args:
        tell: the function.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def stage(self, message: str, total: int | None = None) -> None:
        """A stage begins."""
        self._tell(message)

    def advance(self, count: int = 1) -> None:
        """Do nothing."""
