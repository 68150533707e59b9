"""Images below a folder, found by as much of a name as there is: annotations name them from a root that is seldom the folder given.

A name is `coco/train2014/1.jpg`; the folder given may be the one above `coco`, `train2014` itself, or one far above both. The file is the
one whose path has the longest end in common with the name, where either of them ends: `a/1.jpg` is not `b/1.jpg`. Two files that are as
good, or two names that lead to one file, are refused: one image would be taken for another.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from gap_export.errors import InputError
from gap_export.files import is_file

MOST_FILES = 2_000_000
"""Files of a folder that are looked through for a name; more are those of a whole disk."""

_Parts = tuple[str, ...]


class FolderIndex:
    """Files below a folder, by name.

    Args:
        folder: of images. It is looked through once, when an image is not where its name says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path | None] = {}
        self._named: dict[Path, str] = {}
        self._by_last: dict[str, list[_Parts]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a worker: no list of files."""
        return {"_folder": self._folder, "_found": {}, "_named": {}, "_by_last": None}

    def find(self, name: str) -> Path | None:
        """The file of an image; None where there is none. It lies in the folder, whatever the name says.

        Raises:
            InputError: two files are as good, or the file is that of another name.
        """
        if name not in self._found:
            path = self._look_for(name)
            if path is not None:
                self._check_named_once(path, name)
            self._found[name] = path
        return self._found[name]

    def _look_for(self, name: str) -> Path | None:
        parts = _parts_of(name)
        if not parts:
            return None
        if is_file(self._folder.joinpath(*parts)):
            return self._folder.joinpath(*parts)
        best: list[_Parts] = []
        ends = [
            parts[start:] for start in range(1, len(parts))
        ]  # may have come since files were looked through
        for there in self._files().get(parts[-1], ends):
            shared = _shared_end(there, parts)
            if shared < min(len(there), len(parts)) or not is_file(self._folder.joinpath(*there)):
                continue  # they lie in different folders
            if not best or shared > _shared_end(best[0], parts):
                best = [there]
            elif shared == _shared_end(best[0], parts):
                best.append(there)
        if len(best) > 1:
            one, other = (str(self._folder.joinpath(*each)) for each in best[:2])
            raise InputError(
                f"may be {one} or {other}",
                subject=f"image {name}",
                hint="give the folder that holds only one of them (--images), or annotations that name its folder too",
            )
        return self._folder.joinpath(*best[0]) if best else None

    def _check_named_once(self, path: Path, name: str) -> None:
        """Refuse that two images of the data set are one file; `a/1.jpg` and `1.jpg` may well be one image.

        Raises:
            InputError: they are.
        """
        before = self._named.setdefault(path, name)
        one, other = _parts_of(before), _parts_of(name)
        if _shared_end(one, other) < min(len(one), len(other)):
            raise InputError(
                f"and {name} are different images, and both would be {path}",
                subject=f"image {before}",
                hint="give the folder above, where each has a folder of its own (--images)",
            )

    def _files(self) -> dict[str, list[_Parts]]:
        if self._by_last is None:
            found: dict[str, list[_Parts]] = {}
            count = 0
            for place, folders, files in os.walk(self._folder):
                folders.sort()
                within = Path(place).relative_to(self._folder).parts
                count += len(files)
                if count > MOST_FILES:
                    raise InputError(
                        f"holds more than {MOST_FILES:,} files",
                        subject=str(self._folder),
                        hint="give the folder of the images alone (--images)",
                    )
                for file in files:
                    found.setdefault(file, []).append((*within, file))
            self._by_last = found
        return self._by_last


def _parts_of(name: str) -> _Parts:
    """Of a path, from the root or from a folder; none where it climbs out of that."""
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        if part == "..":
            if not parts:
                return ()
            parts.pop()
        elif part != "/":
            parts.append(part)
    return tuple(parts)


def _shared_end(one: _Parts, other: _Parts) -> int:
    """How many parts of two paths are the same, from the last on."""
    count = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
