"""The folder of a sweep: its settings, one small file per finished cell, and the record at the end.

Every file appears whole or not at all, so that a sweep may be killed at any moment: what lies there is finished.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from gap_export.errors import BundleError
from gap_export.evaluation.sweep.record import Answers, Cell, Settings
from gap_export.files import atomic_folder, write_atomically

SETTINGS = "settings.json"
RECORD, PAGE, PLOT = "sweep.json", "sweep.md", "sweep.png"


class Store:
    """The opened folder of a sweep.

    Args:
        folder: made or checked by `open_store`.
        settings: of all its cells.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings

    def __contains__(self, cell: Cell) -> bool:
        """Whether a cell is finished.

        Raises:
            BundleError: its file is damaged.
        """
        return self._path(cell).is_file() and bool(self.answers(cell))

    def answers(self, cell: Cell) -> Answers:
        """Of a finished cell.

        Raises:
            BundleError: its file is missing or damaged.
        """
        path = self._path(cell)
        try:
            answers = Answers.model_validate_json(path.read_bytes())
            if len(answers.ious) != self.settings.cases:
                raise ValueError(f"{len(answers.ious)} scenes")
        except (OSError, ValueError) as error:  # what pydantic raises is a ValueError
            raise BundleError(
                "is missing or damaged",
                subject=str(path),
                hint="delete it if it is there, and run the same command again: that cell is computed anew",
            ) from error
        return answers

    def save(self, cell: Cell, answers: Answers) -> None:
        """Keep a finished cell.

        Raises:
            BundleError: it cannot be written.
        """
        write_atomically(self._path(cell), answers.model_dump_json() + "\n")

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"


def open_store(folder: Path, settings: Settings, *, replace: bool) -> Store:
    """Make the folder of a sweep, or go on with it.

    Args:
        folder: absent, empty, or a sweep's.
        settings: what its cells must have in common.
        replace: throw a sweep of other settings away.

    Raises:
        BundleError: something else is there, or a sweep of other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError("is a file", subject=str(folder), hint="choose another output folder")
    if folder.is_dir() and any(folder.iterdir()):
        path = folder / SETTINGS
        if not path.is_file():
            raise BundleError(
                "is not empty and holds no sweep", subject=str(folder), hint="choose another output folder"
            )
        difference = _difference(path, settings)
        if difference is None:
            return Store(folder, settings)
        if not replace:
            raise BundleError(
                f"holds another sweep: {difference}",
                subject=str(folder),
                hint="choose another output folder, or pass --replace to throw that one away",
            )
    with atomic_folder(folder) as fresh:
        write_atomically(fresh / SETTINGS, settings.model_dump_json(indent=2) + "\n")
    return Store(folder, settings)


def _difference(path: Path, wanted: Settings) -> str | None:
    """The first setting in which a stored sweep differs, in words."""
    try:
        there = Settings.model_validate_json(path.read_bytes())
    except ValidationError:
        return f"its {SETTINGS} is damaged or was written by another version"
    if there == wanted:
        return None
    for name in Settings.model_fields:
        mine, theirs = getattr(wanted, name), getattr(there, name)
        if isinstance(mine, dict) and mine != theirs:
            name, mine, theirs = next(
                (f"{name} {key}", mine.get(key), theirs.get(key))
                for key in (*mine, *theirs)
                if mine.get(key) != theirs.get(key)
            )
        if mine != theirs:
            return f"{name.replace('_', ' ')} {theirs} there, {mine} here"
    raise AssertionError("settings differ in no field")
