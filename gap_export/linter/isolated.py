"""ONNX Runtime in a process of its own, with a limit of time and of memory.

A graph is anybody's: run, it may take years or terabytes, or end the process that runs it. Here that is a sentence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.files.read import is_file
from gap_export.linter import onnxruntime_process
from gap_export.linter.limits import PROOF_BYTES, PROOF_SECONDS

_BYTES_PER_SECOND = 20 * 2**20
"""Of weights, which are read and multiplied with; a slow disk's pace."""
_COPIES = 4
"""Of weights in ONNX Runtime's memory: packed for its kernels, and on the way there."""


class Failed(Exception):
    """ONNX Runtime refuses, or takes too much; the text is its own, or says which limit."""


class Session:
    """A graph in ONNX Runtime, elsewhere.

    Args:
        graph: the file.
        weights: bytes of the graph and of its external files, which loading and running take time and memory for.

    Raises:
        Failed: it does not take the graph.
    """

    def __init__(self, graph: Path, weights: int) -> None:
        self._seconds = PROOF_SECONDS + weights / _BYTES_PER_SECOND
        memory = PROOF_BYTES + _COPIES * weights
        # Not `-m`: the package's own imports would take longer than all else.
        command = [sys.executable, "-P", onnxruntime_process.__file__, os.path.abspath(graph), str(memory)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._answer("loading it")

    def run(self, wanted: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs, as `InferenceSession.run`.

        Raises:
            Failed: it refuses, or took too long or too much memory; from then on it always does.
        """
        names = np.array(list(wanted), dtype=np.str_)
        assert self._process.stdin is not None
        try:
            onnxruntime_process.write(self._process.stdin, {**feeds, onnxruntime_process.NAMES: names})
        except (OSError, ValueError) as error:  # closed, by a limit that an earlier run passed
            raise Failed("it has ended") from error
        found = self._answer("a run")
        return [found[name] for name in wanted]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.start()
        try:
            answer = onnxruntime_process.read(self._process.stdout)
        except ValueError as error:  # arrays of text, say
            raise Failed(f"its answer cannot be read: {error}") from error
        finally:
            timer.cancel()
        if answer is None:
            self.close()
            if late.is_set():
                raise Failed(f"{what} takes more than {self._seconds:.0f} s")
            raise Failed(f"{what} ends the process; it may take more memory than there is")
        if onnxruntime_process.ERROR in answer:
            raise Failed(str(answer[onnxruntime_process.ERROR]))
        return answer


def bytes_of(graph: Path, model: ir.Model) -> int:
    """Bytes of a graph and of its external files.

    Raises:
        Failed: one of them is not there.
    """
    tensors = [v.const_value for each in model.graphs() for v in each.initializers.values()]
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for path in sorted(files):
        if not is_file(path):
            raise Failed(f"its weights are not there: {path.name}")
    return sum(os.path.getsize(path) for path in (graph, *files))
