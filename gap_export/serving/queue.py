"""Requests that were admitted and have not begun: counted before anything of them is read, made ready by a few threads, begun in the order in which they are ready.

    admitted -> being prepared -> ready -> begun
        (a request that is given up leaves from wherever it is, and its place is free at once)

No session is in it, and no image.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gap_export.serving.preparing import Prepared, Prompted
from gap_export.serving.work import Refused, Ticket


@dataclass
class Ready:
    """A request that can be begun.

    Attributes:
        ticket: of it.
        prepared: what it is read from.
        left: its questions that have not begun, at least one.
        keep: fraction of the visual tokens that it is read with, once `keep_chosen`.
        keep_chosen: whether the fraction is settled: when its first question begins, for all of them.
    """

    ticket: Ticket
    prepared: Prepared
    left: deque[Prompted]
    keep: float | None = None
    keep_chosen: bool = False


class Queue:
    """Who waits for what; may be used from any thread.

    Args:
        longest: most requests in it.
        most_prepared: most requests whose images are in memory at once, decoded or being decoded.
    """

    def __init__(self, longest: int, most_prepared: int) -> None:
        self._longest, self._most_prepared = longest, most_prepared
        self._lock = threading.RLock()
        # Threads that decode images are told apart from whoever waits for other things: of rows that become free, say, they need not know.
        self._to_prepare, self._changed = threading.Condition(self._lock), threading.Condition(self._lock)
        self._waiting: dict[int, Ticket] = {}  # all of them, in the order in which they were admitted
        self._unprepared: deque[Ticket] = deque()
        self._ready: deque[Ready] = deque()
        self._being_prepared = 0
        self._closed_because: Refused | None = None
        self._ended = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether nothing more is admitted."""
        return self._closed_because is not None

    @property
    def prepared(self) -> int:
        """Requests whose images are in memory."""
        return self._being_prepared + len(self._ready)

    def oldest_wait(self) -> float:
        """Seconds since the oldest request in it was admitted; 0 where there is none."""
        with self._lock:
            oldest = next(iter(self._waiting.values()), None)
        return 0.0 if oldest is None else max(0.0, time.monotonic() - oldest.admitted)

    def tickets(self) -> list[Ticket]:
        """Of all requests in it, the oldest first."""
        with self._lock:
            return list(self._waiting.values())

    def admit(self, ticket: Ticket) -> Refused | None:
        """Count a request.

        Args:
            ticket: of it.

        Returns:
            Why it is not admitted; None where it is.
        """
        with self._lock:
            refusal = self.refusal()
            if refusal is None:
                self._waiting[ticket.number] = ticket
                self._unprepared.append(ticket)
                self._tell()
            return refusal

    def refusal(self) -> Refused | None:
        """Why a request would not be admitted by now; None where it would."""
        with self._lock:
            because = self._closed_because
            if because is not None:
                return Refused(because.message, reason=because.reason, retry_after=because.retry_after)
            if len(self._waiting) < self._longest:
                return None
            return Refused(
                f"is not admitted: {len(self._waiting)} are waiting, as many as may",
                reason="full",
                retry_after=1.0,
            )

    def close(self, because: Refused) -> None:
        """Admit nothing more; what is in it stays.

        Args:
            because: what others are refused with from now on, unless they are already.
        """
        with self._lock:
            self._closed_because = self._closed_because or because
            self._tell()

    def end(self, because: Refused) -> list[Ticket]:
        """Admit nothing more, and begin nothing more; threads that wait for requests to prepare get none any more.

        Args:
            because: what others are refused with from now on.

        Returns:
            What is in it. Each must be told, and leave.
        """
        with self._lock:
            self._closed_because, self._ended = because, True
            self._unprepared.clear()
            self._ready.clear()
            self._to_prepare.notify_all()
            self._changed.notify_all()
            return list(self._waiting.values())

    def next_unprepared(self) -> Ticket | None:
        """The next request to make ready, when its images may be decoded; None at the end. `finish` follows, whatever becomes of it."""
        with self._lock:
            self._to_prepare.wait_for(
                lambda: self._ended or (self._unprepared and self.prepared < self._most_prepared)
            )
            if self._ended:
                return None
            self._being_prepared += 1
            return self._unprepared.popleft()

    def finish(self, ticket: Ticket, ready: Ready | None) -> None:
        """A request was made ready, or cannot be.

        Args:
            ticket: of it.
            ready: the request, ready to be begun; None where nothing of it is left to do.
        """
        with self._lock:
            self._being_prepared -= 1
            if ready is None:
                self._waiting.pop(ticket.number, None)
            elif ticket.number in self._waiting and not self._ended:  # (it may have been given up meanwhile)
                self._ready.append(ready)
            self._tell()

    def head(self) -> Ready | None:
        """The request that is to be begun next; None where none is ready."""
        with self._lock:
            return self._ready[0] if self._ready else None

    def leave(self, ticket: Ticket) -> bool:
        """A request has begun with all that it asks, or is given up.

        Args:
            ticket: of it.

        Returns:
            Whether it was in the queue.
        """
        with self._lock:
            if self._waiting.pop(ticket.number, None) is None:
                return False
            if self._ready and self._ready[0].ticket is ticket:
                self._ready.popleft()
            else:
                self._unprepared = deque(each for each in self._unprepared if each is not ticket)
                self._ready = deque(each for each in self._ready if each.ticket is not ticket)
            self._tell()
            return True

    def wait(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for something, which is looked at after every change.

        Args:
            until: that is waited for.
            timeout: seconds to wait at most.

        Returns:
            Whether it is so.
        """
        with self._lock:
            return self._changed.wait_for(until, timeout)

    def notify(self) -> None:
        """Something changed outside of it."""
        with self._lock:
            self._changed.notify_all()

    def _tell(self) -> None:
        """A request came, left, or is somewhere else."""
        self._to_prepare.notify()
        self._changed.notify_all()
