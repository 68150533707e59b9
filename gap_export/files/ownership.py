"""Whose a folder is: ours where a file in it says so by its content, and of such a folder only what we wrote, as we wrote it.

A name proves nothing: web applications have a `manifest.json`, and editors a `settings.json`. A bundle's manifest lists its files with their
hashes; folders of results have a listing beside them (`listing.py`). What is not listed, or is not what is listed, is somebody's work.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import BundleError
from gap_export.files.file import check_place, is_plain, sha256_of, writing
from gap_export.files.folder import check_no_mount, recover
from gap_export.files.hidden import HALF_WRITTEN, visible
from gap_export.files.read import is_file

_MOST_NAMED = 10
_LARGEST_MARK = 64 * 2**20
"""Bytes of a file by which a folder may be told; larger ones are not ours."""
HASHED = 64 * 2**20
"""Bytes up to which a file is held against its hash whenever it is looked at; of larger ones, the size is."""


@dataclass(frozen=True)
class Listed:
    """What a record says of a file.

    Attributes:
        hashes: SHA-256 of what was written, in hex; two where a write may have been cut short. Any content is ours where none is named.
        bytes: of the file; None where the record does not say.
    """

    hashes: frozenset[str]
    bytes: int | None = None

    def is_in(self, path: Path) -> bool:
        """Whether the file is as it was written."""
        if not self.hashes:
            return True
        if self.bytes is not None:
            size = path.stat().st_size
            if size != self.bytes or size > HASHED:
                return size == self.bytes
        return sha256_of(path) in self.hashes


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that commands write.

    Attributes:
        name: in a word, for messages.
        mark: name of the JSON file by which such folders are told.
        fields: that the file has, of whatever version.
        names: paths in the folder, with `/`, that commands write.
        unlisted: those of them that have no hash: what grows, and what is taken over when the folder is replaced.
        listed: folder, content of its mark -> path -> what is listed of it; None in folders of older versions, where the name decides.
        told: whether a folder is one by another file than its mark.
    """

    name: str
    mark: str
    fields: frozenset[str]
    names: re.Pattern[str]
    unlisted: re.Pattern[str]
    listed: Callable[[Path, dict[str, Any]], Mapping[str, Listed] | None]
    told: Callable[[Path], bool] = lambda _: False


def check_folder(
    folder: Path, kind: FolderKind, *, replaced: bool = True, outside: Sequence[FolderKind] = ()
) -> bool:
    """Refuse an output folder that cannot be written, or in which something of somebody else's would be lost.

    What killed processes left of it is put right first.

    Args:
        folder: to be written.
        kind: that is to be written.
        replaced: whether what is there is to be replaced as a whole; else only files that commands write are looked at.
        outside: kinds of folders in which it must not lie.

    Returns:
        Whether a folder of that kind is there already.

    Raises:
        BundleError: a file is there, a folder of something else, files in it that were not written by commands or were changed since, or
            nothing can be written there.
    """
    with writing(folder, what="cannot be used", hint="choose another output folder"):
        recover(folder)
        if os.path.lexists(folder) and not folder.is_dir() and not _leads_nowhere(folder):
            raise BundleError("is a file", subject=str(folder), hint="choose another output folder")
        place = folder.resolve()
        check_place(place, folder)
        _check_outside(place, folder, outside)
        if replaced:
            check_no_mount(place)
        if not folder.is_dir() or not visible(folder):
            return False
        content = _mark_of(folder, kind)
        if content is None and not kind.told(folder):
            unreadable = is_file(folder / kind.mark)
            raise BundleError(
                f"is not empty and holds no {kind.name}"
                + (f": its {kind.mark} is damaged, or is not one of a {kind.name}" if unreadable else ""),
                subject=str(folder),
                hint="choose another output folder, or empty this one yourself",
            )
        listed = kind.listed(folder, content or {})
        foreign, changed = _others(folder, kind, listed, everything=replaced)
    hint = "move them away, or choose another output folder: nothing of yours is replaced"
    if foreign:
        raise BundleError(
            f"holds what no command wrote beside its {kind.name}: {_named(foreign)}",
            subject=str(folder),
            hint=hint,
        )
    if changed:
        raise BundleError(
            f"holds files that were changed since they were written: {_named(changed)}",
            subject=str(folder),
            hint=hint,
        )
    return True


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _check_outside(place: Path, folder: Path, outside: Sequence[FolderKind]) -> None:
    for kind, parent in itertools.product(outside, place.parents):
        if is_file(parent / kind.mark) and _mark_of(parent, kind) is not None:
            raise BundleError(
                f"lies in the {kind.name} {parent}, which holds its own files alone",
                subject=str(folder),
                hint=f"choose a folder beside it, such as {parent}.runs",
            )


def _mark_of(folder: Path, kind: FolderKind) -> dict[str, Any] | None:
    """Content of the file that makes a folder one of that kind; None where it does not."""
    path = folder / kind.mark
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_MARK:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and kind.fields <= content.keys() else None


def _others(
    folder: Path, kind: FolderKind, listed: Mapping[str, Listed] | None, *, everything: bool
) -> tuple[list[str], list[str]]:
    """Paths in a folder that are somebody else's, and paths that somebody changed; only so many that it is clear."""
    foreign: list[str] = []
    changed: list[str] = []
    for path in _paths(folder):
        if max(len(foreign), len(changed)) > _MOST_NAMED:
            break
        there = folder / path
        named = kind.names.fullmatch(path) is not None
        if path.endswith("/"):
            ours = not everything or named or kind.unlisted.match(path) is not None
        elif not everything and not named:
            continue
        elif kind.unlisted.fullmatch(path):
            ours = is_plain(there) or (everything and there.is_symlink())  # what it leads to is not touched
        elif not is_plain(there):
            ours = False
        elif HALF_WRITTEN.fullmatch(path) or (path == kind.mark and (listed is None or path not in listed)):
            ours = True
        elif listed is None:
            ours = named
        else:
            ours = path in listed
            if ours and not listed[path].is_in(there):
                changed.append(path)
        if not ours:
            foreign.append(path)
    return foreign, changed


def _paths(folder: Path) -> Iterator[str]:
    """Of all files in a folder, with `/`; of empty folders too, with one at the end."""
    for place, folders, files in os.walk(folder, onerror=_raised):
        within = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]  # not walked into
        for name in sorted([*files, *links]):
            yield (within / name).as_posix()
        if not folders and not files and place != str(folder):
            yield f"{within.as_posix()}/"


def _raised(error: OSError) -> None:
    raise error


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_MOST_NAMED]) + (", ..." if len(paths) > _MOST_NAMED else "")
