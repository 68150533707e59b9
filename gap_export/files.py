"""Files and folders: written whole or not at all, linked where that is possible, hashed, never overwritten by mistake."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gap_export.errors import BundleError, GapExportError


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
    except OSError as error:
        raise kind(f"{what}: {error.strerror}", subject=str(path), hint=hint) from error


@contextmanager
def scratch_folder(*, beside: Path, purpose: str) -> Iterator[Path]:
    """A hidden folder on the same file system as `beside` (so that files can be linked and renamed), removed afterwards.

    Those of processes that were killed are removed by the next one with the same purpose.

    Raises:
        BundleError: the parent cannot be written to.
    """
    beside = beside.absolute()
    prefix = f".{beside.name}.{purpose}-"
    with writing(beside, what="cannot be created", hint="choose a folder you can write to"):
        beside.parent.mkdir(parents=True, exist_ok=True)
        for leftover in beside.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=beside.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path, *, kept: Sequence[str] = ()) -> Iterator[Path]:
    """Give a scratch folder; put it in place of `target` on success, remove it on any failure.

    An existing `target` is replaced by rename, so that it is never seen half-written, and is put back when that fails.

    Args:
        target: the folder.
        kept: names of folders in an existing `target` that the new one takes over.

    Raises:
        BundleError: the parent cannot be written to.
    """
    target = target.absolute()
    with scratch_folder(beside=target, purpose="building") as scratch:
        fresh, retired = scratch / "fresh", scratch / "retired"
        fresh.mkdir()
        yield fresh
        if not target.exists():
            os.rename(fresh, target)
            return
        for name in kept:
            if (target / name).is_dir():
                with writing(target):
                    shutil.copytree(target / name, fresh / name)
        os.rename(target, retired)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(retired, target)
            raise


def check_folder(folder: Path, *, mark: str, holds: str) -> bool:
    """Refuse an output folder in which something else lies: nothing of others' is ever overwritten.

    Args:
        folder: to be written.
        mark: name of the file by which folders of that kind are told.
        holds: the kind, in a word.

    Returns:
        Whether a folder of that kind is there already.

    Raises:
        BundleError: a file is there, or a folder with something else in it.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError("is a file", subject=str(folder), hint="choose another output folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / mark).is_file():
        raise BundleError(
            f"is not empty and holds no {holds}", subject=str(folder), hint="choose another output folder"
        )
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that readers see the old content or the new, never a part.

    Raises:
        BundleError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.writing")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(scratch, path)


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
        try:
            os.link(source, target)
            return 0
        except (
            OSError
        ):  # another file system, or one without links: a copy costs space and changes nothing else
            pass
    with writing(target):
        shutil.copyfile(source, target)
    return target.stat().st_size
