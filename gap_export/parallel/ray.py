"""Tasks dispatched to the workers of a Ray cluster, results as they come.

The caller alone stores results. So a worker that is killed loses nothing but the task that it was at, which another does; and nothing is
counted twice: results of a task arrive together, when all of it is done. (On one machine without Ray: `local.py`.)
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from gap_export.errors import GapExportError, MissingRequirementError, first_line
from gap_export.parallel.worker import Result, Task, Worker
from gap_export.progress import SILENT, Progress

ATTEMPTS = 3
"""How often a task may bring its worker down before all work is given up."""

_REACHABLE_TIMEOUT_S = 5


@dataclass(frozen=True)
class Cluster:
    """Where to work.

    Attributes:
        workers: how many.
        address: of a running cluster; None starts one on this machine.
    """

    workers: int
    address: str | None = None


class _Worker:
    """Lives in a process of the cluster."""

    def __init__(self, make: Callable[[], Worker[Any, Any]]) -> None:
        self._make = make
        self._worker: Worker[Any, Any] | None = None

    def do(self, task: Any) -> _Done | GapExportError:
        """What came of a task; a `GapExportError` as a value, so that it arrives with its own type."""
        counted = _Counted()
        try:
            self._worker = self._worker or self._make()
            return _Done(tuple(self._worker(task, counted)), counted.message, counted.count)
        except GapExportError as error:
            return error


@dataclass(frozen=True)
class _Done:
    """A finished task.

    Attributes:
        results: of the task.
        message: of its last stage.
        count: units of work that it was.
    """

    results: tuple[Any, ...]
    message: str | None
    count: int


class _Counted:
    """Progress in a worker of the cluster: kept until the task is done."""

    def __init__(self) -> None:
        self.message: str | None = None
        self.count = 0

    def stage(self, message: str, total: int | None = None) -> None:
        self.message = message

    def advance(self, count: int = 1) -> None:
        self.count += count


def results_on(
    cluster: Cluster,
    make_worker: Callable[[], Worker[Task, Result]],
    tasks: Sequence[Task],
    *,
    name_of: Callable[[Task], str],
    progress: Progress = SILENT,
) -> Generator[Result]:
    """Do all tasks.

    Args:
        cluster: where.
        make_worker: called once in every worker, in whose process it finds the same files under the same paths.
        tasks: begun in this order.
        name_of: a task, for messages; different for each.
        progress: told of every task that is finished.

    Yields:
        Results in the order in which they are finished. Who stops early closes the generator, which ends the workers.

    Raises:
        GapExportError: a worker's own.
        MissingRequirementError: Ray is not installed or no cluster is there; or one task brought down several workers.
    """
    if not tasks:
        return
    ray = _ray()
    connected = _connected(ray, cluster)
    started: list[Any] = []
    try:
        shared = ray.put(make_worker)
        remote = ray.remote(num_cpus=1, max_restarts=0)(_Worker)

        def start() -> Any:
            started.append(remote.remote(shared))
            return started[-1]

        waiting = deque(tasks)
        idle = [start() for _ in range(min(cluster.workers, len(waiting)))]
        running: dict[Any, tuple[Any, Task]] = {}
        attempts: Counter[str] = Counter()
        while waiting or running:
            while waiting and idle:
                worker, task = idle.pop(), waiting.popleft()
                running[worker.do.remote(task)] = (worker, task)
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(finished)
            try:
                outcome = ray.get(finished)
            except ray.exceptions.RayActorError as error:
                name = name_of(task)
                attempts[name] += 1
                if attempts[name] == ATTEMPTS:
                    raise MissingRequirementError(
                        f"ended {ATTEMPTS} times before they had done it",
                        subject=f"workers at {name}",
                        hint="what is finished is kept; see Ray's logs of the workers, and run the same command again",
                    ) from error
                waiting.appendleft(task)
                idle.append(start())
                continue
            if isinstance(outcome, GapExportError):
                raise outcome
            idle.append(worker)
            if outcome.message is not None:
                progress.stage(outcome.message)
            yield from outcome.results
            progress.advance(outcome.count)
    finally:
        # Now, and not when the last reference is gone: the cluster's places are others' from here on.
        for worker in started:
            ray.kill(worker)
        if connected:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingRequirementError(
            "is not installed", subject="ray", hint="pip install 'gap-export[ray]'"
        ) from error
    return ray


def _connected(ray: Any, cluster: Cluster) -> bool:
    """Whether it was connected here, and is to be left here."""
    if ray.is_initialized():
        return False
    try:
        if cluster.address is None:
            ray.init(
                num_cpus=cluster.workers, include_dashboard=False, log_to_driver=False, logging_level="error"
            )
        else:
            _check_reachable(cluster.address)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingRequirementError(
            f"cannot be reached: {first_line(error)}",
            subject=f"the Ray cluster at {cluster.address}"
            if cluster.address
            else "a Ray cluster on this machine",
            hint="start one with `ray start --head`, or leave --ray-address out",
        ) from error
    return True


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens; Ray would wait for minutes.

    Raises:
        OSError: nothing listens at the address.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=_REACHABLE_TIMEOUT_S).close()
