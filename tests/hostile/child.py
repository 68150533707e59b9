"""One command in a forked child of this process, which has imported everything: under limits, in a folder of its own, in a chosen environment."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gap_export.graph import trace
from gap_export.serving.server import Server
from tests.guard import GUARD

UNTRACED = "stopped before a graph is traced that is new"
"""What a command says on standard error that ends there."""
_POLL_S = 0.01
_MOST_BYTES = 4 * 2**30
"""More than any command here takes; a child with more is ended before the machine is."""
_LONGEST_OUTPUT = 64 * 2**20
"""Bytes of standard output or error."""

_IMPORTED = (
    "gap_export.cli",
    "gap_export.pipeline.build",
    "gap_export.evaluation.calibrate",
    "gap_export.evaluation.validate",
    "gap_export.evaluation.latency.bench",
    "gap_export.evaluation.refer.evaluate",
    "gap_export.evaluation.refer.compare",
    "gap_export.evaluation.recommend.bundle",
    "gap_export.evaluation.recommend.run",
    "gap_export.evaluation.recommend.show",
    "gap_export.evaluation.report.write",
    "gap_export.evaluation.report.choices",
    "gap_export.evaluation.report.terminal",
    "gap_export.evaluation.sweep.run",
    "gap_export.evaluation.sweep.show",
    "gap_export.linter",
    "gap_export.linter.prove",
    "gap_export.graph.trace",
    "gap_export.runtime.ort",
    "gap_export.runtime.torch.staged",
    "onnxruntime",
    "onnx.reference",
    "onnxscript",
    "torch.export",
    "torch.onnx",
    "torch._dynamo",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "gap_export.serving.check_receipt",
    "gap_export.serving.serve",
    "rich.progress",
    "rich.table",
    "jinja2",
)


@dataclass(frozen=True)
class Environment:
    """What a command finds around it.

    Attributes:
        name: for the table.
        enter: called in the child, in its working folder, before the command; None for nothing.
        encoding: of standard output and error.
        errors: how their encoding takes what it does not have; that of Python itself.
        needs_mount: whether a file system is mounted, which not every machine allows.
    """

    name: str = "plain"
    enter: Callable[[], None] | None = None
    encoding: str = "utf-8"
    errors: str = "strict"
    needs_mount: bool = False


PLAIN = Environment()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; None where it was killed.
        signal: that killed it.
        out: standard output.
        err: standard error.
        seconds: of time that passed.
        cpu_seconds: of the processor.
        peak_bytes: of memory, those that it shares with its parent included.
        stopped: why it was ended from here; empty where it ended itself.
    """

    code: int | None
    signal: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stopped: str = ""


def import_everything() -> None:
    """Whatever commands import, so that children find it there, and no thread that they would lack."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never looked at again is shared with the children


def run_alone(
    line: Sequence[str],
    place: Path,
    *,
    seconds: float,
    caches: Path,
    environment: Environment = PLAIN,
    traces: bool = True,
) -> Ended:
    """Run `gap-export LINE` in `place/work`.

    Args:
        line: words after the name of the program.
        place: folder with `work`; home and temporary folder of the command are made in it.
        seconds: it may take.
        caches: folder for traces of graphs.
        environment: that it finds.
        traces: whether a graph that is in no cache is traced, which takes seconds; else the command ends there, and counts as accepted.
    """
    for name in ("home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    out, err = place / "out.txt", place / "err.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(line, place, caches, environment, traces)
    stopped = ""
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if not stopped:
            stopped = _why_to_stop(child, time.monotonic() - began, seconds)
            if stopped:
                os.killpg(child, signal.SIGKILL)
        time.sleep(_POLL_S)
    with_others = os.WIFSIGNALED(status)
    return Ended(
        code=None if with_others else os.WEXITSTATUS(status),
        signal=os.WTERMSIG(status) if with_others else 0,
        out=_text(out),
        err=_text(err),
        seconds=time.monotonic() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        stopped=stopped,
    )


def _why_to_stop(child: int, passed: float, seconds: float) -> str:
    if passed > seconds:
        return f"was not done after {seconds:.0f} s"
    try:
        pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return ""
    taken = pages * resource.getpagesize()
    return f"took {taken / 1e9:.1f} GB" if taken > _MOST_BYTES else ""


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""


def _child(
    line: Sequence[str], place: Path, caches: Path, environment: Environment, traces: bool
) -> NoReturn:
    """Everything that a fresh process would have, then the command; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)  # so that whatever it starts can be ended with it
        _redirect(place)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**31, 2**31))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _set_variables(place, caches)
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        os.chdir(place / "work")
        if environment.enter is not None:
            environment.enter()
        sys.stdout = _stream(1, environment, environment.errors)
        sys.stderr = _stream(2, environment, "backslashreplace")
        faulthandler.disable()
        if sys.stderr is not None:
            faulthandler.enable(2)
        GUARD.allow([place, caches, Path("/proc")])
        if not traces:
            trace.graph_from_component = _stop_before_tracing
        _end_servers_when_ready()
        code = _command(line)
    finally:
        os._exit(code)


def _stream(descriptor: int, environment: Environment, errors: str) -> Any:
    """As Python makes it when it starts: None where the descriptor is closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    binary = open(descriptor, "wb", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        binary, encoding=environment.encoding, errors=errors, line_buffering=descriptor == 2
    )


def _stop_before_tracing(*_: object, **__: object) -> NoReturn:
    """The module is made, and would be traced now."""
    print(UNTRACED, file=sys.stderr)
    raise SystemExit(0)


def _end_servers_when_ready() -> None:
    """A server that was accepted would not end."""
    prove = Server._prove

    def proved(server: Server) -> None:
        prove(server)
        server.stop()

    Server._prove = proved  # type: ignore[method-assign]


def _redirect(place: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
        file = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)


def _set_variables(place: Path, caches: Path) -> None:
    os.environ.update(
        HOME=str(place / "home"),
        TMPDIR=str(place / "tmp"),
        GAP_EXPORT_TRACE_CACHE=str(caches),
        COLUMNS="200",
    )
    for name in ("XDG_CACHE_HOME", "PYTEST_CURRENT_TEST"):
        os.environ.pop(name, None)
    tempfile.tempdir = None


def _command(line: Sequence[str]) -> int:
    """Exit code, as the interpreter itself would give it."""
    from gap_export import cli

    sys.argv = ["gap-export", *line]
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        if sys.stderr is not None:
            traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BaseException as error:
        if sys.stderr is not None:
            print(f"Exception ignored while flushing sys.stdout: {error!r}", file=sys.stderr)
        code = 120
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except BaseException:
        code = 120
    return code
