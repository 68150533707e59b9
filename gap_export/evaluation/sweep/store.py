"""The folder of a sweep: which points are finished, and what was answered in each."""

from __future__ import annotations

import os
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.evaluation.digests import first_digest, sealed
from gap_export.evaluation.result_folder import COMPUTED_ANEW, SETTINGS, open_result_folder, read_sealed
from gap_export.evaluation.sweep.record import Answers, Settings, SweepPoint
from gap_export.files import ListedFolder, results_kind

SWEEP = results_kind(
    "sweep",
    SETTINGS,
    frozenset({"checkpoint_sha256", "scenes_seed", "backend"}),
    r"settings\.json|sweep\.(json|md|png)|points/([^/]+\.json)?",
)
"""How folders of sweeps are told."""


class Store:
    """The opened folder of a sweep.

    Args:
        results: the folder, made or checked by `open_store`.
        settings: of all its points.
    """

    def __init__(self, results: ListedFolder, settings: Settings) -> None:
        self.results = results
        self.folder = results.path
        self.settings = settings

    def __contains__(self, point: SweepPoint) -> bool:
        """Whether a point is finished.

        Raises:
            BundleError: its file is damaged.
        """
        return os.path.lexists(self._path(point)) and bool(self.answers(point))

    def answers(self, point: SweepPoint) -> Answers:
        """Of a finished point.

        Raises:
            BundleError: its file is missing or damaged.
        """
        path = self._path(point)
        answers = read_sealed(path, Answers, self._before(point))
        if len(answers.ious) != self.settings.limit:
            raise BundleError(
                f"holds answers to {len(answers.ious)} scenes", subject=str(path), hint=COMPUTED_ANEW
            )
        if answers.without_box > answers.ious.count(0.0):
            raise BundleError(
                f"without_box is {answers.without_box}, and {answers.ious.count(0.0)} of ious are 0",
                subject=str(path),
                hint=COMPUTED_ANEW,
            )
        return answers

    def save(self, point: SweepPoint, answers: Answers) -> None:
        """Keep a finished point.

        Raises:
            BundleError: it cannot be written.
        """
        line, _ = sealed(answers, self._before(point))
        self.results.write(self._name(point), line + "\n")

    def _before(self, point: SweepPoint) -> str:
        """Answers belong to this point of a sweep of these settings."""
        return first_digest(self.settings, point.name)

    def _path(self, point: SweepPoint) -> Path:
        return self.folder / self._name(point)

    def _name(self, point: SweepPoint) -> str:
        return f"points/{point.name}.json"


def open_store(folder: Path, settings: Settings, *, replace: bool) -> Store:
    """Make the folder of a sweep, or go on with it; see `open_result_folder`."""
    results, _ = open_result_folder(folder, settings, SWEEP, replace=replace)
    return Store(results, settings)
