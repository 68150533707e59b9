"""Bookkeeping of requests that wait, against a list of who is where; no session and no thread is needed for that."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gap_export.serving.queue import Queue, Ready
from gap_export.serving.work import Refused, Ticket
from tests.serving.asking import WAIT, work_of

LONGEST, MOST, MOST_FETCHED = 5, 3, 2
STOPS = Refused("is not answered: the server stops", reason="draining", retry_after=5.0)


def ready_of(ticket: Ticket) -> Ready:
    prepared: Any = None
    prompted: Any = None
    return Ready(ticket, prepared, deque([prompted]))


def ticket_of(*, remote: bool) -> Ticket:
    work = work_of([], "x")
    return Ticket(replace(work, fetch=lambda _: None) if remote else work)


class Bookkeeping(RuleBasedStateMachine):
    """A queue, and the same in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(LONGEST, MOST, MOST_FETCHED)
        self.unfetched: list[Ticket] = []
        self.fetching: list[Ticket] = []
        self.not_waited_for: list[Ticket] = []  # while they were being fetched
        self.unprepared: list[Ticket] = []
        self.preparing: list[Ticket] = []
        self.given_up: list[Ticket] = []  # while they were being prepared
        self.ready: list[Ticket] = []
        self.admitted: list[Ticket] = []
        self.closed = self.ended = False

    @rule(remote=st.lists(st.booleans(), min_size=1, max_size=3))
    def admit(self, remote: list[bool]) -> None:
        tickets, waiting = [ticket_of(remote=each) for each in remote], len(self.queue)
        refusal = self.queue.admit(*tickets)
        if self.closed:
            assert refusal is not None
            assert refusal.reason == "draining"
        elif waiting + len(tickets) > LONGEST:
            assert refusal is not None, "all or none"
            assert refusal.reason == "full"
        else:
            assert refusal is None
            for ticket in tickets:
                (self.unprepared if ticket.work.fetch is None else self.unfetched).append(ticket)
            self.admitted += tickets
        assert (self.queue.refusal() is None) == (not self.closed and len(self.queue) < LONGEST)

    @precondition(lambda self: self.unfetched and self.fetched < MOST_FETCHED and not self.ended)
    @rule()
    def fetch(self) -> None:
        ticket = self.queue.next_unfetched()
        assert ticket is self.unfetched.pop(0), "in their order"
        self.fetching.append(ticket)

    @precondition(lambda self: self.fetching or self.not_waited_for)
    @rule(data=st.data(), fails=st.booleans())
    def finish_fetch(self, data: st.DataObject, fails: bool) -> None:
        ticket = data.draw(st.sampled_from([*self.fetching, *self.not_waited_for]))
        self.queue.finish_fetch(ticket, complete=not fails)
        if ticket in self.not_waited_for:
            self.not_waited_for.remove(ticket)
            return
        self.fetching.remove(ticket)
        if fails:
            self.admitted.remove(ticket)
        elif not self.ended:
            self.unprepared.append(ticket)

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
        if ticket in self.fetching:
            self.fetching.remove(ticket)
            self.not_waited_for.append(ticket)
        for place in (self.unfetched, self.unprepared, self.ready):
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
        assert self.queue.next_unfetched() is None
        self.closed = self.ended = True
        self.unfetched.clear()
        self.unprepared.clear()
        self.ready.clear()

    @property
    def in_memory(self) -> int:
        return len(self.preparing) + len(self.given_up) + len(self.ready)

    @property
    def fetched(self) -> int:
        waiting = [ticket for ticket in self.unprepared if ticket.work.fetch is not None]
        return len(self.fetching) + len(self.not_waited_for) + len(waiting)

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.admitted) <= LONGEST
        assert self.queue.tickets() == self.admitted, "the oldest first"
        assert self.queue.prepared == self.in_memory <= MOST
        assert self.queue.closed == self.closed
        head = self.queue.head()
        assert (head is None) == (not self.ready)
        assert self.fetched <= MOST_FETCHED
        backlog = self.ready or (self.unprepared and self.in_memory == MOST)
        assert (self.queue.oldest_wait() > 0) == bool(backlog)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_waits_for_others() -> None:
    """Not a request whose images are on their way, unless too many ready ones are in front of it."""
    queue = Queue(10, most_prepared=2, most_fetched=2)
    slow, first, second, third = (ticket_of(remote=remote) for remote in (True, False, False, False))
    for long_ago in (slow, first, second, third):
        long_ago.admitted = long_ago.complete = time.monotonic() - 1000
    assert queue.admit(slow, first, second) is None
    assert queue.next_unfetched() is slow
    assert queue.next_unprepared() is first
    assert queue.oldest_wait() == 0, "being fetched, being decoded, to be decoded"
    queue.finish(first, ready_of(first))
    assert 0 < queue.oldest_wait() < 1000, "from when it became ready"
    queue.leave(first)
    assert queue.next_unprepared() is second
    queue.finish(second, ready_of(second))
    assert queue.admit(third) is None
    assert queue.next_unprepared() is third
    queue.finish(third, ready_of(third))
    queue.finish_fetch(slow, complete=True)
    slow.complete -= 2000
    assert queue.oldest_wait() >= 2000, "from when it could have been decoded"
    queue.leave(second)
    assert 0 < queue.oldest_wait() < 1000, "it is decoded as soon as a thread takes it"


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
