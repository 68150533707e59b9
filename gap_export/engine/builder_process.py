"""The other side of `isolated`: a library's builder, in a process that it may crash, and that ends when its standard input does.

Requests are the arguments of `engine_from_graph`; every stage is sent as it begins, then the engine or the error. All are pickled: both
sides are this package, of one version.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gap_export.bundle.manifest import Engine, EngineTarget
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.build import engine_from_graph


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


def main() -> None:
    """Build one engine after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's
    sent = _Sent(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    requests = queue.SimpleQueue[Request]()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        request = requests.get()
        try:
            sent.send(engine_from_graph(**vars(request), progress=sent))
        except Exception as error:
            sent.send(error)


def _read(requests: queue.SimpleQueue[Any]) -> None:
    """Take requests until the other side has ended, and waits for no answer."""
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)  # not even the builder is waited for


if __name__ == "__main__":
    main()
