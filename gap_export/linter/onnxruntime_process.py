"""The other side of `isolated`: ONNX Runtime in a process that may be ended. Imports nothing of this project, so that it starts at once.

    python onnxruntime_process.py GRAPH MEMORY

Requests come on standard input and answers go to standard output, each as an archive of NumPy arrays with its length before it.
"""

from __future__ import annotations

import io
import struct
import sys
from typing import IO, Any

import numpy as np

LENGTH = struct.Struct("<Q")
NAMES, ERROR = "?names", "?error"
"""Keys that are no tensor's."""


def write(stream: IO[bytes], arrays: dict[str, Any]) -> None:
    """Send arrays under their names."""
    content = io.BytesIO()
    named: dict[str, Any] = {f"array_{i}": array for i, array in enumerate(arrays.values())}
    named[NAMES] = np.array(list(arrays), dtype=np.str_)
    np.savez(content, **named)
    stream.write(LENGTH.pack(content.tell()) + content.getbuffer())
    stream.flush()


def read(stream: IO[bytes]) -> dict[str, Any] | None:
    """Arrays by their names; None where the other side has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {str(name): archive[f"array_{i}"] for i, name in enumerate(archive[NAMES])}


def main() -> None:
    """Load a graph, and run it as often as it is asked to."""
    graph, memory = sys.argv[1], int(sys.argv[2])
    answers = sys.stdout.buffer
    _limit(memory)
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["GroupQueryAttentionFusion"],
        )
    except (
        Exception
    ) as error:  # operators it does not know, weights that are not there: it raises what it likes
        write(answers, {ERROR: np.array(str(error))})
        return
    write(answers, {})
    while (request := read(sys.stdin.buffer)) is not None:
        wanted = [str(name) for name in request.pop(NAMES)]
        try:
            found = session.run(wanted, request)
            write(answers, dict(zip(wanted, found, strict=True)))
        except Exception as error:
            write(answers, {ERROR: np.array(str(error))})


def _limit(memory: int) -> None:
    """Bound what this process may allocate, where the system can."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            memory = min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
