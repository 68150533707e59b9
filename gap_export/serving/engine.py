"""The engine: requests in, answers out, as many at once as the cache has rows.

    submit -> (counted, or refused) -> images fetched and decoded by a few threads -> read into a row, one at a time -> all rows decoded together -> answers

One thread owns the session. A request is read alone into its row; single tokens of all rows are fed in one call. Each row has counters of its own, its
own share of visual tokens, its own way of choosing tokens, deadline and mark that its client has left. Questions of one request that begin alike share
what was read: a row is copied, and only what differs is read.

Whatever happens, every question gets an outcome: one that fails does so alone, a step that fails takes the rows that were in it, and if the engine
itself fails, everything is given up, and it says so.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError, InputError, SessionError
from gap_export.runtime.conversation.cache import ConversationCache
from gap_export.runtime.model import Model
from gap_export.runtime.session import Session
from gap_export.serving.answering import Answer, Answering
from gap_export.serving.choose_keep import BundlesOwn, ChooseKeep
from gap_export.serving.lanes import Row, open_lane, single_because
from gap_export.serving.limits import EngineLimits
from gap_export.serving.observer import NO_OBSERVER, Observer
from gap_export.serving.preparing import Preparing, Prompted
from gap_export.serving.priority import yield_to_others
from gap_export.serving.queue import Queue, Ready
from gap_export.serving.work import Refused, Result, Ticket, Work

_FETCH_JOIN_SECONDS = 1.0
"""How long the end of threads that fetch is waited for: they wait for other servers, and hold nothing of this one."""
_SWEEP_SECONDS = 0.05
"""How often deadlines of waiting requests are looked at."""


@dataclass
class _Running:
    """A row in use."""

    ticket: Ticket
    answer: Answer


class Engine:
    """Answers requests with one session, until it is closed; `with` closes it. All methods may be called from any thread.

    Args:
        model: loaded; the engine alone uses its session until it is closed. The model is not closed with it.
        limits: of rows, queue and threads.
        observer: told of what is done.
        choose_keep: chooses the fraction of visual tokens of requests that choose none; the bundle's own when left out.

    Attributes:
        bundle: of the model.
        limits: as given.
        most_waiting: requests that wait to be begun; whoever comes then is refused.
        single_because: why requests are computed one at a time; None where they share a cache.
        fault: what ended the engine by itself; None while it works, and when it was closed.
        images_decoded: so far; none of a request that was refused, and none of a check.
        prompts_read: questions whose computation was begun so far.
        steps: calls for one token of all rows so far.
    """

    def __init__(
        self,
        model: Model,
        limits: EngineLimits,
        *,
        observer: Observer | None = None,
        choose_keep: ChooseKeep | None = None,
    ) -> None:
        self.bundle, self.limits = model.bundle, limits
        self._observer = observer or NO_OBSERVER
        self._choose_keep = choose_keep or BundlesOwn()
        self._session: Session = model.session
        manifest = model.bundle.manifest
        self.single_because = single_because(model.session, manifest)
        self._lane = open_lane(model.session, manifest, limits.rows)
        self._answering = Answering(model)
        self._preparing = Preparing(model.bundle, model.grounder, self._answering.prompts)
        # Decoded images wait in memory: no more than the rows will soon take.
        self.most_waiting = limits.waiting(self._lane.rows)
        self._queue = Queue(
            self.most_waiting, 2 * self._lane.rows + limits.image_threads, most_fetched=limits.fetch_threads
        )
        self._rows: list[_Running] = []
        # The row that ended last, while another question of its request waits and what was read lies in the cache.
        self._spare: _Running | None = None
        self._stopping = False
        self._next_sweep = 0.0
        self.fault: GapExportError | None = None
        self.images_decoded = self.prompts_read = self.steps = 0
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="gap-engine", daemon=True)
        self._decoders = [
            threading.Thread(target=self._prepare_requests, name=f"gap-images-{number}", daemon=True)
            for number in range(limits.image_threads)
        ]
        self._fetchers = [
            threading.Thread(target=self._fetch_requests, name=f"gap-fetch-{number}", daemon=True)
            for number in range(limits.fetch_threads)
        ]
        for thread in (self._thread, *self._decoders, *self._fetchers):
            thread.start()

    # From any thread

    @property
    def rows(self) -> int:
        """How many questions are computed at once."""
        return self._lane.rows

    @property
    def backend(self) -> str:
        """Name of the session's runtime."""
        return self._session.backend

    @property
    def running(self) -> int:
        """Rows in use."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that were admitted, and have questions that have not begun."""
        return len(self._queue)

    @property
    def draining(self) -> bool:
        """Whether nothing more is admitted."""
        return self._queue.closed

    @property
    def used_slots(self) -> float:
        """Share of all slots of all rows that are in use."""
        capacity = self.bundle.manifest.capacity * self._lane.rows
        return sum(row.answer.slot for row in list(self._rows)) / capacity

    def oldest_wait(self) -> float:
        """Seconds that a request has waited for others to be begun, the longest of all; see `Queue.oldest_wait`."""
        return self._queue.oldest_wait()

    def submit(self, work: Work, on_piece: Callable[[int, str], None] | None = None) -> Ticket:
        """Admit a request.

        Args:
            work: what is asked.
            on_piece: told of every piece of every answer, from the engine's thread: quick, as all rows wait for it.

        Returns:
            Where its answers will be.

        Raises:
            Refused: the queue is full, or the engine is being emptied or has failed; no image of it was decoded.
        """
        return self.submit_all([work], on_piece)[0]

    def submit_all(
        self, works: Sequence[Work], on_piece: Callable[[int, str], None] | None = None
    ) -> list[Ticket]:
        """Admit requests that belong together: all of them at once, or none.

        Args:
            works: what is asked; each takes a place in the queue.
            on_piece: told of every piece of every answer, from the engine's thread: quick, as all rows wait for it.

        Returns:
            Where the answers of each will be.

        Raises:
            InputError: the queue has fewer places, even when it is empty.
            Refused: too few of them are free, or the engine is being emptied or has failed; no image was decoded.
        """
        if len(works) > self.most_waiting:
            raise InputError(
                f"has {len(works)} parts that wait each for itself, and {self.most_waiting} may wait",
                subject="the request",
                hint=f"ask at most {self.most_waiting} of them at once",
            )
        tickets = [Ticket(work, on_piece, self._client_left) for work in works]
        refusal = self._queue.admit(*tickets)
        if refusal is not None:
            self._observer_of(works[0]).refused(refusal.reason)
            raise refusal
        return tickets

    def check_admission(self) -> None:
        """Refuse as `submit` would by now: for whoever can do so before a request is read.

        Raises:
            Refused: the queue is full, or the engine is being emptied or has failed.
        """
        refusal = self._queue.refusal()
        if refusal is not None:
            self._observer.refused(refusal.reason)
            raise refusal

    def drain(self, timeout: float | None = None) -> bool:
        """Admit nothing more, and wait until everything that was admitted has its answer.

        Args:
            timeout: seconds to wait at most. On the engine's own thread, where answers are told of, there is no waiting.

        Returns:
            Whether all have.
        """
        self._queue.close(_stops())
        if threading.current_thread() is self._thread:
            timeout = 0.0
        return self._queue.wait(lambda: not len(self._queue) and not self._rows, timeout)

    def give_up(self) -> None:
        """Give up what is left after the call that is being computed, and wait for nothing; `drain` ends by then."""
        self._stopping = True
        self._queue.close(_stops())

    def close(self) -> None:
        """Give up what is left, and end the engine's threads; closing again does nothing.

        On one of those threads, there is no waiting for them; those that fetch images are not waited for long anywhere.
        """
        self.give_up()
        threads = (self._thread, *self._decoders)
        if threading.current_thread() not in (*threads, *self._fetchers):
            for thread in threads:
                thread.join()
            ends = time.monotonic() + _FETCH_JOIN_SECONDS
            for thread in self._fetchers:
                thread.join(max(0.0, ends - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _client_left(self, ticket: Ticket) -> None:
        """Free the place of a request whose client has left; its rows are freed by the engine's thread."""
        self._is_given_up(ticket)
        self._queue.leave(ticket)

    # On threads that fetch images

    def _fetch_requests(self) -> None:
        while (ticket := self._queue.next_unfetched()) is not None:
            complete = False
            try:
                if ticket.work.fetch is not None and not self._is_given_up(ticket):
                    ticket.work.fetch(ticket.seconds_left)
                    complete = True
            except Exception as error:  # one request fails, and no other
                if not self._is_given_up(ticket):
                    self._fail(ticket, _as_told(error))
            finally:
                self._queue.finish_fetch(ticket, complete=complete)
            del ticket  # a thread that waits holds nothing of a request

    # On threads that decode images

    def _prepare_requests(self) -> None:
        yield_to_others()
        while (ticket := self._queue.next_unprepared()) is not None:
            ready = None
            try:
                ready = self._prepared(ticket)
            except Exception as error:  # one request fails, and no other
                self._fail(ticket, _as_told(error))
            finally:
                self._queue.finish(ticket, ready)
            del ticket, ready  # a thread that waits holds nothing of a request

    def _prepared(self, ticket: Ticket) -> Ready | None:
        """A request, ready to be begun; None where nothing of it can be."""
        if self._is_given_up(ticket):
            return None
        work = ticket.work
        with self._counting:
            self.images_decoded += 0 if work.is_check else work.images
        prepared = self._preparing.prepare(
            work, self._choose_keep.largest if work.keep is None else work.keep
        )
        prepared.seconds += ticket.complete - ticket.admitted
        for number, error in prepared.faults.items():
            self._settle(ticket, number, error)
        if not prepared.prompts:
            return None
        return Ready(ticket, prepared, deque(prepared.prompts), work.keep, work.keep is not None)

    # On the engine's thread

    def _run(self) -> None:
        ended_by = _stops()
        try:
            with self._session.turn():
                self._work()
        except BaseException as error:
            self.fault = _as_told(error)
            ended_by = Refused("is not answered: the engine has failed", reason="broken")
        finally:
            for ticket in (*self._queue.end(ended_by), *(row.ticket for row in self._rows)):
                self._fail(ticket, ended_by)
                self._queue.leave(ticket)
            self._rows.clear()
            self._spare = None
            self._queue.notify()

    def _work(self) -> None:
        while not self._stopping:
            self._sweep()
            self._give_up_rows()
            if len(self._rows) < self._lane.rows and self._begin_next():
                self._give_up_rows()
            if self._rows:
                self._step()
            elif len(self._queue):
                self._queue.wait(lambda: self._stopping or self._queue.head() is not None, _SWEEP_SECONDS)
            else:
                self._queue.wait(lambda: self._stopping or len(self._queue) > 0)

    def _sweep(self) -> None:
        """Let requests leave the queue whose time is over."""
        if (now := time.monotonic()) >= self._next_sweep:
            self._next_sweep = now + _SWEEP_SECONDS
            for ticket in self._queue.tickets():
                if self._is_given_up(ticket):
                    self._queue.leave(ticket)

    def _begin_next(self) -> bool:
        """Begin the next question of the request at the head of the queue: one, so that tokens of others are decoded before the next is read.

        Returns:
            Whether there was one.
        """
        ready = self._queue.head()
        if ready is None:
            self._spare = None  # its request has left the queue: nothing of it is to be kept
            return False
        ticket = ready.ticket
        if not self._is_given_up(ticket):
            self._begin(ready, ready.left.popleft())
        if not ready.left or ticket.done:
            self._queue.begun(ticket)
            self._spare = None
        return True

    def _begin(self, ready: Ready, prompted: Prompted) -> None:
        """Read a question into a row of its own.

        Args:
            ready: its request.
            prompted: the question.
        """
        ticket = ready.ticket
        self.prompts_read += 1
        try:
            if not ready.keep_chosen:
                ready.keep, ready.keep_chosen = self._choose_keep.choose(self.oldest_wait()), True
            seen = self._preparing.seen(ready.prepared, prompted, ready.keep)
            row, cache = self._place_for(ticket, seen)
            answer, logits_V = self._answering.begin(
                ticket, ready.prepared, prompted, cache, row, seen, ready.keep
            )
        except Exception as error:  # one request fails, and no other
            self._settle(ticket, prompted.number, _as_told(error))
            return
        running = _Running(ticket, answer)
        self._rows.append(running)
        self._take_token(running, logits_V)

    def _place_for(self, ticket: Ticket, seen: Sequence[object]) -> tuple[Row, ConversationCache]:
        """A row, with what another question of the request has in common with this one where there is such a row.

        Args:
            ticket: of the request.
            seen: images of the question: the same objects, where questions have the same visual tokens.
        """
        place, spare, self._spare = len(self._rows), self._spare, None
        for each in self._rows:
            if each.ticket is ticket and each.answer.seen is seen:
                row = self._lane.copied(each.answer.row, place)
                return row, each.answer.cache.copied_to(row)
        if (
            spare is not None
            and spare.answer.row.place == place
            and spare.ticket is ticket
            and spare.answer.seen is seen
        ):
            return spare.answer.row, spare.answer.cache
        row = self._lane.take(place)
        return row, ConversationCache(row, self.bundle.manifest)

    def _step(self) -> None:
        """Feed the last token of every row, and choose the next."""
        began = time.perf_counter()
        rows = list(self._rows)
        placement = self._answering.placement([row.answer for row in rows])
        ids_B = np.array([row.answer.ids[-1] for row in rows], np.int64)
        self.steps += 1
        try:
            logits_BV = self._lane.step(ids_B, placement)
        except Exception as error:
            failure = _as_told(error)
            for row in rows:
                self._settle(row.ticket, row.answer.number, failure)
            self._rows.clear()
            self._spare = None
            self._queue.notify()
            self._lane.recover()
            return
        now = time.perf_counter()
        seconds = now - began
        intervals = [(row.answer.fed(seconds, now), row.ticket.work.is_check) for row in rows]
        if counted := [interval for interval, is_check in intervals if not is_check]:
            self._observer.stepped(seconds, counted)
        for row, logits_V in zip(rows, logits_BV, strict=True):
            self._take_token(row, logits_V)

    def _take_token(self, row: _Running, logits_V: NDArray[np.float32]) -> None:
        """Choose a row's next token, and let it leave where that ends its answer."""
        answer = row.answer
        try:
            piece = answer.take(logits_V)
            row.ticket.show(answer.number, piece)
            outcome = answer.result() if answer.ended else None
        except Exception as error:  # one request fails, and no other
            self._settle(row.ticket, answer.number, _as_told(error))
            self._free(row, reusable=False)
            return
        if outcome is not None:
            self._settle(row.ticket, answer.number, outcome)
            self._free(row)

    def _free(self, row: _Running, *, reusable: bool = True) -> None:
        """Let a row leave, and put the last one in its place.

        Args:
            row: that has ended.
            reusable: whether what was read into it is right.
        """
        place, last = self._rows.index(row), self._rows[-1]
        if last is not row:
            self._lane.move(last.answer.row, place)
            self._rows[place] = last
        self._rows.pop()
        head = self._queue.head()
        stays = reusable and last is row and head is not None and head.ticket is row.ticket
        self._spare = row if stays else None
        self._queue.notify()

    def _give_up_rows(self) -> None:
        """Let rows leave whose clients have, or whose time is over."""
        for row in list(self._rows):
            if self._is_given_up(row.ticket):
                self._free(row)

    # From several threads

    def _is_given_up(self, ticket: Ticket) -> bool:
        """Whether a request is not to be computed any further; every question of it has its outcome then."""
        if ticket.cancelled:
            reason = Refused("was cancelled by its client", reason="cancelled")
        elif time.monotonic() > ticket.expires:
            reason = Refused(
                f"was not answered within {ticket.work.deadline:g} s", reason="deadline", retry_after=1.0
            )
        else:
            return False
        self._fail(ticket, reason)
        return True

    def _fail(self, ticket: Ticket, error: GapExportError) -> None:
        """Every question without an outcome has this one."""
        for _ in range(ticket.settle_all(error)):
            self._observer_of(ticket.work).failed(error)

    def _settle(self, ticket: Ticket, number: int, outcome: Result | GapExportError) -> None:
        if not ticket.settle(number, outcome):
            return
        observer = self._observer_of(ticket.work)
        if isinstance(outcome, Result):
            observer.answered(outcome)
        else:
            observer.failed(outcome)

    def _observer_of(self, work: Work) -> Observer:
        return NO_OBSERVER if work.is_check else self._observer


def _stops() -> Refused:
    return Refused("is not answered: the server stops", reason="draining", retry_after=5.0)


def _as_told(error: BaseException) -> GapExportError:
    """An error as whoever asked is told of it: what was not foreseen is no text for others, and stays its cause."""
    if isinstance(error, GapExportError):
        return error
    told = SessionError(
        f"failed ({type(error).__name__})",
        subject="the request",
        hint="this is a fault of the server; please report it",
    )
    told.__cause__ = error
    return told
