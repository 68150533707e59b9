"""Folders that appear complete or not at all, and the hidden ones beside them in which they are made.

What a killed process left is put right at the next start: a folder that was moved aside comes back, one that was being filled is filled,
and the rest is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.files.file import writing
from gap_export.files.hidden import abandoned, hidden_path, visible

_FRESH, _RETIRED, _FILLING = "fresh", "retired", "filling"
_TELLS = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
"""What a kernel or a file system says that cannot exchange."""


@contextmanager
def scratch_folder(*, beside: Path, purpose: str) -> Iterator[Path]:
    """A hidden folder on the same file system as `beside` (so that files can be linked and renamed), removed afterwards.

    Args:
        beside: what it is made for.
        purpose: for its name, in a word.

    Raises:
        BundleError: the parent cannot be written to.
    """
    with writing(beside, what="cannot be created", hint="choose a folder you can write to"):
        beside = beside.resolve()
        beside.parent.mkdir(parents=True, exist_ok=True)
        recover(beside)
        scratch = hidden_path(beside, purpose)
        scratch.mkdir(mode=0o700)
    try:
        yield scratch
    finally:
        _clear(scratch, beside)


@contextmanager
def atomic_folder(
    target: Path, *, kept: Sequence[str] = (), check: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Give a hidden folder; put it in place of `target` on success, remove it on any failure.

    An existing `target` is exchanged in one step, where the system can do that; else it is moved aside, and put back when something
    fails. At no instant is there half a folder that the next start (`recover`) would not make whole.

    Args:
        target: the folder; through a link, what that leads to.
        kept: names of folders in an existing `target` that the new one takes over.
        check: called before `target` is replaced; raises where it must not be.

    Raises:
        BundleError: the parent cannot be written to, or `target` cannot be replaced.
    """
    with writing(target):
        target = target.resolve()
        check_no_mount(target)
    with scratch_folder(beside=target, purpose="building") as scratch:
        fresh, retired = scratch / _FRESH, scratch / _RETIRED
        with writing(target, what="cannot be created"):
            fresh.mkdir()
        yield fresh
        with writing(target, what="cannot be put into its place"):
            if not target.exists():
                os.rename(fresh, target)
                return
            check()
            if not visible(target):
                _fill(target, fresh, scratch / _FILLING)
                return
            for name in kept:
                if (target / name).is_dir():
                    shutil.copytree(target / name, fresh / name, symlinks=True)
            if _exchanged(fresh, target):
                return
            os.rename(target, retired)
            try:
                os.rename(fresh, target)
            except BaseException:
                os.rename(retired, target)
                raise


def check_no_mount(target: Path) -> None:
    """Refuse a mount point, whose place no other folder can take.

    Raises:
        BundleError: it is one.
    """
    if target.is_mount():
        raise BundleError(
            "is a mount point, which cannot be replaced as a whole",
            subject=str(target),
            hint="choose a folder in it",
        )


def recover(target: Path) -> None:
    """Put right what dead processes left of a folder, at whatever instant they were killed.

    Two processes may be at it at once: each step is done by one of them, and the other finds it done.
    """
    with suppress(OSError, ValueError):
        target = target.resolve()
        for leftover in abandoned(target):
            if leftover.is_dir():
                with suppress(OSError):
                    for path in _in_order(leftover / _FILLING):
                        if not os.path.lexists(target / path.name):
                            os.rename(path, target / path.name)
                _clear(leftover, target)


def _clear(scratch: Path, target: Path) -> None:
    """Remove a hidden folder, unless it holds the only copy of something."""
    fresh, retired, filling = (scratch / name for name in (_FRESH, _RETIRED, _FILLING))
    with suppress(OSError):
        if retired.is_dir() and fresh.is_dir() and not target.exists():
            os.rename(retired, target)
        if (retired.is_dir() and fresh.is_dir()) or (filling.is_dir() and any(filling.iterdir())):
            return
        for _ in range(
            2
        ):  # a removal that fails once is tried again; what is left then, the next start removes
            shutil.rmtree(scratch, ignore_errors=True)


def _fill(target: Path, fresh: Path, filling: Path) -> None:
    """Move everything into an empty folder, which stays: somebody may work in it, or look at it."""
    os.rename(fresh, filling)
    moved: list[Path] = []
    try:
        for path in _in_order(filling):
            os.rename(path, target / path.name)
            moved.append(target / path.name)
    except BaseException:
        for path in moved:
            os.rename(path, filling / path.name)
        os.rename(filling, fresh)
        raise


def _in_order(folder: Path) -> list[Path]:
    """What lies in a folder; last, by what readers tell that it is whole."""
    return sorted(folder.iterdir(), key=lambda path: (path.name == _TELLS, path.name))


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (renameat2); whether that could be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(other))
