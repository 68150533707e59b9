"""Tasks dispatched to worker processes, results as they come; with one worker, in this process.

A worker is made once per process and may keep what tasks have in common. Workers start afresh (`spawn`), touch no file of the
caller's and end with it, however it ends: only the caller stores results, so a killed run leaves no writer behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Generic

from gap_export.errors import CheckpointWarning, GapExportError, InputError, MissingRequirementError
from gap_export.parallel.worker import Result, Task, Worker
from gap_export.progress import SILENT, Progress

_SHUTDOWN_TIMEOUT_S = 5
"""How long a worker that was told to end may take to do so in order."""


# What a worker process sends, besides a `GapExportError`:


@dataclass(frozen=True)
class _Finished(Generic[Result]):
    result: Result


@dataclass(frozen=True)
class _Ready:
    """For a task."""


@dataclass(frozen=True)
class _Stage:
    message: str
    total: int | None


@dataclass(frozen=True)
class _Advance:
    count: int


class _Sent:
    """Progress in a worker process: sent to the caller, who tells its own."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send

    def stage(self, message: str, total: int | None = None) -> None:
        self._send(_Stage(message, total))

    def advance(self, count: int = 1) -> None:
        self._send(_Advance(count))


def results_of(
    make_worker: Callable[[], Worker[Task, Result]],
    tasks: Sequence[Task],
    *,
    workers: int,
    progress: Progress = SILENT,
) -> Generator[Result]:
    """Do all tasks.

    Args:
        make_worker: called once in every process; can be pickled, as can tasks and results.
        tasks: begun in this order.
        workers: how many processes.
        progress: told in this process.

    Yields:
        Results in the order in which they are finished.

    Raises:
        InputError: fewer than one worker.
        GapExportError: a worker's own.
        MissingRequirementError: a worker was killed, or broke down with a traceback of its own.
    """
    if workers < 1:
        raise InputError(
            "must be at least 1", subject=f"workers {workers}", hint="1 works in this process alone"
        )
    workers = min(workers, len(tasks))
    if workers <= 1:
        worker = make_worker() if tasks else None
        for task in tasks:
            assert worker is not None
            yield from worker(task, progress)
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            with _undisturbed():
                connection, process = _started(context, make_worker)
                processes[connection] = process
        while processes:
            for ready in wait(list(processes)):
                assert isinstance(ready, Connection)
                connection = ready
                try:
                    message = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise _broken(processes[connection]) from error
                if isinstance(message, _Finished):
                    yield message.result
                elif isinstance(message, _Stage):
                    progress.stage(message.message, message.total)
                elif isinstance(message, _Advance):
                    progress.advance(message.count)
                elif isinstance(message, GapExportError):
                    raise message
                elif waiting:
                    connection.send(waiting.pop())
                else:
                    connection.close()
                    processes.pop(connection).join()
    finally:
        with _undisturbed():
            _end(processes.values())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block has ended: a process must not be lost that was just started, nor one be left that is to end.

    Processes that are started in the block begin without it, so that none is interrupted while it imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Iterable[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _started(
    context: SpawnContext, make_worker: Callable[[], Worker[Task, Result]]
) -> tuple[Connection, SpawnProcess]:
    resource_tracker.ensure_running()  # starting it lets Ctrl-C through again
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_worker), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return mine, process


def _broken(process: SpawnProcess) -> MissingRequirementError:
    process.join()
    code = process.exitcode or 0
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return MissingRequirementError(
        f"{how} before its work was done",
        subject="a worker process",
        hint="where memory is short, --workers 1 takes less; finished work is kept: run the same command again",
    )


def _serve(connection: Connection, make_worker: Callable[[], Worker[Task, Result]]) -> None:
    """A worker process: asks for tasks until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, who ends the workers
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # in order: what libraries have to clear away, they do
    warnings.simplefilter("ignore", CheckpointWarning)  # the caller has told them
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    try:
        worker, progress = make_worker(), _Sent(connection.send)
        while True:
            connection.send(_Ready())
            for result in worker(connection.recv(), progress):
                connection.send(_Finished(result))
    except EOFError:  # no task is left
        return
    except GapExportError as error:
        connection.send(error)


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)
