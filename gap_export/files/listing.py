"""The listing in a folder of results: what the folder is, and every file that was written there, with its hash.

    files.json    {"kind": "sweep", "schema_version": 1, "files": {"sweep.json": ["9f86d0..."], ...}}

A file is listed before it is written, beside what lies there until then: so at any instant what we wrote is listed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gap_export.errors import BundleError
from gap_export.files.file import is_plain, sha256_of, write_atomically, writing
from gap_export.files.hidden import HALF_WRITTEN
from gap_export.files.kinds import FileKind
from gap_export.files.ownership import FolderKind, Listed
from gap_export.files.read import is_file, read_bytes

FILES = "files.json"
_LISTING = FileKind(
    "a listing of results",
    64 * 2**20,
    BundleError,
    "nothing tells what was written there: move away what is yours and delete this file, or choose another output folder",
)


class _Listing(BaseModel):
    """What a folder is, and what was written in it.

    Attributes:
        kind: of folder.
        schema_version: of this file.
        files: path in the folder, with `/` -> SHA-256 of what was written there, in hex; of what lay there before, too, in case that
            the write did not come to its end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    schema_version: Literal[1] = 1
    files: dict[str, tuple[str, ...]]


def results_kind(
    name: str, mark: str, fields: frozenset[str], names: str, *, unlisted: str = r"(?!)"
) -> FolderKind:
    """A kind of folder that has a listing; see `FolderKind`, whose patterns are given as text here."""

    def told(folder: Path) -> bool:
        with suppress(BundleError):  # somebody else's file of that name
            listing = _read(folder)
            return listing is not None and listing.kind == name
        return False

    def listed(folder: Path, _: dict[str, Any]) -> Mapping[str, Listed] | None:
        listing = _read(folder)
        if listing is None:
            return None
        if listing.kind != name:
            raise BundleError(
                f"holds a {listing.kind}", subject=str(folder), hint="choose another output folder"
            )
        return {
            FILES: Listed(frozenset()),
            **{path: Listed(frozenset(hashes)) for path, hashes in listing.files.items()},
        }

    return FolderKind(
        name, mark, fields, re.compile(rf"files\.json|{names}"), re.compile(unlisted), listed, told
    )


class ListedFolder:
    """An opened folder of results.

    Args:
        path: of the folder, which holds nothing of others under the names that are written (`check_folder`).
        kind: of folder, where its listing does not say so.
    """

    def __init__(self, path: Path, kind: FolderKind) -> None:
        self.path = path
        listing = _read(path)
        self._kind = kind.name if listing is None else listing.kind
        self._files = _present(path, kind) if listing is None else dict(listing.files)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all.

        Args:
            name: path in the folder, with `/`.
            content: text is written as UTF-8.

        Raises:
            BundleError: it cannot be written, or what lies there is not what was written.
        """
        content = content if isinstance(content, bytes) else content.encode()
        path, wanted = self.path / name, hashlib.sha256(content).hexdigest()
        with writing(path):
            there = sha256_of(path) if is_plain(path) else None
        if there is not None and there not in self._files.get(name, ()):
            raise _changed(path)
        self._files[name] = (wanted,) if there in (None, wanted) else (there, wanted)
        self.write_listing()
        write_atomically(path, content)

    def remove(self, name: str) -> None:
        """Remove a file that was written here; none is there where there was none.

        Args:
            name: path in the folder, with `/`.

        Raises:
            BundleError: it cannot be removed, or what lies there is not what was written.
        """
        path = self.path / name
        with writing(path):
            if os.path.lexists(path):
                if not is_plain(path) or sha256_of(path) not in self._files.get(name, ()):
                    raise _changed(path)
                path.unlink()
        if self._files.pop(name, None) is not None:
            self.write_listing()

    def write_listing(self) -> None:
        """List what lies there, in a folder of an older version that listed nothing.

        Raises:
            BundleError: it cannot be written.
        """
        listing = _Listing(kind=self._kind, files=dict(sorted(self._files.items())))
        write_atomically(self.path / FILES, listing.model_dump_json(indent=1) + "\n")


def _changed(path: Path) -> BundleError:
    return BundleError(
        "was changed since it was written",
        subject=str(path),
        hint="move it away and run the same command again",
    )


def _present(folder: Path, kind: FolderKind) -> dict[str, tuple[str, ...]]:
    """What lies in a folder of an older version, which listed nothing, under names that are written."""
    return {
        name: (sha256_of(path),)
        for path in folder.rglob("*")
        if kind.names.fullmatch(name := path.relative_to(folder).as_posix())
        and not kind.unlisted.fullmatch(name)
        and not HALF_WRITTEN.fullmatch(name)
        and is_plain(path)
    }


def _read(folder: Path) -> _Listing | None:
    """The listing in a folder; None where there is none that gap-export wrote.

    Raises:
        BundleError: it is damaged, or of another version.
    """
    path = folder / FILES
    if not is_file(path):
        return None
    content = read_bytes(path, _LISTING)
    try:
        return _Listing.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(
            "is damaged, or of another version", subject=str(path), hint=_LISTING.hint
        ) from error
