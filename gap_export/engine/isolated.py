"""A library's builder in a process of its own: that it crashes there is a sentence here, and Ctrl-C need not wait for it.

Builders are C++ code that compiles whatever graph there is; now and then one ends its process, or searches for hours in a step that it
does not interrupt.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gap_export.bundle.manifest import Engine, EngineTarget
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.build import engine_file, scratch_of
from gap_export.engine.builder_process import Answer, Request, Stage
from gap_export.engine.library import TARGETS
from gap_export.errors import EngineError, GapExportError, MissingRequirementError, first_line, in_one_line
from gap_export.progress import SILENT, Progress

_START = "import sys; sys.path[:] = sys.argv[2:]; from gap_export.engine.builder_process import main; main(int(sys.argv[1]))"
_SECONDS_TO_END = 10.0
"""For a process whose answers have ended."""
_LAST_BYTES = 4096
"""Of what it printed."""
_OUT_OF_MEMORY = re.compile("bad_alloc|out of memory|MemoryError", re.IGNORECASE)


@dataclass(frozen=True)
class _Process:
    running: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: IO[bytes]
    printed: IO[bytes]


class Builder:
    """`engine_from_graph`, elsewhere, one at a time. The process is started for the first engine, and ended with the block."""

    def __init__(self) -> None:
        self._process: _Process | None = None

    def engine_from_graph(
        self,
        graph: Path,
        spec: GraphSpec,
        *,
        target: EngineTarget,
        compute_capabilities: Sequence[str],
        folder: Path,
        progress: Progress = SILENT,
    ) -> Engine:
        """As `engine.build.engine_from_graph`.

        Raises:
            EngineError: the library refused something, or crashed.
            MissingRequirementError: something is missing; memory, where the system ended the process.
        """
        request = Request(graph.absolute(), spec, target, tuple(compute_capabilities), folder.absolute())
        process = self._process = self._process or _start()
        try:
            answer = _ask(process, request)
            while isinstance(answer, Stage):
                progress.stage(answer.message)
                answer = _next(process)
        except BaseException:  # of the progress, or Ctrl-C
            self.close()  # what else the process says is no answer to the next request
            raise
        if answer is None:
            fault = _fault(process, TARGETS[target].title, f"graph {spec.name}")
            self.close()
            scratch_of(engine_file(request.folder, target, spec.name)).unlink(missing_ok=True)
            raise fault
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        self._process.running.kill()
        self._process.running.communicate()
        self._process.answers.close()
        self._process.printed.close()
        self._process = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start() -> _Process:
    folders = map(os.path.abspath, sys.path)
    with contextlib.ExitStack() as opened:
        try:
            ends = os.pipe()
            answers = opened.enter_context(os.fdopen(ends[0], "rb"))
            told = opened.enter_context(os.fdopen(ends[1], "wb"))
            printed = opened.enter_context(tempfile.TemporaryFile())
            running = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(told.fileno()), *folders],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(told.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal does not reach it
            )
        except OSError as error:
            raise MissingRequirementError(
                f"could not be started: {first_line(error)}",
                subject="a process that builds engines",
                hint="free memory and space for temporary files, and run the command again",
            ) from error
        told.close()
        opened.pop_all()  # closed with the process
    assert running.stdin is not None
    return _Process(running, running.stdin, answers, printed)


def _ask(process: _Process, request: Request) -> Answer | None:
    try:
        pickle.dump(request, process.requests)
        process.requests.flush()
    except BrokenPipeError:
        return None
    return _next(process)


def _next(process: _Process) -> Answer | None:
    """What comes next; None where the process has ended."""
    try:
        answer: Answer = pickle.load(process.answers)
    except (EOFError, pickle.UnpicklingError):  # the latter: in the middle of an answer
        return None
    return answer


def _fault(process: _Process, title: str, subject: str) -> GapExportError:
    """Of a process that ended without an answer."""
    try:
        code = process.running.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:  # it said what is no answer
        code = 0
    printed = process.printed
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - _LAST_BYTES))
    lines = printed.read().decode(errors="replace").strip().splitlines()
    last = f", and printed last: {in_one_line(lines[-1].strip())}" if lines else ""
    if code == -signal.SIGKILL or any(map(_OUT_OF_MEMORY.search, lines)):
        return MissingRequirementError(
            f"ran out while {title} built the engine ({_how(code)})",
            subject=f"memory, {subject}",
            hint="free memory, or build on a machine with more",
        )
    if code < 0:
        return EngineError(
            f"{title}'s builder crashed on it ({_how(code)}){last}",
            subject=subject,
            hint="build with another pruner or precision, or for onnx alone; the crash is the library's own",
        )
    return EngineError(
        f"the process that builds its engine ended ({_how(code)}){last}",
        subject=subject,
        hint="run the command again, or build for onnx alone; if it ends so again, please report this",
    )


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
