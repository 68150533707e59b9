"""A folder of traced graphs that all processes of a user share, bounded in bytes.

An entry is a checksum and bytes; what these mean is told in `trace_cache.py`. Whatever happens to a folder (killed writers, full
disks, other processes that write, remove and damage), a read gives what was written under that key, or nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "GAP_EXPORT_TRACE_CACHE"
"""Environment variable: a folder, or `off`."""

LIMIT_BYTES = 256 * 2**20
"""What all entries may take together."""

_MAGIC = b"gap-export trace 1\n"
_ENTRY, _SCRATCH = ".trace", ".writing"
_ABANDONED_SECONDS = 3600


class TraceFolder:
    """Entries appear whole and vanish whole.

    Args:
        path: of the folder; made when there is something to keep.
        limit: bytes that all entries may take together; those not asked for longest go first.
    """

    def __init__(self, path: Path, limit: int = LIMIT_BYTES) -> None:
        self.path = path
        self._limit = limit

    def read(self, key: str) -> bytes | None:
        """What is kept under a key; None where nothing is, or something damaged."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        payload = content[len(_MAGIC) + hashlib.sha256().digest_size :]
        if content != _MAGIC + _checksum(key, payload) + payload:
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return payload

    def write(self, key: str, payload: bytes) -> None:
        """Keep something.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        content = _MAGIC + _checksum(key, payload) + payload
        if len(content) > self._limit:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(suffix=_SCRATCH, prefix=".", dir=self.path)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(scratch, self._file(key))
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        self._make_room()

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{_ENTRY}"

    def _make_room(self) -> None:
        """Remove what was not asked for longest, and what killed processes left. Others may be at it, too."""
        entries = []
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == _ENTRY:
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == _SCRATCH and status.st_mtime < time.time() - _ABANDONED_SECONDS:
                    path.unlink()
        excess = sum(size for _, size, _ in entries) - self._limit
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def user_folder() -> TraceFolder | None:
    """The folder of this user.

    Returns:
        In the folder that `GAP_EXPORT_TRACE_CACHE` names, or else in `gap-export/traces` of the user's cache folder
        (`XDG_CACHE_HOME`, or `~/.cache`); None where the variable says `off`, or there is no such folder.
    """
    given = os.environ.get(VARIABLE)
    if given == "off":
        return None
    try:
        if given:
            return TraceFolder(Path(given).expanduser().absolute())
        configured = os.environ.get("XDG_CACHE_HOME", "")
        caches = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return TraceFolder(caches / "gap-export" / "traces")


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()
