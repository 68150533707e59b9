"""Commands that are killed, or given errors, at every event of the file system that they cause; the rest of the process is theirs.

A command runs in a forked child of this process, which has imported everything. Events are what Python says before it does them (audit
hooks), writes through its files, each in two halves, and exchanges of folders. So the state of the disk before event n + 1 is the one after
event n, and rounds that end before each event, and after the last, meet every state there is.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gap_export.files import folder as folders

_TWO_PATHS = {"os.rename", "os.link"}
_ONE_PATH = {"os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.symlink": None}
"""Event -> where its arguments name the folder that a path is relative to."""
_REMOVES = {"os.remove", "os.rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LONGEST_S = 60

Act = Callable[[int, str], None]
"""Number of an event, from 0 on, and what it is: called before it happens."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code; negative for a signal.
        said: what it wrote to standard output and standard error.
        events: that it caused, in order.
    """

    code: int
    said: str
    events: tuple[str, ...]


def kill_at(number: int) -> Act:
    """Die of SIGKILL before an event."""

    def act(event: int, _: str) -> None:
        if event == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail_at(number: int, code: int, *, for_good: bool) -> Act:
    """Let an event fail, once; or for good, as on a full disk, on which only removing succeeds."""

    def act(event: int, what: str) -> None:
        full = for_good and event >= number and what.split()[0] not in _REMOVES
        if full or event == number:
            raise OSError(code, os.strerror(code))

    return act


def nothing(_: int, __: str) -> None:
    """Let everything happen."""


def forked(command: Callable[[], object], root: Path, log: Path, act: Act = nothing) -> Ended:
    """Run a command in a child.

    Args:
        command: raises `SystemExit` with its exit code, or returns.
        root: events below this folder count.
        log: file to write to, outside of it.
        act: called before every event.
    """
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _run(command, root, log, act)
    deadline = time.monotonic() + _LONGEST_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs: {log.read_text()}")
        time.sleep(0.002)
    lines = log.read_text(errors="backslashreplace").splitlines() if log.exists() else []
    events = tuple(line.removeprefix(_EVENT) for line in lines if line.startswith(_EVENT))
    said = "\n".join(line for line in lines if not line.startswith(_EVENT))
    return Ended(os.waitstatus_to_exitcode(status), said, events)


_EVENT = "\0event "


def _run(command: Callable[[], object], root: Path, log: Path, act: Act) -> NoReturn:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        _watch(root, act, lambda what: os.write(descriptor, f"{_EVENT}{what}\n".encode(errors="replace")))
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _watch(root: Path, act: Act, note: Callable[[str], object]) -> None:
    """Tell of every event below a folder, for the rest of this process."""
    beginning = f"{root}{os.sep}"
    count = 0

    def place_of(path: Any, base: Any = None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        named = os.fsdecode(path)
        if isinstance(base, int) and base >= 0:
            return os.path.join(os.readlink(f"/proc/self/fd/{base}"), named)
        return os.path.abspath(named)

    def happens(what: str, *places: str) -> None:
        nonlocal count
        if any(place.startswith(beginning) for place in places):
            named = " ".join(place.removeprefix(beginning) for place in places)
            note(f"{what} {named}")
            count += 1
            act(count - 1, what)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & _WRITES and not isinstance(arguments[0], int):
            happens(event, place_of(arguments[0]))
        elif event in _TWO_PATHS:
            happens(event, place_of(arguments[0], arguments[2]), place_of(arguments[1], arguments[3]))
        elif event in _ONE_PATH:
            base = _ONE_PATH[event]
            place = arguments[1] if base is None else arguments[0]
            happens(event, place_of(place, None if base is None else arguments[base]))
        elif event == "os.truncate":
            happens(event, place_of(arguments[0]))

    _write_in_halves(happens, place_of, beginning)
    exchanged = folders._exchanged

    def exchange(one: Path, other: Path) -> bool:
        happens("exchange", str(one), str(other))
        return exchanged(one, other)

    folders._exchanged = exchange
    sys.addaudithook(hook)


def _write_in_halves(happens: Callable[..., None], place_of: Callable[[Any], str], beginning: str) -> None:
    """Files that are opened from now on write in two halves, with an event before each."""

    class Raw(io.FileIO):
        place = ""

        def write(self, content: Any) -> int:
            content = bytes(content)
            middle = len(content) // 2
            happens("write", self.place)
            written = super().write(content[:middle]) if middle else 0
            happens("write", self.place)
            return written + super().write(content[middle:])

    opened = io.open

    def opening(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not place_of(file).startswith(beginning):
            return opened(file, mode, buffering, *rest, **named)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd=named.pop("closefd", True))
        raw.place = place_of(file)
        if buffering == 0:
            return raw
        binary: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *rest, **named)

    builtins.open = io.open = opening  # type: ignore[assignment]
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    pwrite = os.pwrite

    def pwriting(descriptor: int, content: bytes, offset: int) -> int:
        happens("pwrite", place_of(descriptor))
        return pwrite(descriptor, content, offset)

    os.pwrite = pwriting


FAULTS = {
    "full disk": (errno.ENOSPC, True),
    "no space once": (errno.ENOSPC, False),
    "I/O error": (errno.EIO, False),
}
"""Name -> error number, and whether it stays."""
