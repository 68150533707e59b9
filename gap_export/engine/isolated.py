"""A library's builder in a process of its own: that it crashes there is a sentence here, and Ctrl-C need not wait for it.

Builders are C++ code that compiles whatever graph there is; now and then one ends its process, or searches for hours in a step that it
does not interrupt.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gap_export.bundle.manifest import Engine, EngineTarget
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.build import scratch_of
from gap_export.engine.builder_process import Answer, Request, Stage
from gap_export.engine.library import TARGETS
from gap_export.errors import EngineError, GapExportError, MissingRequirementError, in_one_line
from gap_export.progress import SILENT, Progress

_START = "import sys; sys.path[:] = sys.argv[1:]; from gap_export.engine.builder_process import main; main()"
_SECONDS_TO_END = 10.0
"""For a process whose output has ended."""
_LAST_BYTES = 4096


class Builder:
    """`engine_from_graph`, elsewhere. The process is started for the first engine, and ended with the block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: IO[bytes] | None = None

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
        answer = self._ask(request)
        while isinstance(answer, Stage):
            progress.stage(answer.message)
            answer = self._next()
        if answer is None:
            scratch_of(request.folder, target, spec.name).unlink(missing_ok=True)
            raise self._fault(target, spec.name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._printed is not None:
            self._printed.close()
            self._printed = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Request) -> Answer | None:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._next()

    def _start(self) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            start_new_session=True,  # Ctrl-C in a terminal does not reach it
        )

    def _next(self) -> Answer | None:
        """What comes next; None where the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            answer: Answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):  # the latter: in the middle of an answer
            return None
        return answer

    def _fault(self, target: EngineTarget, name: str) -> GapExportError:
        """Of a process that ended without an answer."""
        assert self._process is not None
        assert self._printed is not None
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = 0
        self._printed.seek(max(0, self._printed.seek(0, 2) - _LAST_BYTES))
        printed = self._printed.read().decode(errors="replace").strip().splitlines()
        self.close()
        title, subject = TARGETS[target].title, f"graph {name}"
        if code == -signal.SIGKILL:
            return MissingRequirementError(
                f"the system ended {title}'s builder, as it does where memory runs out",
                subject=subject,
                hint="free memory, or build on a machine with more",
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = f": {in_one_line(printed[-1])}" if printed else ""
        return EngineError(
            f"{title}'s builder crashed on it ({how}){said}",
            subject=subject,
            hint="build with another pruner or precision, or for onnx alone; the crash is the library's own",
        )
