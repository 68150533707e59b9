"""A folder that a long run fills and can go on with: what all results in it have in common, and the results themselves.

    files.json         what was written, with hashes
    settings.json      what the run was asked; results of other settings never mix
    ...                results, each of which appears whole or not at all

So a run can be interrupted at any moment: whatever lies in its folder is finished, and the same command resumes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from gap_export.bundle.folder import BUNDLE
from gap_export.errors import BundleError
from gap_export.evaluation.digests import unsealed
from gap_export.files import (
    FILES,
    FolderKind,
    ListedFolder,
    atomic_folder,
    check_folder,
    is_file,
    read_bytes,
    visible,
)
from gap_export.files.kinds import REPORT
from gap_export.records import Record

R = TypeVar("R", bound=Record)

SETTINGS = "settings.json"

COMPUTED_ANEW = (
    "it is missing or damaged: delete it, and run the same command again: that point is computed anew"
)
"""What to do about the file of a finished point."""


def open_result_folder(
    folder: Path, settings: Record, kind: FolderKind, *, replace: bool
) -> tuple[ListedFolder, bool]:
    """Make the folder of a run, or find it to go on with. Its lock must be held.

    Args:
        folder: absent, empty, or of a run of the same kind.
        settings: what all results in it have in common.
        kind: of run.
        replace: throw a run of other settings away.

    Returns:
        The folder, and whether results of the same settings may lie in it already.

    Raises:
        BundleError: something else is there, a run of other settings, files of others in one that is to be replaced, or files under the
            names of its own that were changed since they were written.
    """
    there = check_folder(folder, kind, replaced=False, outside=(BUNDLE,))
    if there:
        results = ListedFolder(folder, kind)
        difference = _difference(results, settings)
        if difference is None:
            if not is_file(folder / SETTINGS):
                results.write(SETTINGS, settings.text())
            if not is_file(folder / FILES):
                results.write_listing()
            return results, True
        if not replace:
            raise BundleError(
                f"holds another {kind.name}: {difference}",
                subject=str(folder),
                hint="choose another output folder, or pass --replace to throw that one away",
            )
    if folder.is_dir() and not there:  # an empty folder may be where somebody works: it stays
        results = ListedFolder(folder, kind)
        results.write(SETTINGS, settings.text())
        return results, False
    with atomic_folder(folder, check=lambda: check_folder(folder, kind)) as fresh:
        ListedFolder(fresh, kind).write(SETTINGS, settings.text())
    return ListedFolder(folder, kind), False


def read_sealed(path: Path, kind: type[R], before: str) -> R:
    """A finished point: a record in one line, with its digest.

    Args:
        path: of the file.
        kind: of the record.
        before: digest that its own follows from.

    Raises:
        BundleError: it is missing, damaged, or was changed.
    """
    line = read_bytes(path, dataclasses.replace(REPORT, error=BundleError, hint=COMPUTED_ANEW))
    try:
        content, _ = unsealed(line.removesuffix(b"\n"), before)
    except ValueError as reason:
        raise BundleError(str(reason), subject=str(path), hint=COMPUTED_ANEW) from reason
    return kind.parse(content, subject=str(path), hint=COMPUTED_ANEW, error=BundleError)


def _difference(results: ListedFolder, wanted: Record) -> str | None:
    """The first setting in which a stored run differs, as a message."""
    path = results.path / SETTINGS
    if not is_file(path) and all(each.name == FILES for each in visible(results.path)):
        return None  # killed before they were written: nothing else is there
    try:
        there = type(wanted).read(path, hint="", error=BundleError)
    except BundleError:
        return f"its {SETTINGS} is missing, damaged or was written by another version"
    for name in type(wanted).model_fields:
        mine, theirs = getattr(wanted, name), getattr(there, name)
        if isinstance(mine, dict) and mine != theirs:
            name, mine, theirs = next(
                (f"{name} {key}", mine.get(key), theirs.get(key))
                for key in (*mine, *theirs)
                if mine.get(key) != theirs.get(key)
            )
        if mine != theirs:
            return f"{name.replace('_', ' ')} {theirs} there, {mine} here"
    return None
