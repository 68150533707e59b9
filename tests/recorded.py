"""Progress that is written down, for tests to look at."""

from __future__ import annotations

from collections.abc import Callable


class Recorded:
    """Keeps what it is told.

    Args:
        then: called after every report with all messages and all counts so far; for tests that stop the work.
    """

    def __init__(self, then: Callable[[Recorded], None] = lambda recorded: None) -> None:
        self.messages: list[str] = []
        self.totals: list[int] = []
        self.counts: list[int] = []
        self._then = then

    def stage(self, message: str, total: int | None = None) -> None:
        self.messages.append(message)
        self.totals += [] if total is None else [total]
        self._then(self)

    def advance(self, count: int = 1) -> None:
        self.counts.append(count)
        self._then(self)
