"""Bookkeeping of requests that wait, against a list of who is where; no session and no thread is needed for that."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gap_export.serving.queue import Queue, Ready
from gap_export.serving.work import Refused, Ticket
from tests.serving.asking import WAIT, work_of

LONGEST, MOST = 5, 3
STOPS = Refused("is not answered: the server stops", reason="draining", retry_after=5.0)


def ready_of(ticket: Ticket) -> Ready:
    prepared: Any = None
    prompted: Any = None
    return Ready(ticket, prepared, deque([prompted]))


class Bookkeeping(RuleBasedStateMachine):
    """A queue, and the same in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(LONGEST, MOST)
        self.unprepared: list[Ticket] = []
        self.preparing: list[Ticket] = []
        self.given_up: list[Ticket] = []  # while they were being prepared
        self.ready: list[Ticket] = []
        self.admitted: list[Ticket] = []
        self.closed = self.ended = False

    @rule()
    def admit(self) -> None:
        ticket, waiting = Ticket(work_of([], "x")), len(self.queue)
        refusal = self.queue.admit(ticket)
        if self.closed:
            assert refusal is not None
            assert refusal.reason == "draining"
        elif waiting == LONGEST:
            assert refusal is not None
            assert refusal.reason == "full"
        else:
            assert refusal is None
            self.unprepared.append(ticket)
            self.admitted.append(ticket)
        assert (self.queue.refusal() is None) == (not self.closed and len(self.queue) < LONGEST)

    @precondition(lambda self: self.unprepared and self.in_memory < MOST and not self.ended)
    @rule()
    def prepare(self) -> None:
        ticket = self.queue.next_unprepared()
        assert ticket is self.unprepared.pop(0), "in their order"
        self.preparing.append(ticket)

    @precondition(lambda self: self.preparing or self.given_up)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        ticket = data.draw(st.sampled_from([*self.preparing, *self.given_up]))
        self.queue.finish(ticket, None if fails else ready_of(ticket))
        if ticket in self.given_up:
            self.given_up.remove(ticket)
            return
        self.preparing.remove(ticket)
        if fails:
            self.admitted.remove(ticket)
        elif not self.ended:
            self.ready.append(ticket)

    @precondition(lambda self: self.ready)
    @rule()
    def begin(self) -> None:
        head = self.queue.head()
        assert head is not None
        assert head.ticket is self.ready.pop(0), "in the order in which they became ready"
        assert self.queue.leave(head.ticket)
        self.admitted.remove(head.ticket)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.admitted))
        assert self.queue.leave(ticket)
        assert not self.queue.leave(ticket)
        self.admitted.remove(ticket)
        if ticket in self.preparing:
            self.preparing.remove(ticket)
            self.given_up.append(ticket)
        for place in (self.unprepared, self.ready):
            if ticket in place:
                place.remove(ticket)

    @rule()
    def close(self) -> None:
        self.queue.close(STOPS)
        self.closed = True

    @rule()
    def end(self) -> None:
        assert self.queue.end(STOPS) == self.admitted
        assert self.queue.next_unprepared() is None
        self.closed = self.ended = True
        self.unprepared.clear()
        self.ready.clear()

    @property
    def in_memory(self) -> int:
        return len(self.preparing) + len(self.given_up) + len(self.ready)

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.admitted) <= LONGEST
        assert self.queue.tickets() == self.admitted, "the oldest first"
        assert self.queue.prepared == self.in_memory <= MOST
        assert self.queue.closed == self.closed
        head = self.queue.head()
        assert (head is None) == (not self.ready)
        assert (self.queue.oldest_wait() > 0) == bool(self.admitted)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_wait_for_what_they_may_take() -> None:
    queue, taken, lock = Queue(100, 2), list[Ticket](), threading.Lock()
    together: list[int] = []

    def prepare() -> None:
        while (ticket := queue.next_unprepared()) is not None:
            with lock:
                taken.append(ticket)
                together.append(queue.prepared)
            queue.finish(ticket, ready_of(ticket))

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    tickets = [Ticket(work_of([], "x")) for _ in range(50)]
    for ticket in tickets:
        assert queue.admit(ticket) is None
    for _ in tickets:
        assert queue.wait(lambda: queue.head() is not None, WAIT)
        head = queue.head()
        assert head is not None
        queue.leave(head.ticket)
    assert len(taken) == 50
    assert taken == tickets
    assert max(together) <= 2
    assert queue.end(STOPS) == []
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.mark.parametrize("ended", [False, True])
def test_refusals_are_errors_of_their_own(ended: bool) -> None:
    queue = Queue(1, 1)
    (queue.end if ended else queue.close)(STOPS)
    first, second = queue.refusal(), queue.refusal()
    assert first is not second, "an error is raised once: its traceback is its own"
    assert str(first) == str(STOPS)
