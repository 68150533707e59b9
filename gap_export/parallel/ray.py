"""Tasks dealt to the workers of a Ray cluster, results as they come.

The caller alone stores results. So a worker that is killed loses nothing but the task that it was at, which another does; and nothing can
be counted twice, whoever does it. (On one machine without Ray: `workers.py`.)
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from gap_export.errors import GapExportError, MissingRequirementError, first_line

Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3
"""How often a task may bring its worker down before all work is given up."""

_PATIENCE_SECONDS = 5


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

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._do: Callable[[Any], Any] | None = None

    def do(self, task: Any) -> Any:
        """A result; an error of ours as a value, so that it arrives as what it is."""
        try:
            self._do = self._do or self._make()
            return self._do(task)
        except GapExportError as error:
            return error


def results_on(
    cluster: Cluster,
    make_worker: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
    *,
    name_of: Callable[[Task], str],
) -> Generator[Result]:
    """Do all tasks.

    Args:
        cluster: where.
        make_worker: called once in every worker, in whose process it finds the same files under the same paths; gives what does a task.
        tasks: begun in this order; asked for once all workers are known to be there.
        name_of: a task, for messages; different for each.

    Yields:
        Results in the order in which they are finished. Who stops early closes the generator, which ends the workers.

    Raises:
        GapExportError: a worker's own.
        MissingRequirementError: Ray is not installed or no cluster is there; or one task brought down several workers.
    """
    ray = _ray()
    started = _connected(ray, cluster)
    everyone: list[Any] = []
    try:
        shared = ray.put(make_worker)
        remote = ray.remote(num_cpus=1, max_restarts=0)(_Worker)

        def hired() -> Any:
            everyone.append(remote.remote(shared))
            return everyone[-1]

        left = deque(tasks)
        idle = [hired() for _ in range(min(cluster.workers, len(left)))]
        running: dict[Any, tuple[Any, Task]] = {}
        attempts: Counter[str] = Counter()
        while left or running:
            while left and idle:
                worker, task = idle.pop(), left.popleft()
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
                left.appendleft(task)
                idle.append(hired())
                continue
            if isinstance(outcome, GapExportError):
                raise outcome
            idle.append(worker)
            yield outcome
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
            _knock(cluster.address)
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


def _knock(address: str) -> None:
    """Fail at once where nobody listens; Ray would wait for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS).close()
