"""The engine: requests that join and leave at random are answered as if each was alone, whatever becomes of others."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError, SessionError
from gap_export.inputs.chat.conversation import Turn
from gap_export.runtime.model import Model
from gap_export.serving.adapt import Adapt
from gap_export.serving.engine import Engine
from gap_export.serving.retry_after import LEAST_SECONDS, MOST_SECONDS
from gap_export.serving.work import Conversation, Refused, Result, Ticket, Work
from tests.runtime.conversation.talking import failing, spied
from tests.serving.asking import (
    WAIT,
    alone,
    assert_empty,
    equal,
    facts,
    held,
    scenes,
    soon,
    talk,
    work_of,
)
from tests.serving.conftest import OpenEngine

WORDS = (
    "circle",
    "the large red circle",
    "the blue square on the left",
    "triangle",
    "the small green triangle",
)


class Counting:
    """An observer."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.results: list[Result] = []
        self.errors: list[Exception] = []
        self.rows: list[int] = []
        self.seconds: list[float] = []

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)

    @property
    def given_up(self) -> list[str]:
        return [each.reason for each in self.errors if isinstance(each, Refused)]

    def answered(self, result: Result) -> None:
        self.results.append(result)

    def failed(self, error: Exception) -> None:
        self.errors.append(error)

    def stepped(self, seconds: float, intervals: Any) -> None:
        self.rows.append(len(intervals))
        self.seconds.append(seconds)


def any_work(rng: random.Random) -> Work:
    """A request of some kind."""
    case = rng.choice(scenes(24))
    keep = rng.choice([None, None, 0.1, 0.25, 0.33, 0.5, 1.0])
    options: dict[str, Any] = {
        "keep": keep,
        "max_new_tokens": rng.randint(1, 12),
        "trace": rng.random() < 0.2,
    }
    kind = rng.random()
    if kind < 0.55:
        expressions = rng.sample([*WORDS, case.expression], rng.choice([1, 1, 2, 3]))
        return work_of([case.image], *expressions, **options)
    if rng.random() < 0.5:
        options |= {"temperature": 0.8, "seed": rng.randint(0, 9), "top_p": 0.9, "repetition_penalty": 1.1}
    if rng.random() < 0.3:
        options["stop"] = ", 0.5"
    if kind < 0.75:
        return work_of([case.image], talk(f"where is {case.expression}?"), **options)
    if kind < 0.85:
        return work_of(
            [case.image], talk(case.expression, "[0.1, 0.2, 0.3, 0.4]", "and a circle?"), **options
        )
    if kind < 0.93:
        other = rng.choice(scenes(24)).image
        turns = (Turn("user", "a circle?", 1), Turn("assistant", "no"), Turn("user", "and here?", 1))
        options["keep"] = rng.choice([0.1, 0.2, 0.25])
        return work_of([case.image, other], Conversation(turns), **options)
    return work_of([], talk("circle " * rng.randint(1, 20), images=0), **{**options, "keep": None})


class Crowd:
    """Clients that ask at once, at random, and partly leave.

    Args:
        engine: asked.
        requests: of all clients.
        seed: of everything that is drawn.
    """

    def __init__(self, engine: Engine, requests: int, seed: int) -> None:
        self.engine, self._left, self._lock = engine, requests, threading.Lock()
        self.refused = 0
        self.asked: list[tuple[Work, Ticket, bool]] = []
        clients = [threading.Thread(target=self._client, args=(seed * 100 + each,)) for each in range(6)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(4 * WAIT)
            assert not client.is_alive()

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
            work, leaves = any_work(rng), rng.random() < 0.1
            ticket = self._submitted(work, rng)
            with self._lock:
                self.asked.append((work, ticket, leaves))
            if leaves:
                time.sleep(rng.random() * 0.05)
                ticket.cancel()
            elif rng.random() < 0.5:
                ticket.result(WAIT)

    def _submitted(self, work: Work, rng: random.Random) -> Ticket:
        while True:
            try:
                return self.engine.submit(work)
            except Refused as refused:
                said = refused  # (the name of an exception ends with its block)
                self.refused += 1
                time.sleep(rng.random() * 0.02)
            assert said.reason == "full"
            assert said.retry_after is not None
            assert LEAST_SECONDS <= said.retry_after <= MOST_SECONDS


def check_crowd(engine: Engine, model: Model, requests: int, seed: int) -> Crowd:
    """Nothing wrong, nothing lost, no row leaked."""
    crowd = Crowd(engine, requests, seed)
    assert len(crowd.asked) == requests
    wrong = []
    answered = 0
    for work, ticket, leaves in crowd.asked:
        outcomes = ticket.result(WAIT)
        assert len(outcomes) == len(work.questions), "lost"
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, Refused):
                assert leaves
                assert outcome.reason == "cancelled"
                continue
            mine, theirs = facts(outcome), alone(model, work, number)
            answered += 1
            if not equal(mine, theirs):
                wrong.append((work.questions[number], work.keep, work.options, mine, theirs))
    assert not wrong
    assert answered > requests * 0.8
    assert_empty(engine)
    return crowd


def test_requests_that_come_and_go_at_random(
    shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    counting = Counting()
    engine = open_engine(shapes_bundle, rows=8, queue=12, observer=counting)
    assert engine.single_because is None
    check_crowd(engine, shapes_alone, 60, seed=1)
    assert max(counting.rows) > 2, "decoded together"
    assert len(counting.rows) == engine.steps


@pytest.mark.long
@pytest.mark.parametrize(("backend", "rows"), [("onnxruntime", 8), ("onnxruntime", 2), ("openvino", 5)])
def test_a_crowd(
    backend: str, rows: int, shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine = open_engine(shapes_bundle, backend, rows=rows, queue=6)
    crowd = check_crowd(engine, shapes_alone, 400, seed=rows)
    assert crowd.refused, "the queue was full at times"


def test_one_row_is_enough(shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine) -> None:
    check_crowd(open_engine(shapes_bundle, rows=1, queue=4), shapes_alone, 20, seed=3)


# What is refused, and what leaves


def test_no_image_of_a_refused_request_is_decoded(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    counting, opened = Counting(), []
    engine = open_engine(shapes_bundle, rows=1, queue=3, observer=counting)

    def work(number: int) -> Work:
        def images() -> list[Any]:
            opened.append(number)
            return [scenes(1)[0].image]

        return Work(work_of([], "circle").questions, images, 1)

    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        first = engine.submit(work(0))
        assert session.waits.wait(WAIT)
        tickets = [first, *(engine.submit(work(number)) for number in (1, 2))]
        for number in range(10, 20):
            with pytest.raises(Refused, match="3 are waiting, as many as may") as caught:
                engine.submit(work(number))
            assert (caught.value.reason, caught.value.retry_after) == ("full", 1.0)
            with pytest.raises(Refused):
                engine.check_admission()
        session.go.set()
    assert all(isinstance(ticket.result(WAIT)[0], Result) for ticket in tickets)
    assert sorted(opened) == [0, 1, 2]
    assert engine.images_decoded == 3
    assert counting.reasons == ["full"] * 20
    engine.check_admission()


def test_requests_that_belong_together_are_admitted_all_or_none(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    counting, image = Counting(), scenes(1)[0].image
    engine = open_engine(shapes_bundle, rows=1, queue=3, observer=counting)
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        first = engine.submit(work_of([image], "circle"))
        assert session.waits.wait(WAIT)
        with pytest.raises(Refused, match="1 are waiting, and 2 more may, not 3"):
            engine.submit_all([work_of([image], "circle")] * 3)
        assert (engine.waiting, engine.images_decoded) == (1, 1)
        with pytest.raises(InputError, match="ask at most 3"):
            engine.submit_all([work_of([image], "circle")] * 4)
        both = engine.submit_all([work_of([image], "circle")] * 2)
        session.go.set()
    assert all(isinstance(ticket.result(WAIT)[0], Result) for ticket in (first, *both))
    assert counting.reasons == ["full"], "none of those that were refused was cancelled"
    assert engine.images_decoded == 3


def test_a_client_that_leaves_costs_no_further_step(
    shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine, case = open_engine(shapes_bundle, rows=4), scenes(1)[0]
    others = [engine.submit(work_of([case.image], words)) for words in WORDS[:3]]
    after: list[int] = []
    ticket: Ticket
    step = engine._lane.step

    def counted(ids_B: Any, placement: Any) -> Any:
        if ticket.cancelled:
            after.append(sum(row.ticket is ticket for row in engine._rows))
        return step(ids_B, placement)

    def piece(number: int, text: str) -> None:
        ready.wait(WAIT)
        ticket.cancel()

    ready = threading.Event()
    engine._lane.step = counted  # type: ignore[method-assign]
    ticket = engine.submit(work_of([case.image], talk("where is the circle?")), piece)
    ready.set()
    (outcome,) = ticket.result(WAIT)
    assert isinstance(outcome, Refused)
    assert outcome.reason == "cancelled"
    for words, other in zip(WORDS, others, strict=False):
        assert equal(facts(other.result(WAIT)[0]), alone(shapes_alone, work_of([case.image], words), 0))
    assert_empty(engine)
    assert sum(after) == 0


def test_a_queued_request_whose_client_left_is_never_begun(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    counting = Counting()
    engine, image = open_engine(shapes_bundle, rows=1, queue=8, observer=counting), scenes(1)[0].image
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        first = engine.submit(work_of([image], "circle"))
        assert session.waits.wait(WAIT)
        waiting = [engine.submit(work_of([image], "circle", "square")) for _ in range(7)]
        assert soon(lambda: engine._queue.prepared == 4), "some are ready, some wait for space"
        for ticket in waiting:
            ticket.cancel()
            ticket.cancel()
            assert [each.reason for each in ticket.result(0) if isinstance(each, Refused)] == [
                "cancelled"
            ] * 2
        assert engine.waiting == 1, "their places are free at once"
        late = engine.submit(work_of([image], "circle"))
        session.go.set()
    assert isinstance(first.result(WAIT)[0], Result)
    assert isinstance(late.result(WAIT)[0], Result)
    assert_empty(engine)
    assert engine.prompts_read == 2
    assert counting.given_up == ["cancelled"] * 14, "question by question"
    first.cancel()
    assert counting.given_up == ["cancelled"] * 14, "an answer was given already"
    assert not counting.reasons, "all of them were admitted"


def test_deadlines_of_requests_that_wait_are_read_and_run(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    counting = Counting()
    engine, image = open_engine(shapes_bundle, rows=1, observer=counting), scenes(1)[0].image
    slow = threading.Event()
    step = engine._lane.step

    def slowly(*given: Any) -> Any:
        slow.wait(0.1)
        return step(*given)

    engine._lane.step = slowly  # type: ignore[method-assign]
    patient = engine.submit(work_of([image], "circle"))
    running = engine.submit(work_of([image], talk("circle?"), deadline=1.3))
    waiting = [engine.submit(work_of([image], "circle", "square", deadline=0.2)) for _ in range(8)]
    for ticket in waiting:
        for outcome in ticket.result(1.0):
            assert isinstance(outcome, Refused)
            assert (outcome.reason, outcome.message) == ("deadline", "was not answered within 0.2 s")
    assert engine.prompts_read <= 1
    assert isinstance(patient.result(WAIT)[0], Result)
    (outcome,) = running.result(WAIT)
    assert isinstance(outcome, Refused)
    assert engine.prompts_read == 2
    slow.set()
    assert_empty(engine)
    assert counting.given_up == ["deadline"] * 17


def test_a_deadline_while_images_are_decoded(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, gate = open_engine(shapes_bundle), threading.Event()
    time.sleep(0.05)  # the engine sleeps by then

    def images() -> list[Any]:
        assert gate.wait(WAIT)
        return [scenes(1)[0].image]

    ticket = engine.submit(Work(work_of([], "circle").questions, images, 1, deadline=0.1))
    (outcome,) = ticket.result(WAIT)
    assert isinstance(outcome, Refused)
    assert soon(lambda: engine.waiting == 0)
    gate.set()
    assert_empty(engine)
    assert engine.prompts_read == 0


# What is read


def test_questions_are_answered_in_their_order(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, begun = open_engine(shapes_bundle, rows=3, image_threads=1), []
    begin = engine._answering.begin

    def noted(ticket: Any, prepared: Any, prompted: Any, *rest: Any) -> Any:
        begun.append((ticket.number, prompted.number))
        return begin(ticket, prepared, prompted, *rest)

    engine._answering.begin = noted  # type: ignore[method-assign]
    tickets = [engine.submit(work_of([case.image], *WORDS)) for case in scenes(4)]
    for ticket in tickets:
        assert len(ticket.result(WAIT)) == len(WORDS)
    assert begun == [(ticket.number, number) for ticket in tickets for number in range(len(WORDS))]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_questions_about_one_image_share_what_is_read(
    rows: int, shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine, (case, other) = open_engine(shapes_bundle, rows=rows), scenes(2)
    session, read, encoded = engine.model.session, [], []  # type: ignore[attr-defined]
    name = "prefill" if rows == 1 else "prefill_row"
    method, encode = getattr(session, name), session.encode
    setattr(session, name, lambda *given, **named: (read.append(1), method(*given, **named))[1])
    session.encode = lambda *given, **named: (encoded.append(1), encode(*given, **named))[1]
    works = [
        work_of([case.image], *WORDS, case.expression, keep=0.5),
        work_of([other.image], *WORDS, talk("a circle?"), talk("a circle?", "no", "and a square?")),
    ]
    tickets = [engine.submit(work) for work in works]
    for work, ticket in zip(works, tickets, strict=True):
        for number, outcome in enumerate(ticket.result(WAIT)):
            assert equal(facts(outcome), alone(shapes_alone, work, number))
    assert_empty(engine)
    assert len(encoded) == 2
    # Conversations begin with other words than questions for boxes. Two rows may both be others' when a question is begun.
    assert 2 <= len(read) <= (6 if rows == 2 else 4)


def test_a_question_goes_on_from_one_that_has_ended(
    shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    """All rows of a request have ended when its next question is begun, and what they had in common is read again, or lies there still."""
    engine, case = open_engine(shapes_bundle, rows=2), scenes(1)[0]
    work = work_of([case.image], *WORDS, max_new_tokens=1)
    with spied(engine.model.session) as calls:  # type: ignore[attr-defined]
        outcomes = engine.submit(work).result(WAIT)
    assert calls.count("encode") == 1
    for number, outcome in enumerate(outcomes):
        assert equal(facts(outcome), alone(shapes_alone, work, number))


def test_what_another_request_left_is_gone(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, left = open_engine(shapes_bundle, rows=3), []
    cache, take = engine.model.session._cache, engine._lane.take  # type: ignore[attr-defined]

    def looked(place: int) -> Any:
        left.append(any(region.any() for region in cache.row(place).values()))
        row = take(place)
        assert not any(region.any() for region in cache.row(place).values())
        return row

    engine._lane.take = looked  # type: ignore[method-assign]
    tickets = [engine.submit(work_of([case.image], case.expression)) for case in scenes(9)]
    assert all(isinstance(ticket.result(WAIT)[0], Result) for ticket in tickets)
    assert len(left) == 9
    assert sum(left) >= 5, "rows were used before"


# What fails


@pytest.mark.parametrize("rows", [1, 3])
def test_a_poisoned_request_fails_alone(
    rows: int, shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    """Its logits are NaN, and so is what it leaves in its row."""
    counting = Counting()
    engine, image = open_engine(shapes_bundle, rows=rows, observer=counting), scenes(1)[0].image
    session, begin = engine.model.session, engine._answering.begin  # type: ignore[attr-defined]

    def poisoned(ticket: Ticket, *rest: Any) -> Any:
        answer, logits_V = begin(ticket, *rest)
        if ticket in bad:
            for region in session._cache.row(answer.row.place).values():
                region[...] = np.nan
            if ticket is bad[0]:
                logits_V = np.full_like(logits_V, np.nan)
        return answer, logits_V

    engine._answering.begin = poisoned  # type: ignore[method-assign]
    gate, bad = threading.Event(), list[Ticket]()

    def images() -> list[Any]:
        assert gate.wait(WAIT)
        return [image]

    def submitted(*texts: str) -> Ticket:
        return engine.submit(Work(work_of([], *texts).questions, images, 1))

    good = [submitted(words) for words in WORDS[:2]]
    bad += [submitted("circle"), submitted("square")]
    good += [submitted(words) for words in WORDS[2:]]
    gate.set()
    for ticket in bad:
        (outcome,) = ticket.result(WAIT)
        assert isinstance(outcome, SessionError)
        assert "logits that are not finite" in outcome.message
    for words, ticket in zip(WORDS, good, strict=True):
        assert equal(facts(ticket.result(WAIT)[0]), alone(shapes_alone, work_of([image], words), 0))
    assert_empty(engine)
    assert len(counting.errors) == 2


def test_a_step_that_fails_takes_its_rows_and_no_others(
    shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine, cases = open_engine(shapes_bundle, rows=3), scenes(8)
    error = SessionError("ran out of memory", subject="the runtime", hint="x")
    with failing(engine.model.session, "step", error, after=5):  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([case.image], case.expression, "circle")) for case in cases]
        outcomes = [ticket.result(WAIT) for ticket in tickets]
    failed = [each for every in outcomes for each in every if isinstance(each, SessionError)]
    assert 1 <= len(failed) <= 3
    assert all(each.message == "ran out of memory" for each in failed)
    for case, every in zip(cases, outcomes, strict=True):
        for number, outcome in enumerate(every):
            if isinstance(outcome, Result):
                expected = alone(shapes_alone, work_of([case.image], case.expression, "circle"), number)
                assert equal(facts(outcome), expected)
    assert_empty(engine)


@pytest.mark.parametrize("name", ["encode", "splice", "prefill_row"])
def test_a_request_that_cannot_be_read_fails_alone(
    name: str, shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine, cases = open_engine(shapes_bundle, rows=3, image_threads=1), scenes(4)
    with failing(engine.model.session, name, RuntimeError("of a library, secret"), after=1):  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([case.image], case.expression)) for case in cases]
        outcomes = [ticket.result(WAIT)[0] for ticket in tickets]
    (bad,) = [each for each in outcomes if not isinstance(each, Result)]
    assert outcomes.index(bad) == 1
    assert (
        str(bad)
        == "session: the request: failed (RuntimeError) (this is a fault of the server; please report it)"
    )
    assert isinstance(bad.__cause__, RuntimeError)
    for case, outcome in zip(cases, outcomes, strict=True):
        if outcome is not bad:
            assert equal(facts(outcome), alone(shapes_alone, work_of([case.image], case.expression), 0))
    assert_empty(engine)


def test_images_and_listeners_that_fail_do_so_alone(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, image = open_engine(shapes_bundle), scenes(1)[0].image

    def broken() -> list[Any]:
        raise OSError("/secret/path")

    def listener(number: int, piece: str) -> None:
        raise RuntimeError("gone")

    def done() -> None:
        raise RuntimeError("the loop is closed")

    bad = engine.submit(Work(work_of([], "circle").questions, broken, 1))
    deaf = engine.submit(work_of([image], talk("circle?")), listener)
    good = engine.submit(work_of([image], "circle"))
    good.when_done(done) if not good.done else None
    assert str(bad.result(WAIT)[0]).startswith("session: the request: failed (OSError)")
    assert isinstance(deaf.result(WAIT)[0], SessionError)
    assert isinstance(good.result(WAIT)[0], Result)
    assert engine.fault is None
    told: list[int] = []
    good.when_done(lambda: told.append(1))
    assert told == [1]
    assert_empty(engine)


def test_an_engine_that_fails_gives_up_everything_and_says_so(
    shapes_bundle: Bundle, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, image = Counting(), scenes(1)[0].image
    engine = open_engine(shapes_bundle, rows=2, observer=counting)
    gone = SessionError("the device is gone", subject="the runtime", hint="x")

    def recover() -> None:
        raise gone

    monkeypatch.setattr(engine._lane, "recover", recover)
    with failing(engine.model.session, "step", gone, after=2):  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([image], *WORDS)) for _ in range(6)]
        outcomes = [each for ticket in tickets for each in ticket.result(WAIT)]
    assert len(outcomes) == 6 * len(WORDS)
    assert {str(each) for each in outcomes if isinstance(each, Refused)} == {
        "serve: the request: is not answered: the engine has failed (ask anew)"
    }
    assert engine.fault is gone
    assert engine.draining
    with pytest.raises(Refused, match="the engine has failed") as caught:
        engine.submit(work_of([image], "circle"))
    assert (caught.value.reason, caught.value.retry_after) == ("broken", None)
    assert_empty(engine)
    engine.close()


def test_a_session_that_is_closed_already(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    from gap_export.serving.limits import EngineLimits

    engine = open_engine(shapes_bundle)
    engine.close()
    engine.model.close()  # type: ignore[attr-defined]
    with pytest.raises(SessionError, match="is closed"):
        Engine(engine.model, EngineLimits())  # type: ignore[attr-defined]


# Ending


@pytest.mark.parametrize("ends", ["drain", "close"])
def test_ending_from_several_threads(ends: str, shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    counting = Counting()
    engine = open_engine(shapes_bundle, rows=2, observer=counting)
    tickets = [engine.submit(work_of([case.image], *WORDS)) for case in scenes(6)]
    told: list[Any] = []
    threads = [threading.Thread(target=lambda: told.append(getattr(engine, ends)())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(told) == 4
    outcomes = [each for ticket in tickets for each in ticket.result(0)]
    assert len(outcomes) == 6 * len(WORDS)
    with pytest.raises(Refused, match="the server stops") as caught:
        engine.submit(work_of([], talk("circle", images=0)))
    assert (caught.value.reason, caught.value.retry_after) == ("draining", 5.0)
    if ends == "drain":
        assert told == [True] * 4
        assert all(isinstance(each, Result) for each in outcomes)
    else:
        assert {each.reason for each in outcomes if isinstance(each, Refused)} == {"draining"}
        assert not engine._thread.is_alive()
    assert engine.fault is None


def test_ending_from_where_answers_are_told_of(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, image, told = open_engine(shapes_bundle), scenes(1)[0].image, []

    def piece(number: int, text: str) -> None:
        told.append(engine.drain())
        engine.close()

    ticket = engine.submit(work_of([image], talk("circle?")), piece)
    assert isinstance(ticket.result(WAIT)[0], Result | Refused)
    engine._thread.join(WAIT)
    assert told[0] is False


def test_closing_does_not_wait_for_clients(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    """Answers are settled before images that are being decoded are waited for."""
    engine, gate = open_engine(shapes_bundle), threading.Event()

    def images() -> list[Any]:
        assert gate.wait(WAIT)
        return []

    ticket = engine.submit(Work(work_of([], "circle").questions, images, 1))
    assert soon(lambda: engine._queue.prepared == 1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    (outcome,) = ticket.result(WAIT)
    assert isinstance(outcome, Refused)
    gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()


def test_draining_says_when_time_was_too_short(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine = open_engine(shapes_bundle)
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        ticket = engine.submit(work_of([scenes(1)[0].image], "circle"))
        assert session.waits.wait(WAIT)
        assert engine.drain(0.05) is False
        assert engine.draining
        session.go.set()
    assert engine.drain(WAIT)
    assert ticket.done


def test_giving_up_ends_whoever_waits_for_the_end(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, image = open_engine(shapes_bundle, rows=2), scenes(1)[0].image
    with held(engine.model.session, "step") as session:  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([image], *WORDS)) for _ in range(3)]
        assert session.waits.wait(WAIT)
        drained: list[bool] = []
        draining = threading.Thread(target=lambda: drained.append(engine.drain()))
        draining.start()
        assert soon(lambda: engine.draining)
        engine.give_up()
        session.go.set()
        draining.join(WAIT)
        assert session.calls == ["step"]
    assert drained == [True]
    outcomes = [each for ticket in tickets for each in ticket.result(0)]
    assert {each.reason for each in outcomes if isinstance(each, Refused)} == {"draining"}


# Who chooses how much is kept


class Choosing:
    """Another fraction for every request."""

    def __init__(self, *keeps: float) -> None:
        self.keeps, self.largest, self.waits = list(keeps), max(keeps), list[float]()

    def choose(self, oldest_wait: float) -> float:
        self.waits.append(oldest_wait)
        return self.keeps[(len(self.waits) - 1) % len(self.keeps)]


def test_the_server_chooses_for_requests_that_do_not(
    shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    choosing = Choosing(1.0, 0.5, 0.25)
    engine, cases = open_engine(shapes_bundle, rows=3, choose_keep=choosing), scenes(6)
    works = [
        work_of([case.image], *WORDS[:3], keep=0.33 if number % 2 else None)
        for number, case in enumerate(cases)
    ]
    tickets = [engine.submit(work) for work in works]
    used = []
    for work, ticket in zip(works, tickets, strict=True):
        outcomes = ticket.result(WAIT)
        (keep,) = {each.keep for each in outcomes if isinstance(each, Result)}
        used.append(keep)
        for number, outcome in enumerate(outcomes):
            assert equal(facts(outcome), alone(shapes_alone, work, number, keep))
    assert used[1::2] == [0.33] * 3, "a request's own is never touched"
    assert sorted(used[::2]) == [0.25, 0.5, 1.0]
    assert len(choosing.waits) == 3
    assert all(0 < wait < WAIT for wait in choosing.waits)


def test_fewer_tokens_under_load(shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine) -> None:
    adapt = Adapt((1.0, 0.5, 0.25), target=0.002)
    engine, cases = open_engine(shapes_bundle, rows=2, choose_keep=adapt), scenes(24)
    works = [work_of([case.image], case.expression) for case in cases]
    own = engine.submit(work_of([cases[0].image], "circle", keep=0.9))
    tickets = [engine.submit(work) for work in works]
    used = []
    for work, ticket in zip(works, tickets, strict=True):
        (outcome,) = ticket.result(WAIT)
        assert isinstance(outcome, Result)
        assert equal(facts(outcome), alone(shapes_alone, work, 0, outcome.keep))
        used.append(outcome.keep)
    assert set(used) <= set(adapt.ratios)
    assert used[-1] == adapt.current == 0.25
    (outcome,) = own.result(WAIT)
    assert isinstance(outcome, Result)
    assert outcome.keep == 0.9


def test_whether_a_request_fits_does_not_depend_on_others(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    """It must with the largest fraction that may be chosen."""
    engine = open_engine(shapes_bundle, choose_keep=Choosing(0.1, 1.0))
    image = scenes(1)[0].image
    turns = (Turn("user", "a circle?", 1), Turn("assistant", "no"), Turn("user", "and here?", 1))
    for _ in range(2):
        (outcome,) = engine.submit(work_of([image, image], Conversation(turns))).result(WAIT)
        assert isinstance(outcome, InputError)
        assert "288 visual tokens" in outcome.message
    (outcome,) = engine.submit(work_of([image, image], Conversation(turns), keep=0.1)).result(WAIT)
    assert isinstance(outcome, Result)


# Memory and time


def test_nothing_of_a_request_stays_when_its_client_left_between_two_questions(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    engine, image = open_engine(shapes_bundle, rows=1), scenes(1)[0].image
    free, kept = engine._free, list[Any]()

    def left(row: Any, **named: Any) -> None:
        free(row, **named)
        kept.append(engine._spare)
        ticket.cancel()

    engine._free = left  # type: ignore[method-assign]
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        ticket = engine.submit(work_of([image], "circle", "square"))
        session.go.set()
        first, second = ticket.result(WAIT)
    assert isinstance(first, Result)
    assert isinstance(second, Refused)
    assert kept[0] is not None, "the next question was to be read from it"
    assert soon(lambda: engine._spare is None)


def test_checks_that_are_asked_together_are_begun_together(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    """Though the second one is prepared late; and nothing is told of them."""
    counting = Counting()
    engine, image = open_engine(shapes_bundle, rows=4, observer=counting), scenes(1)[0].image
    gate, rows = threading.Event(), list[int]()
    step = engine._lane.step

    def counted(token_ids_B: Any, placement: Any) -> Any:
        rows.append(len(token_ids_B))
        return step(token_ids_B, placement)

    engine._lane.step = counted  # type: ignore[method-assign]

    def late() -> list[Any]:
        assert gate.wait(WAIT)
        return [image]

    questions = work_of([], "circle").questions
    works = [Work(questions, lambda: [image], 1, is_check=True), Work(questions * 3, late, 1, is_check=True)]
    tickets = engine.submit_all(works)
    assert soon(lambda: bool(engine._queue._ready))
    assert engine.prompts_read == 0
    gate.set()
    assert all(isinstance(each, Result) for ticket in tickets for each in ticket.result(WAIT))
    assert rows[:4] == [1, 2, 3, 4]
    assert (counting.results, counting.errors, counting.reasons, counting.rows) == ([], [], [], [])
    assert engine.images_decoded == 0
    assert_empty(engine)


def test_few_images_are_in_memory_at_once(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    engine, image = open_engine(shapes_bundle, rows=2, image_threads=3), scenes(1)[0].image
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([image], "circle")) for _ in range(30)]
        assert session.waits.wait(WAIT)
        assert soon(lambda: engine._queue.prepared == 7)
        time.sleep(0.05)
        assert engine.images_decoded == 7
        session.go.set()
    assert all(isinstance(ticket.result(WAIT)[0], Result) for ticket in tickets)
    assert engine.images_decoded == 30
    assert_empty(engine)


def test_a_step_costs_little_beside_the_session(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    """Printed, in processor time, as times depend on the machine. What is asserted is that nothing grows with the length of answers."""
    engine, case = open_engine(shapes_bundle, rows=8), scenes(1)[0]
    inside, beside = [0.0], list[tuple[int, float]]()
    step, whole = engine._lane.step, engine._step

    def timed(*given: Any) -> Any:
        began = time.thread_time()
        try:
            return step(*given)
        finally:
            inside.append(time.thread_time() - began)

    def wholly() -> None:
        began, rows = time.thread_time(), len(engine._rows)
        lengths = {len(row.answer.cache.context.marks) for row in engine._rows}
        whole()
        beside.append((rows, time.thread_time() - began - inside[-1]))
        grown.append({len(row.answer.cache.context.marks) for row in engine._rows} - lengths)

    grown: list[set[int]] = []
    engine._lane.step, engine._step = timed, wholly  # type: ignore[method-assign]
    tickets = [engine.submit(work_of([case.image], *WORDS[:4], talk("circle?"))) for _ in range(12)]
    assert all(isinstance(each, Result) for ticket in tickets for each in ticket.result(WAIT))
    full = [seconds for rows, seconds in beside if rows == 8]
    assert len(full) > 10
    assert not any(grown), "what was read of a prompt is all that is kept of where tokens stand"
    print(
        f"\nbeside the session, 8 rows: {1e3 * np.median(full):.3f} ms per step, of the session {1e3 * np.median(inside):.3f} ms"
    )


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_request(deadline: float) -> None:
    with pytest.raises(InputError, match="must be a number of seconds above 0"):
        work_of([], "circle", deadline=deadline)
    with pytest.raises(InputError, match="asks nothing"):
        work_of([])


def test_what_is_wrong_with_one_question_is_its_own(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    counting = Counting()
    engine, image = open_engine(shapes_bundle, observer=counting), scenes(1)[0].image
    questions: tuple[Any, ...] = (
        "circle",
        "a <image> b",
        talk("a", images=0),
        "",
        talk("a", images=2),
        "square",
    )
    outcomes = engine.submit(work_of([image], *questions)).result(WAIT)
    assert [type(each) for each in outcomes] == [
        Result,
        InputError,
        InputError,
        InputError,
        InputError,
        Result,
    ]
    assert "has 0 images, and 1 were given" in str(outcomes[2])
    assert "has 2 images, and 1 were given" in str(outcomes[4])
    (outcome,) = engine.submit(work_of([image], "circle", keep=0.05)).result(WAIT)
    assert isinstance(outcome, InputError)
    (outcome,) = engine.submit(work_of([image, image], "circle")).result(WAIT)
    assert "has 1 images, and 2 were given" in str(outcome)
    assert len(counting.errors) == 6
    assert_empty(engine)


def test_a_stream_is_the_text(shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine) -> None:
    engine, image = open_engine(shapes_bundle), scenes(1)[0].image
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    work = work_of([image], talk("circle?"), "circle", talk("square?"), stop=", 0.")
    outcomes = engine.submit(work, lambda number, piece: pieces[number].append(piece)).result(WAIT)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Result)
        assert "".join(pieces[number]) == outcome.text
        assert outcome.finish_reason == "stop"
        assert len(pieces[number]) > 1 or ", 0." not in outcome.text
    assert facts(outcomes[1])[0] == alone(shapes_alone, work_of([image], "circle"), 0)[0], "a box is no talk"
    for longest in (1, 2, 3, 30):
        work = work_of([image], talk("circle?"), max_new_tokens=longest, stop="0.7")
        (outcome,) = engine.submit(work).result(WAIT)
        assert equal(facts(outcome), alone(shapes_alone, work, 0))
