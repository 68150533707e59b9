"""Requests that were admitted and have not begun: counted before anything of them is read, made ready by a few threads, begun in the order in which they are ready.

    admitted -> (being fetched ->) being prepared -> ready -> begun
        (a request that is given up leaves from wherever it is, and its place is free at once)

No session is in it, and no image.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gap_export.serving.preparing import Prepared, Prompted
from gap_export.serving.retry_after import RetryAfter
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
        since: `time.monotonic()` when it became ready.
    """

    ticket: Ticket
    prepared: Prepared
    left: deque[Prompted]
    keep: float | None = None
    keep_chosen: bool = False
    since: float = field(default_factory=time.monotonic)


class Queue:
    """Who waits for what; may be used from any thread.

    Args:
        longest: most requests in it.
        most_prepared: most requests whose images are in memory at once, decoded or being decoded.
        most_fetched: most requests whose images are being fetched, or were and are not being decoded yet.
    """

    def __init__(self, longest: int, most_prepared: int, most_fetched: int = 8) -> None:
        self._longest, self._most_prepared, self._most_fetched = longest, most_prepared, most_fetched
        self._lock = threading.RLock()
        # Threads that fetch and decode images are told apart from whoever waits for other things: of rows that become free, say, they need not know.
        self._to_fetch, self._to_prepare = threading.Condition(self._lock), threading.Condition(self._lock)
        self._changed = threading.Condition(self._lock)
        self._waiting: dict[int, Ticket] = {}  # all of them, in the order in which they were admitted
        self._unfetched: deque[Ticket] = deque()
        self._unprepared: deque[Ticket] = deque()
        self._ready: deque[Ready] = deque()
        self._being_fetched = self._being_prepared = 0
        self._closed_because: Refused | None = None
        self._ended = False
        self._retry_after = RetryAfter()

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
        """Seconds that a request has waited for others to be begun, the longest of all; 0 where none does.

        A request waits from when it is ready, and before that while too many others are. Its images are waited for otherwise: whoever sends large
        ones, or slow addresses, does not make a server busy for others.
        """
        with self._lock:
            since = [self._ready[0].since] if self._ready else []
            if self._unprepared and self.prepared >= self._most_prepared:
                since.append(self._unprepared[0].complete)
        return max(0.0, time.monotonic() - min(since)) if since else 0.0

    def tickets(self) -> list[Ticket]:
        """Of all requests in it, the oldest first."""
        with self._lock:
            return list(self._waiting.values())

    def admit(self, *tickets: Ticket) -> Refused | None:
        """Count requests: all of them, or none.

        Args:
            tickets: of them.

        Returns:
            Why they are not admitted; None where they are.
        """
        with self._lock:
            refusal = self.refusal(len(tickets))
            if refusal is None:
                for ticket in tickets:
                    self._waiting[ticket.number] = ticket
                    (self._unprepared if ticket.work.fetch is None else self._unfetched).append(ticket)
                    self._tell()
            return refusal

    def refusal(self, count: int = 1) -> Refused | None:
        """Why requests would not be admitted by now; None where they would.

        Args:
            count: of them, that are admitted together.
        """
        with self._lock:
            because = self._closed_because
            if because is not None:
                return Refused(because.message, reason=because.reason, retry_after=because.retry_after)
            left = self._longest - len(self._waiting)
            if count <= left:
                return None
            more = "as many as may" if left <= 0 else f"and {left} more may, not {count}"
            return Refused(
                f"is not admitted: {len(self._waiting)} are waiting, {more}",
                reason="full",
                retry_after=self._retry_after.seconds(),
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
        """Admit nothing more, and begin nothing more; threads that wait for requests to fetch or prepare get none any more.

        Args:
            because: what others are refused with from now on.

        Returns:
            What is in it. Each must be told, and leave.
        """
        with self._lock:
            self._closed_because, self._ended = because, True
            self._unfetched.clear()
            self._unprepared.clear()
            self._ready.clear()
            self._to_fetch.notify_all()
            self._to_prepare.notify_all()
            self._changed.notify_all()
            return list(self._waiting.values())

    def next_unfetched(self) -> Ticket | None:
        """The next request whose images may be fetched; None at the end. `finish_fetch` follows, whatever becomes of it."""
        with self._lock:
            self._to_fetch.wait_for(
                lambda: self._ended or (self._unfetched and self._fetched < self._most_fetched)
            )
            if self._ended:
                return None
            self._being_fetched += 1
            return self._unfetched.popleft()

    def finish_fetch(self, ticket: Ticket, *, complete: bool) -> None:
        """The images of a request were fetched, or cannot be.

        Args:
            ticket: of it.
            complete: whether all of them were.
        """
        with self._lock:
            self._being_fetched -= 1
            ticket.complete = time.monotonic()
            if not complete:
                self._waiting.pop(ticket.number, None)
            elif ticket.number in self._waiting and not self._ended:  # (it may have been given up meanwhile)
                self._unprepared.append(ticket)
            self._tell()

    def next_unprepared(self) -> Ticket | None:
        """The next request to make ready, when its images may be decoded; None at the end. `finish` follows, whatever becomes of it."""
        with self._lock:
            self._to_prepare.wait_for(
                lambda: self._ended or (self._unprepared and self.prepared < self._most_prepared)
            )
            if self._ended:
                return None
            self._being_prepared += 1
            self._to_fetch.notify()
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
                if ticket.work.is_check:  # each is to be computed in the same row whenever it is asked
                    self._ready = deque(sorted(self._ready, key=lambda each: each.ticket.number))
            self._tell()

    def head(self) -> Ready | None:
        """The request that is to be begun next; None where none is ready, or where it is a check and others are still prepared."""
        with self._lock:
            first = self._ready[0] if self._ready else None
            return None if first is not None and self._others_follow(first) else first

    def _others_follow(self, first: Ready) -> bool:
        """Whether a check is to wait for others, to share steps with them; not where its place is needed to prepare these."""
        if not first.ticket.work.is_check or self.prepared >= self._most_prepared:
            return False
        ready = {each.ticket.number for each in self._ready}
        return any(each.work.is_check and each.number not in ready for each in self._waiting.values())

    def begun(self, ticket: Ticket) -> None:
        """A request has begun with all that it asks.

        Args:
            ticket: of it.
        """
        with self._lock:
            self.leave(ticket)
            self._retry_after.note_begun(len(self._waiting))

    def leave(self, ticket: Ticket) -> bool:
        """A request has begun, or is given up.

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
                self._unfetched = deque(each for each in self._unfetched if each is not ticket)
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

    @property
    def _fetched(self) -> int:
        """Requests whose images are being fetched, or wait as they were sent."""
        return self._being_fetched + sum(each.work.fetch is not None for each in self._unprepared)

    def _tell(self) -> None:
        """A request came, left, or is somewhere else."""
        self._to_fetch.notify()
        self._to_prepare.notify()
        self._changed.notify_all()
