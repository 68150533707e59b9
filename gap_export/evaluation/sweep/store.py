"""The folder of a sweep: its settings, one small file per finished cell, and the record at the end.

Every file appears whole or not at all, so that a sweep may be killed at any moment: what lies there is finished.
"""

from __future__ import annotations

from pathlib import Path

from gap_export.errors import BundleError
from gap_export.evaluation.result_folder import open_result_folder
from gap_export.evaluation.sweep.record import Answers, Cell, Settings
from gap_export.files import write_atomically

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
        hint = (
            "it is missing or damaged: delete it, and run the same command again: that cell is computed anew"
        )
        answers = Answers.read(path, hint=hint, error=BundleError)
        if len(answers.ious) != self.settings.cases:
            raise BundleError(f"holds answers to {len(answers.ious)} scenes", subject=str(path), hint=hint)
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
    """Make the folder of a sweep, or go on with it; see `open_result_folder`."""
    open_result_folder(folder, settings, holds="sweep", replace=replace)
    return Store(folder, settings)
