"""Whose a folder is: ours where a file in it says so by its content, and of such a folder only what we wrote.

A name proves nothing: web applications have a `manifest.json`, and editors a `settings.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import BundleError
from gap_export.files.file import writing

_MOST_NAMED = 10
_HALF_WRITTEN = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{16}\.writing")
"""What a killed process leaves of a file."""
_LARGEST_MARK = 64 * 2**20
"""Bytes of a file by which a folder may be told; larger ones are not ours."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that commands write.

    Attributes:
        name: in a word, for messages.
        mark: name of the JSON file by which such folders are told.
        fields: that the file has, of whatever version.
        written: content of the file -> patterns of the paths in the folder, with `/`, that commands wrote.
    """

    name: str
    mark: str
    fields: frozenset[str]
    written: Callable[[dict[str, Any]], Iterable[re.Pattern[str]]]


def check_folder(folder: Path, kind: FolderKind, *, replaced: bool = True) -> bool:
    """Refuse an output folder in which something of somebody else's lies.

    Args:
        folder: to be written.
        kind: that is to be written.
        replaced: whether what is there is to be replaced, so that files of others would be lost; else only the kind is looked at.

    Returns:
        Whether a folder of that kind is there already.

    Raises:
        BundleError: a file is there, a folder of something else, or files in it that were not written by commands.
    """
    with writing(folder, what="cannot be used", hint="choose another output folder"):
        if folder.exists() and not folder.is_dir():
            raise BundleError("is a file", subject=str(folder), hint="choose another output folder")
        if not folder.is_dir() or not any(folder.iterdir()):
            return False
    content = _mark_of(folder, kind)
    if content is None:
        raise BundleError(
            f"is not empty and holds no {kind.name}",
            subject=str(folder),
            hint="choose another output folder, or empty this one yourself",
        )
    if not replaced:
        return True
    foreign = list(
        itertools.islice(_foreign(folder, [*kind.written(content), _HALF_WRITTEN]), _MOST_NAMED + 1)
    )
    if foreign:
        named = ", ".join(foreign[:_MOST_NAMED]) + (", ..." if len(foreign) > _MOST_NAMED else "")
        raise BundleError(
            f"holds what no command wrote beside its {kind.name}: {named}",
            subject=str(folder),
            hint="move it away, or choose another output folder: nothing of yours is replaced",
        )
    return True


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


def _foreign(folder: Path, written: list[re.Pattern[str]]) -> Iterator[str]:
    """Paths in a folder that nothing we write has; empty folders too."""
    for place, folders, files in os.walk(folder):
        within = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]  # not walked into
        for name in sorted([*files, *links]):
            path = (within / name).as_posix()
            if not any(pattern.fullmatch(path) for pattern in written):
                yield path
        if not folders and not files and place != str(folder):
            path = f"{within.as_posix()}/"
            if not any(pattern.match(path) for pattern in written):
                yield path
