"""How many requests one core can answer at most: what each takes when nothing but it is computed, its decoding shared by as many as there are rows.

    bound per second = 1 / mean(vision + prefill + steps * step(n) / n)

A process of its own measures it on the core that the server runs on, through the engine and without HTTP: vision and prefill of every request as the
only one, and `step(n)`, the call for one token of each of n rows, with all rows in use. The mean is over the requests that were answered in the load.
Decoding of images, JSON and connections are not in it. As a check, vision and prefill are also those of `Model.ground`, which knows nothing of rows.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gap_export.errors import GapExportError
from gap_export.inputs.chat.conversation import Turn
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.runtime.model import Model, load
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits
from gap_export.serving.work import Conversation, Expression, Question, Result, Work
from serving.asked import Request
from serving.load import Answered

ROUNDS = 5
_FULL_SECONDS = 4.0
"""How long all rows are kept in use to measure their step."""


@dataclass(frozen=True)
class Costs:
    """What requests take on a core.

    Attributes:
        rows: n.
        step: seconds of a call for one token of each of n rows.
        step_alone: of one row.
        read: (number of a request, fraction of its visual tokens as its answer reports it) -> seconds of vision and prefill of all that it asks.
        steps: the same -> tokens that are fed after the prompt.
        core_share: processor time as a share of the time of the measurement: below 1, others ran on this core.
        read_by_ground: seconds of vision and prefill of requests of one expression, by `Model.ground`; as a median.
        read_by_engine: the same, by the engine.
    """

    rows: int
    step: float
    step_alone: float
    read: dict[Answered, float]
    steps: dict[Answered, int]
    core_share: float
    read_by_ground: float
    read_by_engine: float

    def seconds(self, answered: Answered) -> float:
        """Least time on the core of a request."""
        return self.read[answered] + self.steps[answered] * self.step / self.rows

    def bound(self, answered: Counter[Answered]) -> float:
        """Most requests in a second, of the mixture that was answered.

        Args:
            answered: of the tally of a load.
        """
        total = sum(self.seconds(each) * count for each, count in answered.items())
        return answered.total() / total


@dataclass
class _Steps:
    """Seconds of every step, by how many rows were in it; an observer of the engine."""

    seconds: dict[int, list[float]] = field(default_factory=dict)

    def refused(self, reason: str) -> None:
        """Nothing."""

    def answered(self, result: Result) -> None:
        """Nothing."""

    def failed(self, error: GapExportError) -> None:
        """Nothing."""

    def stepped(self, seconds: float, intervals: Sequence[float]) -> None:
        """Note it."""
        self.seconds.setdefault(len(intervals), []).append(seconds)


def work_of(request: Request) -> Work:
    """A request as the engine takes it, without HTTP.

    Args:
        request: of `mixture`.
    """
    questions: tuple[Question, ...] = tuple(map(Expression, request.texts))
    if request.kind in ("chat", "stream"):
        questions = (Conversation((Turn("user", request.texts[0], 1),)),)
    return Work(
        questions,
        lambda: [request.shown.image],
        1,
        keep=request.keep,
        options=AskOptions.of(max_new_tokens=request.max_new_tokens),
        deadline=3600.0,
    )


def measure(bundle: Path, requests: Sequence[Request], rows: int, chosen: Sequence[float] = ()) -> Costs:
    """Measure in this process.

    Args:
        bundle: its folder.
        requests: of the load.
        rows: of the server.
        chosen: fractions of the visual tokens that the server may choose for requests that choose none; the bundle's own alone by default.
    """
    observer = _Steps()
    began, used = time.perf_counter(), time.process_time()
    with load(bundle, threads=1) as model:
        by_ground = _read_by_ground(model, requests)
        with Engine(model, EngineLimits(rows=rows, queue=10_000), observer=observer) as engine:
            own = model.bundle.manifest.pruning.keep
            read: dict[Answered, float] = {}
            steps: dict[Answered, int] = {}
            for number, request in enumerate(requests):
                for keep in (request.keep,) if request.keep is not None else tuple(chosen) or (own,):
                    taken, fed = _alone(engine, replace(work_of(request), keep=keep))
                    for reported in (keep, None):
                        read[number, reported], steps[number, reported] = taken, fed
            alone = statistics.median(observer.seconds[1])
            _fill(engine, list(map(work_of, requests)))
    single = [read[place, None] for place, request in enumerate(requests) if request.kind == "ground"]
    return Costs(
        rows=rows,
        step=statistics.median(observer.seconds[rows]),
        step_alone=alone,
        read=read,
        steps=steps,
        core_share=(time.process_time() - used) / (time.perf_counter() - began),
        read_by_ground=by_ground,
        read_by_engine=statistics.median(single),
    )


def _fill(engine: Engine, works: Sequence[Work]) -> None:
    """Keep all rows in use for a while."""
    ends = time.monotonic() + _FULL_SECONDS
    place = 0
    while time.monotonic() < ends:
        tickets = [engine.submit(works[(place + step) % len(works)]) for step in range(8 * engine.rows)]
        place += len(tickets)
        for ticket in tickets:
            ticket.result()


def _alone(engine: Engine, work: Work) -> tuple[float, int]:
    """Seconds of vision and prefill of a request, and tokens that are fed after its prompts."""
    rounds = [_results(engine, work) for _ in range(ROUNDS)]
    taken = [sum(each.spent.vision + each.spent.prefill for each in results) for results in rounds]
    return statistics.median(taken), sum(map(_steps_of, rounds[0]))


def _results(engine: Engine, work: Work) -> list[Result]:
    found = engine.submit(work).result()
    for outcome in found:
        if isinstance(outcome, GapExportError):
            raise SystemExit(f"a request of the load cannot be answered: {outcome}")
    return [outcome for outcome in found if isinstance(outcome, Result)]


def _steps_of(result: Result) -> int:
    """Tokens that are fed: the last of an answer that was cut off is not."""
    return len(result.ids) - (result.finish_reason == "length")


def _read_by_ground(model: Model, requests: Sequence[Request]) -> float:
    """Seconds of vision and prefill as `ground` has them, of requests of one expression."""
    taken = []
    for request in requests:
        if request.kind == "ground":
            times = [
                model.ground(request.shown.image, request.texts[0], keep=request.keep).timings
                for _ in range(ROUNDS)
            ]
            taken.append(statistics.median(each.vision + each.prefill for each in times))
    return statistics.median(taken)
