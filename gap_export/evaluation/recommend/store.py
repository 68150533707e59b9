"""The folder of a recommendation among pruners: evaluations, and for every finished point its time and what it was taken on.

settings.json              what all points have in common
evaluations/PRUNER-keepK/  an evaluation each, as `gap-export eval` leaves it
points/PRUNER-keepK.json   that a point is finished: time, build, and hash of the evaluation's table
recommend.json, .png       what came of it
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gap_export.errors import BundleError, InputError
from gap_export.evaluation.digests import first_digest, sealed
from gap_export.evaluation.recommend.choose import Measured
from gap_export.evaluation.recommend.request import Place
from gap_export.evaluation.refer.journal import EVALUATION
from gap_export.evaluation.refer.results import EvalRun, open_run, read_provenance
from gap_export.evaluation.result_folder import COMPUTED_ANEW, SETTINGS, open_result_folder, read_sealed
from gap_export.files import Listed, ListedFolder, results_kind
from gap_export.files.hidden import HIDDEN
from gap_export.records import Amount, Count, Flag, Record, Text

EVALUATIONS = "evaluations"

_OWN = results_kind(
    "recommendation",
    SETTINGS,
    frozenset({"checkpoint_sha256", "annotations", "requests"}),
    r"settings\.json|recommend\.(json|png)|points/([^/]+\.json)?"
    rf"|{EVALUATIONS}/([^/]+/)?|{EVALUATIONS}/[^/.][^/]*/(?:files\.json|{EVALUATION.names.pattern})",
    unlisted=rf"{EVALUATIONS}/(?:[^/.][^/]*/(?:{EVALUATION.unlisted.pattern})|\.[^/]+\.lock|{HIDDEN}(?:/.*)?)",
)


def _listed(folder: Path, content: dict[str, Any]) -> Mapping[str, Listed] | None:
    """What is listed in the folder, and in the evaluations in it."""
    own = _OWN.listed(folder, content)
    if own is None:
        return None
    every = dict(own)
    for evaluation in (folder / EVALUATIONS).glob("[!.]*/"):
        for name, listed in (EVALUATION.listed(evaluation, {}) or {}).items():
            every[f"{EVALUATIONS}/{evaluation.name}/{name}"] = listed
    return every


RECOMMENDATION_FOLDER = dataclasses.replace(_OWN, listed=_listed)
"""How folders of recommendations among pruners are told."""


class Settings(Record):
    """All that a point depends on besides pruner and share. A folder holds the points of one such.

    Attributes:
        schema_version: of the files in the folder.
        recipe: the recipe but for what is tried (pruner, keep) and what follows from it (capacity).
        checkpoint_sha256: over all files of the checkpoint that a build reads.
        text_tower_sha256: hash of the text tower's files, where a pruner looks at the expression.
        annotations: sha256 of the annotations, or the name of generated scenes.
        split: of the data set; None for all of it.
        ignore_exif: whether images were taken as they are stored.
        rescale_boxes: whether true boxes were scaled to the images.
        limit: expressions asked; None for all.
        protocol: under which answers are scored.
        backend: runtime.
        threads: of the runtime.
        requests: per point, whose time is measured.
        processor: of the machine: times are of one.
        versions: package -> version.
    """

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = 1
    recipe: dict[str, Any]
    checkpoint_sha256: Text
    text_tower_sha256: Text | None = None
    annotations: Text
    split: Text | None
    ignore_exif: Flag
    rescale_boxes: Flag
    limit: Count | None
    protocol: Text
    backend: Text
    threads: Count
    requests: Count
    processor: str
    versions: dict[str, str]


class Finished(Record):
    """A finished point.

    Attributes:
        manifest_sha256: of the build that was asked.
        results_sha256: of the table of its evaluation.
        ttft_ms: median time to the first token.
        baseline_ttft_ms: median of the unpruned model, in the same interleaved rounds.
    """

    manifest_sha256: Text
    results_sha256: Text
    ttft_ms: Annotated[Amount, Field(gt=0)]
    baseline_ttft_ms: Annotated[Amount, Field(gt=0)]


class Store:
    """The opened folder.

    Args:
        results: the folder, made or checked by `open_store`.
        settings: of all its points.
    """

    def __init__(self, results: ListedFolder, settings: Settings) -> None:
        self.results = results
        self.folder = results.path
        self.settings = settings

    def __contains__(self, place: Place) -> bool:
        """Whether a point is finished.

        Raises:
            BundleError: its file is damaged.
        """
        return os.path.lexists(self.folder / self._name(place)) and bool(self.finished(place))

    def evaluation(self, place: Place) -> Path:
        """Folder of a point's evaluation."""
        return self.folder / EVALUATIONS / place.name

    def save(self, place: Place, manifest_sha256: str, run: EvalRun, times_ms: tuple[float, float]) -> None:
        """Keep a finished point.

        Args:
            place: which.
            manifest_sha256: of the build that was asked.
            run: its evaluation, in the folder of it.
            times_ms: median time to the first token, of the point and of the unpruned model.

        Raises:
            BundleError: it cannot be written.
        """
        ttft_ms, baseline_ttft_ms = times_ms
        finished = Finished(
            manifest_sha256=manifest_sha256,
            results_sha256=self._table(run),
            ttft_ms=ttft_ms,
            baseline_ttft_ms=baseline_ttft_ms,
        )
        line, _ = sealed(finished, self._before(place))
        self.results.write(self._name(place), line + "\n")

    def finished(self, place: Place) -> Finished:
        """Time of a finished point.

        Raises:
            BundleError: its file is missing or damaged.
        """
        return read_sealed(self.folder / self._name(place), Finished, self._before(place))

    def measured(self, place: Place) -> Measured:
        """A finished point with its evaluation.

        Raises:
            BundleError: a file of it is missing or damaged, or the evaluation is another one.
        """
        finished = self.finished(place)
        subject = str(self.folder / self._name(place))
        try:
            run = open_run(self.evaluation(place), self.settings.protocol)
        except InputError as error:
            raise BundleError(
                f"is of an evaluation that {error.message} ({error.subject})",
                subject=subject,
                hint=COMPUTED_ANEW,
            ) from error
        if self._table(run) != finished.results_sha256:
            raise BundleError(
                f"is of another evaluation than {run.folder}", subject=subject, hint=COMPUTED_ANEW
            )
        return Measured(
            pruner=place.pruner,
            keep=place.keep,
            run=run,
            manifest_sha256=finished.manifest_sha256,
            time_share=finished.ttft_ms / finished.baseline_ttft_ms,
        )

    def _table(self, run: EvalRun) -> str:
        return read_provenance(run.folder).hashes[self.settings.protocol].results

    def _before(self, place: Place) -> str:
        """The time belongs to this point under these settings."""
        return first_digest(self.settings, place.name)

    def _name(self, place: Place) -> str:
        return f"points/{place.name}.json"


def open_store(folder: Path, settings: Settings, *, replace: bool) -> Store:
    """Make the folder, or continue with it; see `open_result_folder`."""
    results, _ = open_result_folder(folder, settings, RECOMMENDATION_FOLDER, replace=replace)
    return Store(results, settings)
