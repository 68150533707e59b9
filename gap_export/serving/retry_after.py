"""When whoever was refused should come again: when there will be a place in the queue for them.

A second for everybody has all of them come back every second, and refusing them costs the processor that their answers need. So those who were
refused and have not come back yet stand in line for places, which become free as fast as requests are begun.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LEAST_SECONDS, MOST_SECONDS = 1.0, 30.0
_INTERVALS = 64
"""How many of those between requests that were begun last tell how fast that is."""


class RetryAfter:
    """Times to come again; used under the lock of a queue.

    Args:
        now: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._last: float | None = None
        self._expected: deque[float] = deque()

    def note_begun(self, waiting: int) -> None:
        """A request was begun.

        Args:
            waiting: requests in the queue behind it; without any, the time until the next one is begun tells nothing.
        """
        now = self._now()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now if waiting else None

    def seconds(self) -> float:
        """After how many seconds the one that is refused now should come again."""
        now = self._now()
        while self._expected and self._expected[0] <= now:
            self._expected.popleft()
        seconds = LEAST_SECONDS
        if self._intervals:
            interval = sum(self._intervals) / len(self._intervals)
            seconds = min(MOST_SECONDS, max(LEAST_SECONDS, len(self._expected) * interval))
        # Each is expected no earlier than the one before: the deque stays in order.
        self._expected.append(max(now + seconds, self._expected[-1] if self._expected else 0.0))
        return seconds
