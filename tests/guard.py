"""No test writes outside its temporary folders: a hook is told of every file that this process opens to write, makes, renames or removes.

It is told by Python itself (PEP 578), before that happens, and prevents it. It cannot see what other processes do (forked ones inherit it), nor
libraries in C++ that open files themselves, as those of PyTorch and ONNX Runtime do.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Touched = Callable[[tuple[Any, ...]], Iterable[tuple[Any, int]]]
"""From the arguments of an event: each path, and the descriptor of the folder that it is relative to, -1 for the working folder."""

_EVENTS: dict[str, Touched] = {
    "open": lambda given: [(given[0], -1)] if given[2] & _WRITING else [],
    "os.remove": lambda given: [(given[0], given[1])],
    "os.rmdir": lambda given: [(given[0], given[1])],
    "os.mkdir": lambda given: [(given[0], given[2])],
    "os.rename": lambda given: [(given[0], given[2]), (given[1], given[3])],
    "os.link": lambda given: [(given[1], given[3])],
    "os.symlink": lambda given: [(given[1], given[2])],
    "os.truncate": lambda given: [(given[0], -1)],
    "os.chmod": lambda given: [(given[0], given[2])],
    "os.chown": lambda given: [(given[0], given[3])],
    "os.utime": lambda given: [(given[0], given[3])],
    "os.setxattr": lambda given: [(given[0], -1)],
    "os.removexattr": lambda given: [(given[0], -1)],
}
_FOLLOWING = {"open", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"}
"""Events that change what a link leads to, not the link."""


class WrittenOutsideError(AssertionError):
    """A test was about to write where it must not."""


class Guard:
    """Knows where may be written, and notes what was about to be written elsewhere.

    Args:
        folders: where may be written; empty where anything may.
        names: of folders that may be written wherever they lie.
    """

    def __init__(self, folders: Iterable[Path] = (), names: Iterable[str] = ("__pycache__",)) -> None:
        self._folders = _real(folders)
        self._names = tuple(f"/{name}/" for name in names)
        self.outside: list[str] = []

    def install(self) -> None:
        """Be told of events from now on, until the process ends."""
        sys.addaudithook(self)

    def allow(self, folders: Iterable[Path]) -> None:
        """Replace the folders that may be written."""
        self._folders = _real(folders)

    @contextmanager
    def within(self, *folders: Path) -> Iterator[None]:
        """Allow these alone for a while."""
        before, self._folders = self._folders, _real(folders)
        try:
            yield
        finally:
            self._folders = before

    def check(self) -> None:
        """Say what was about to be written outside since the last time.

        Raises:
            AssertionError: something was, also where the code that did it took the error for one of its own.
        """
        found, self.outside = self.outside, []
        assert not found, f"written outside of the folders of this run: {', '.join(found)}"

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        """Take an event of Python's.

        Raises:
            WrittenOutsideError: it is about a path outside.
        """
        touched = _EVENTS.get(event)
        if touched is None or not self._folders:
            return
        for path, folder in touched(given):
            place = _place(path, folder, follow=event in _FOLLOWING)
            if place is not None and not self._may(place, event):
                self.outside.append(f"{event} {place}")
                raise WrittenOutsideError(f"{event} {place}: outside of what tests may write")

    def _may(self, place: str, event: str) -> bool:
        if f"{place}/".startswith(self._folders) or any(name in place for name in self._names):
            return True
        try:
            mode = os.lstat(place).st_mode
        except OSError:
            return False
        if event == "os.mkdir":
            return stat.S_ISDIR(mode)  # it is there: nothing is made
        return event == "open" and not stat.S_ISREG(mode)  # terminals, devices, pipes


def _real(folders: Iterable[Path]) -> tuple[str, ...]:
    return tuple(os.path.realpath(folder) + "/" for folder in folders)


def _place(path: Any, folder: Any, *, follow: bool) -> str | None:
    """Absolute path without links on its way; None for descriptors, and for what cannot be a path."""
    if isinstance(path, int):
        return None
    try:
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        if follow:
            return os.path.realpath(name)
        parent, last = os.path.split(name.rstrip("/") or "/")
        return os.path.join(os.path.realpath(parent or "."), last)
    except (OSError, ValueError, TypeError):
        return None


GUARD = Guard()
"""That of this process, installed in `conftest.py`."""
