"""The same evaluation on a Ray cluster: pictures are dealt to workers, answers come back to the caller, who alone keeps the journal.

So a worker that is killed loses nothing but the picture that it was at, which another answers; and nothing can be counted twice,
whoever answers it.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from gap_export.errors import EnvironmentLacks, GapExportError
from gap_export.evaluation.annotations import Expression
from gap_export.evaluation.answering import Answerer
from gap_export.evaluation.journal import AnswerRow, Journal
from gap_export.evaluation.pictures import Source
from gap_export.evaluation.run import Tick, Work, groups_left, rows_about

_PATIENCE_SECONDS = 5

ATTEMPTS = 3
"""How often a picture may bring its worker down before the evaluation gives up."""


class _Worker:
    """Lives in a process of the cluster."""

    def __init__(self, make_answerer: Callable[[], Answerer], source: Source) -> None:
        self._make, self._source = make_answerer, source
        self._answerer: Answerer | None = None

    def about(self, group: tuple[Expression, ...]) -> list[AnswerRow] | GapExportError:
        """Answers about one picture; an error of ours as a value, so that it arrives as what it is."""
        try:
            self._answerer = self._answerer or self._make()
            return rows_about(self._answerer, self._source, group)
        except GapExportError as error:
            return error


def answer_on_ray(
    make_answerer: Callable[[], Answerer],
    work: Work,
    source: Source,
    journal: Journal,
    *,
    workers: int,
    address: str | None = None,
    tick: Tick = lambda count: None,
) -> None:
    """Answer what the journal does not hold yet.

    Args:
        make_answerer: called once in every worker; the bundle must be there under the same path.
        work: to be done.
        source: of pictures; sent to every worker.
        journal: kept here.
        workers: how many.
        address: of a running cluster; one is started on this machine when left out.
        tick: see `run.answer_all`.

    Raises:
        GapExportError: a worker's own.
        EnvironmentLacks: Ray is not installed or no cluster is there; or one picture brought down several workers.
    """
    ray = _ray()
    started = _connected(ray, address, workers)
    everyone: list[Any] = []
    try:
        shared = ray.put(source)
        remote = ray.remote(num_cpus=1, max_restarts=0)(_Worker)

        def hired() -> Any:
            everyone.append(remote.remote(make_answerer, shared))
            return everyone[-1]

        left = deque(groups_left(work, journal, tick))
        idle = [hired() for _ in range(min(workers, len(left)))]
        running: dict[Any, tuple[Any, tuple[Expression, ...]]] = {}
        attempts: Counter[str] = Counter()
        while left or running:
            while left and idle:
                worker, group = idle.pop(), left.popleft()
                running[worker.about.remote(group)] = (worker, group)
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            worker, group = running.pop(finished)
            try:
                outcome = ray.get(finished)
            except ray.exceptions.RayActorError as error:
                attempts[group[0].image] += 1
                if attempts[group[0].image] == ATTEMPTS:
                    raise EnvironmentLacks(
                        f"ended {ATTEMPTS} times before they had answered",
                        subject=f"workers asked about {group[0].image}",
                        hint="what is answered is kept; see Ray's logs of the workers, and run the same command again",
                    ) from error
                left.appendleft(group)
                idle.append(hired())
                continue
            if isinstance(outcome, GapExportError):
                raise outcome
            idle.append(worker)
            journal.add(outcome)
            tick(len(outcome))
    finally:
        # Now, and not when the last reference is gone: the cluster's places are others' from here on.
        for worker in everyone:
            ray.kill(worker)
        if started:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise EnvironmentLacks(
            "is not installed", subject="ray", hint="pip install 'gap-export[ray]'"
        ) from error
    return ray


def _connected(ray: Any, address: str | None, workers: int) -> bool:
    """Whether it was connected here, and is to be left here."""
    if ray.is_initialized():
        return False
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    try:
        if address is None:
            ray.init(num_cpus=workers, **quiet)
        else:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise EnvironmentLacks(
            f"cannot be reached: {str(error).splitlines()[0]}",
            subject=f"the Ray cluster at {address}" if address else "a Ray cluster on this machine",
            hint="start one with `ray start --head`, or leave --ray-address out",
        ) from error
    return True


def _knock(address: str) -> None:
    """Fail at once where nobody listens; Ray would wait for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS).close()
