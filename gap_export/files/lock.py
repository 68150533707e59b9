"""One process at a time in an output folder.

The lock is the kernel's (flock), so it ends with the process however that ends; what the file says is for the message alone. It lies beside
the folder, which may be exchanged while it is held, and is removed at the end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.files.file import writing
from gap_export.files.hidden import shortened

_LONGEST_TEXT = 500
_SAID = re.compile(r"process [0-9]+ on (?P<machine>.*) since [0-9: +-]+\n", re.DOTALL)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class FolderLock:
    """Held from construction until `release`, or until the process or the object ends.

    Args:
        folder: to be written; need not exist.

    Raises:
        BundleError: another process, or another object, holds it; or it cannot be taken at all.
    """

    def __init__(self, folder: Path) -> None:
        with writing(folder, what="cannot be created", hint="choose a folder you can write to"):
            folder = folder.resolve()
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.path = folder.with_name(f".{shortened(folder.name)}.lock")
            descriptor = _locked(self.path, folder)
            try:
                _check_left(descriptor, self.path, folder)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            with self.kept():
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"process {os.getpid()} on {platform.node()} since {_now()}\n".encode(), 0
                )

    def release(self) -> None:
        """Let others in; releasing again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                self.path.unlink(
                    missing_ok=True
                )  # while it is held: who waits looks whether it is still there
            finally:
                os.close(descriptor)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Release it if the block fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()


def _locked(path: Path, folder: Path) -> int:
    """Descriptor of the lock file, locked.

    Raises:
        BundleError: another holds it, or the file system has no locks and somebody's file is there.
        OSError: it cannot be opened.
    """
    while True:
        made, descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if not held and error.errno in _NO_LOCKS and made:
                return descriptor  # not there before: that it is there now is the lock
            said = os.pread(descriptor, _LONGEST_TEXT, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if not held and error.errno not in _NO_LOCKS:
                raise
            raise BundleError(
                f"is being written by {said or 'another process'}",
                subject=str(folder),
                hint="wait until it has finished, or choose another output folder"
                if held
                else f"if that has ended, delete {path}: this file system cannot tell",
            ) from error
        if _is_there(path, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has just removed it: take the new one


def _check_left(descriptor: int, path: Path, folder: Path) -> None:
    """Refuse a file that is locked now and that no process of this machine left: it holds something else, or is held elsewhere.

    Raises:
        BundleError: the file is not empty and holds no line of a lock, or one of another machine.
    """
    content = os.pread(descriptor, _LONGEST_TEXT, 0)
    said = _SAID.fullmatch(content.decode("utf-8", "replace"))
    if said is None and content:
        raise BundleError(
            "is there and is no lock of gap-export",
            subject=str(path),
            hint="move it away, or choose another output folder",
        )
    if said is not None and said["machine"] != platform.node():
        raise BundleError(
            f"is being written by {content.decode().strip()}, or was until that ended",
            subject=str(folder),
            hint=f"if it has ended, delete {path}: from this machine that cannot be told",
        )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _opened(path: Path) -> tuple[bool, int]:
    """Whether the file was made now, and its descriptor; a link is not followed."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return True, os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False, os.open(path, flags | os.O_CREAT, 0o666)


def _is_there(path: Path, descriptor: int) -> bool:
    mine = os.fstat(descriptor)
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
