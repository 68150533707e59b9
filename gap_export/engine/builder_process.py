"""The other side of `isolated`: a library's builder, in a process that it may crash, and that ends when its standard input does.

Requests come on standard input; answers go to a pipe of their own, for libraries print to standard output. A request is the arguments of
`engine_from_graph`; every stage is told as it begins, then the engine or the error is. All are pickled: both sides are this package.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gap_export.bundle.manifest import Engine, EngineTarget
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.build import engine_from_graph
from gap_export.errors import GapExportError


@dataclass(frozen=True)
class Request:
    """Arguments of `engine_from_graph`."""

    graph: Path
    spec: GraphSpec
    target: EngineTarget
    compute_capabilities: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Stage:
    """A stage of the builder begins."""

    message: str


Answer = Stage | Engine | Exception


class _Sent:
    """A progress that the other side is told of; the builder calls it from several threads."""

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers, self._one_at_a_time = answers, threading.Lock()

    def send(self, answer: Answer) -> None:
        with self._one_at_a_time:
            pickle.dump(answer, self._answers)
            self._answers.flush()

    def stage(self, message: str, total: int | None = None) -> None:
        self.send(Stage(message))

    def advance(self, count: int = 1) -> None:
        """Nothing: a builder counts within its stages."""


def main(answers: int) -> None:
    """Build one engine after another, and never return.

    Args:
        answers: descriptor of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's
    os.set_inheritable(answers, False)  # what a library starts must not hold it open
    try:
        sent = _Sent(os.fdopen(answers, "wb"))
        requests = queue.SimpleQueue[Request]()
        threading.Thread(target=_read, args=(requests,), daemon=True).start()
        while True:
            sent.send(_answer(requests.get(), sent))
    except BaseException:
        _end()


def _answer(request: Request, sent: _Sent) -> Answer:
    try:
        return engine_from_graph(**vars(request), progress=sent)
    except GapExportError as error:
        return error
    except Exception as error:  # a bug: where it is would be lost on the way
        said = traceback.format_exc()
        try:
            told: Exception = pickle.loads(pickle.dumps(error))
        except Exception:
            told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(said)
        return told


def _read(requests: queue.SimpleQueue[Any]) -> None:
    """Take requests; end the process with its input, whatever the builder does."""
    try:
        while True:
            requests.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)
    except BaseException:
        _end()


def _end() -> None:
    """At once: what Python does at its end would wait for both threads."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
