"""What is told of what an engine does, for whoever counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gap_export.errors import GapExportError
from gap_export.serving.work import Result


class Observer(Protocol):
    """Whoever counts what the engine does, checks of the session left out; called from several threads."""

    def refused(self, reason: str) -> None:
        """A request was not admitted; see `work.Reason`."""
        ...

    def answered(self, result: Result) -> None:
        """An answer was given."""
        ...

    def failed(self, error: GapExportError) -> None:
        """A question that was admitted has an error for an answer; a `Refused` where it was given up."""
        ...

    def stepped(self, seconds: float, intervals: Sequence[float]) -> None:
        """One token of several rows was decoded.

        Args:
            seconds: that the call took.
            intervals: of every row, seconds since its token before.
        """
        ...


class NoObserver:
    """Counts nothing."""

    def refused(self, reason: str) -> None:
        """Nothing."""

    def answered(self, result: Result) -> None:
        """Nothing."""

    def failed(self, error: GapExportError) -> None:
        """Nothing."""

    def stepped(self, seconds: float, intervals: Sequence[float]) -> None:
        """Nothing."""


NO_OBSERVER = NoObserver()
