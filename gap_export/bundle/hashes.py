"""Size and hash of every file of a bundle, and whether they are still right."""

from __future__ import annotations

from pathlib import Path

from gap_export.errors import BundleError
from gap_export.files import HASHED, sha256_of
from gap_export.records import Record

HASHED_ON_OPEN = HASHED
"""Files up to this many bytes are hashed whenever a bundle is opened; larger ones have their size checked, and their
hash only by `validate` and `inspect --verify`, so that opening a 13 GB bundle takes no seconds."""


class FileRecord(Record):
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def verify(folder: Path, files: dict[str, FileRecord], *, every_hash: bool) -> None:
    """Compare a folder with its records.

    Args:
        folder: where the files lie.
        files: path relative to the folder -> record.
        every_hash: hash large files too.

    Raises:
        BundleError: the first file that is missing or differs.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(
                "is listed in the manifest but missing", subject=str(path), hint="build the bundle again"
            )
        size = path.stat().st_size
        if size != expected.bytes:
            raise BundleError(
                f"has {size} bytes where the manifest says {expected.bytes}",
                subject=str(path),
                hint="the file was changed or cut short: move it away, and build the bundle again",
            )
        if (every_hash or size <= HASHED_ON_OPEN) and sha256_of(path) != expected.sha256:
            raise BundleError(
                "does not have the hash that the manifest lists",
                subject=str(path),
                hint="the file was changed after the build: move it away, and build the bundle again",
            )
