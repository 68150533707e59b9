"""Folders that appear complete or not at all, and the hidden ones beside them in which they are made.

A hidden folder has an unguessable name, and says in a record whose it is. Those of processes that died are found again by that
record, never by their name: what a killed rebuild had moved aside is put back, the rest is removed.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gap_export.files.file import writing

_OWNER, _WORK = "owner.json", "work"
_FRESH, _RETIRED = "fresh", "retired"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
"""What a kernel or a file system says that cannot exchange."""


class _Owner(BaseModel):
    """Who made a hidden folder.

    Attributes:
        target: absolute path of what it is made for.
        host: name of the machine.
        boot: of the machine; None where it has none.
        pid: of the process.
        began: when the process did, in ticks since the boot; None where that cannot be told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    host: str
    boot: str | None
    pid: int = Field(gt=0)
    began: int | None

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended; of another machine's nothing is known."""
        if self.host != platform.node():
            return False
        if self.boot != _boot():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return self.began is not None and self.began != _began(self.pid)


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
        beside = beside.absolute()
        beside.parent.mkdir(parents=True, exist_ok=True)
        _clear(beside)
        scratch = Path(tempfile.mkdtemp(prefix=f".{beside.name[:100]}.{purpose}-", dir=beside.parent))
        pid = os.getpid()
        owner = _Owner(
            target=_written(beside),
            host=platform.node(),
            boot=_boot(),
            pid=pid,
            began=_began(pid),
        )
        (scratch / _OWNER).write_text(owner.model_dump_json(), encoding="utf-8")
        (scratch / _WORK).mkdir()
    try:
        yield scratch / _WORK
    finally:
        _remove(scratch)


@contextmanager
def atomic_folder(
    target: Path, *, kept: Sequence[str] = (), check: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Give a hidden folder; put it in place of `target` on success, remove it on any failure.

    An existing `target` is exchanged in one step, where the system can do that; else it is moved aside, and put back when something
    fails. At no instant is there half a folder.

    Args:
        target: the folder; through a link, what that leads to.
        kept: names of folders in an existing `target` that the new one takes over.
        check: called before `target` is replaced; raises where it must not be.

    Raises:
        BundleError: the parent cannot be written to, or `target` cannot be replaced.
    """
    with writing(target):
        target = target.resolve()
    with scratch_folder(beside=target, purpose="building") as scratch:
        fresh, retired = scratch / _FRESH, scratch / _RETIRED
        fresh.mkdir()
        yield fresh
        with writing(target, what="cannot be put into its place"):
            if not target.exists():
                os.rename(fresh, target)
                return
            check()
            if not any(target.iterdir()):
                _fill(target, fresh)
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


def _fill(target: Path, fresh: Path) -> None:
    """Move everything into an empty folder, which stays: it may be a mount point, or where somebody works."""
    moved: list[Path] = []
    try:
        for path in sorted(
            fresh.iterdir(), key=lambda path: path.suffix == ".json"
        ):  # records of what is there last
            os.rename(path, target / path.name)
            moved.append(target / path.name)
    except BaseException:
        for path in moved:
            os.rename(path, fresh / path.name)
        raise


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


def _clear(beside: Path) -> None:
    """Remove the hidden folders that dead processes left for the same target; what one had moved aside is put back first."""
    for leftover in beside.parent.glob(f".{glob.escape(beside.name[:100])}.*"):
        owner = _owner_of(leftover)
        if owner is None or owner.target != _written(beside) or not owner.is_dead:
            continue
        retired = leftover / _WORK / _RETIRED
        if retired.is_dir() and not beside.exists():
            os.rename(retired, beside)
        _remove(leftover)


def _written(path: Path) -> str:
    """A path as a record holds it, in whatever encoding it is."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _owner_of(folder: Path) -> _Owner | None:
    """Who made a hidden folder; None where it does not say, or says it of a file behind a link."""
    path = folder / _OWNER
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    with suppress(OSError, ValidationError):
        return _Owner.model_validate_json(path.read_bytes())
    return None


def _remove(scratch: Path) -> None:
    """Remove a hidden folder, its record last: a removal that is cut short is taken up again."""
    shutil.rmtree(scratch / _WORK, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)


def _boot() -> str | None:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot."""
    with suppress(OSError, ValueError, IndexError):
        # (The name in parentheses may hold blanks and parentheses.)
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None
