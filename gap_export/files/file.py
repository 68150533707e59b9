"""One file: hashed, written whole or not at all, linked into a bundle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gap_export.errors import BundleError, GapExportError
from gap_export.files.hidden import WRITING, abandoned, hidden_path


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable_size(count: int) -> str:
    """Bytes in the largest unit of which there is one, for people: `1.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


@contextmanager
def writing(
    path: Path,
    *,
    what: str = "cannot be written",
    hint: str = "free disk space, or choose a folder you can write to",
    kind: type[GapExportError] = BundleError,
) -> Iterator[None]:
    """Say of a file or folder that it cannot be written, in place of an `OSError`.

    Args:
        path: what is written inside the block.
        what: went wrong, as a message; the system's own reason is added.
        hint: what to do next.
        kind: the error to raise.

    Raises:
        GapExportError: of that kind.
    """
    try:
        yield
    # A ValueError where a path holds a null byte, a RuntimeError where pathlib follows a link that leads to itself.
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Symlink loop" not in str(error):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise kind(f"{what}: {reason}", subject=str(path), hint=hint) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that readers see the old content or the new, never a part.

    What is written first has an unguessable name and is made anew, so that no link that was put there is followed. What killed processes
    left of the same file is removed.

    Raises:
        BundleError: it cannot be written, or something else than a file has its name.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path)
        for leftover in abandoned(path):
            with contextlib.suppress(OSError):
                if is_plain(leftover):
                    leftover.unlink()
        scratch = hidden_path(path, WRITING)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def is_plain(path: Path) -> bool:
    """Whether a regular file is there, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def check_output_file(
    path: Path,
    *,
    inputs: Iterable[Path] = (),
    closed: Iterable[Path] = (),
    ours: Callable[[Path], bool] | None = None,
    holds: str = "",
) -> None:
    """Refuse an output file before the work that is to fill it.

    Args:
        path: to be written.
        inputs: files that the work reads, which must stay; a folder stands for everything in it.
        closed: folders of bundles and results that the work reads, in which nothing else is put: they could not be replaced over it.
        ours: whether a file that is there may be replaced; None where any may.
        holds: what such a file holds, for the message.

    Raises:
        BundleError: it is an input, or no file, something else lies in it, or it cannot be written there.
    """
    with writing(path):
        check_replaceable(path)
        place = path.resolve()
        own = ours is not None and path.exists() and ours(path)
        for given in inputs:
            there = given.resolve()
            inside = place.exists() and there.is_dir() and place.is_relative_to(there)
            if place == there or (inside and not own):
                raise BundleError(
                    "is read by this command, and would be lost",
                    subject=str(path),
                    hint="write to another file",
                )
        if not own and any(place.is_relative_to(folder.resolve()) for folder in closed):
            raise BundleError(
                "lies in a folder that is read by this command",
                subject=str(path),
                hint="write to a file elsewhere",
            )
        if ours is not None and path.exists() and not own:
            raise BundleError(
                f"is there and holds no {holds}",
                subject=str(path),
                hint="write to another file, or move this one away",
            )
        check_place(place.parent, path)


def check_place(folder: Path, subject: Path) -> None:
    """Refuse a folder in which nothing can be made: no permission, a read-only or full disk, a path below a file.

    Args:
        folder: which need not exist; then the nearest above it that does.
        subject: that is to be made there, for the message.

    Raises:
        BundleError: no permission, a disk that is full or read-only, or a file in the way.
        OSError: it cannot be looked at.
    """
    parent = next(each for each in (folder, *folder.parents) if each.exists())
    if not parent.is_dir():
        raise BundleError(
            f"cannot be written: {parent} is no folder", subject=str(subject), hint="choose another place"
        )
    disk = os.statvfs(parent)
    if disk.f_flag & os.ST_RDONLY:
        why = f"{parent} is on a read-only disk"
    elif not os.access(parent, os.W_OK | os.X_OK):
        why = f"no permission to write into {parent}"
    elif (disk.f_blocks and not disk.f_bfree) or (disk.f_files and not disk.f_ffree):
        why = f"no space left on the disk of {parent}"
    else:
        return
    raise BundleError(
        f"cannot be written: {why}",
        subject=str(subject),
        hint="free disk space, or choose a folder you can write to",
    )


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of something that is none: a folder, a device, a pipe.

    Raises:
        BundleError: such a thing is there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # nothing, or a link to nothing, which is replaced
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise BundleError(f"is {what}", subject=str(path), hint="give the name of a file to write")


def place_file(source: Path, target: Path, *, copy: bool) -> int:
    """Put a file into a bundle: a hard link where the file system allows it, else a copy.

    ONNX Runtime and TensorRT refuse external data behind `..`, absolute paths and symbolic links, and accept hard links.

    Returns:
        Bytes newly written (0 for a link).

    Raises:
        BundleError: the copy cannot be written.
    """
    source = source.resolve()
    if not copy:
        # Another file system, or one without links: a copy costs space and changes nothing else.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return 0
    with writing(target):
        shutil.copyfile(source, target)
    return target.stat().st_size
