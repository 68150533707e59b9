"""A folder that a long run fills and can go on with: what all results in it have in common, and the results themselves.

    settings.json      what the run was asked; results of other settings never mix
    ...                results, each of which appears whole or not at all

So a run can be interrupted at any moment: whatever lies in its folder is finished, and the same command resumes.
"""

from __future__ import annotations

from pathlib import Path

from gap_export.errors import BundleError
from gap_export.files import FolderKind, atomic_folder, check_folder
from gap_export.records import Record

SETTINGS = "settings.json"


def open_result_folder(folder: Path, settings: Record, kind: FolderKind, *, replace: bool) -> bool:
    """Make the folder of a run, or find it to go on with.

    Args:
        folder: absent, empty, or of a run of the same kind.
        settings: what all results in it have in common.
        kind: of run.
        replace: throw a run of other settings away.

    Returns:
        Whether results of the same settings may lie in it already.

    Raises:
        BundleError: something else is there, a run of other settings, or files of others in one that is to be replaced.
    """
    there = check_folder(folder, kind, replaced=False)
    if there:
        difference = _difference(folder / SETTINGS, settings)
        if difference is None:
            return True
        if not replace:
            raise BundleError(
                f"holds another {kind.name}: {difference}",
                subject=str(folder),
                hint="choose another output folder, or pass --replace to throw that one away",
            )
    if folder.is_dir() and not there:
        settings.write(folder / SETTINGS)  # an empty folder may be where others write too: it stays
        return False
    with atomic_folder(folder, check=lambda: check_folder(folder, kind)) as fresh:
        settings.write(fresh / SETTINGS)
    return False


def _difference(path: Path, wanted: Record) -> str | None:
    """The first setting in which a stored run differs, as a message."""
    try:
        there = type(wanted).read(path, hint="", error=BundleError)
    except BundleError:
        return f"its {SETTINGS} is damaged or was written by another version"
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
