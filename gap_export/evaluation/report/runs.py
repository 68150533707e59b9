"""Evaluations that a page is about: their results, the bundles that answered, and what else was measured on those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gap_export.boxes.codecs import Box
from gap_export.bundle.folder import MANIFEST, Bundle, open_bundle
from gap_export.errors import GapExportError, InputError
from gap_export.evaluation.bundle_reports import (
    PARITY,
    STALE,
    read_report,
    states,
)
from gap_export.evaluation.parity import ParityReport
from gap_export.evaluation.recommend.of_bundle import read_recommendation
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.refer.journal import Settings, read_settings
from gap_export.evaluation.refer.results import (
    EvalRun,
    Provenance,
    open_run,
    read_provenance,
    results_path,
)
from gap_export.files import is_file, sha256_of


@dataclass(frozen=True)
class Answer:
    """One row of results.

    Attributes:
        id: of the expression.
        image: name of the image.
        expression: what was asked for.
        text: the model's answer.
        truth: box in pixels.
        box: that the model gave, in pixels; None without one.
        iou: of both.
        hit: under the protocol.
        kept_indices: raster indices of the visual tokens that were kept.
        seconds: of the image's work, in equal parts among its expressions.
    """

    id: str
    image: str
    expression: str
    text: str
    truth: Box
    box: Box | None
    iou: float
    hit: bool
    kept_indices: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """One evaluation.

    Attributes:
        run: results, as `compare` takes them.
        provenance: where they are from.
        settings: of the answers; None where those came from a file.
        bundle: that answered; None where there was none, or where it is not the same any more.
        bundle_lacks: why there is none.
    """

    run: EvalRun
    provenance: Provenance
    settings: Settings | None
    bundle: Bundle | None
    bundle_lacks: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.run.folder.name

    @property
    def backend(self) -> str:
        """That answered."""
        return self.run.record.backend

    @property
    def positions(self) -> str:
        """Policy of the bundle, `unpruned` where there is nothing to number, `-` where it is not known."""
        if self.bundle is None:
            return "-"
        pruning, model = self.bundle.manifest.pruning, self.bundle.manifest.spec
        whole = pruning.min_tokens == model.visual_tokens and model.token_range is None
        return "unpruned" if whole or pruning.pruner == "none" else str(pruning.positions)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        """By id."""
        return {
            row.id: Answer(
                id=row.id,
                image=row.image,
                expression=row.expression,
                text=row.answer,
                truth=row.truth,
                box=row.box,
                iou=row.iou,
                hit=row.hit,
                kept_indices=row.kept_indices,
                seconds=row.seconds,
            )
            for row in self.run.rows
        }

    @property
    def median_seconds(self) -> float:
        """Per expression."""
        return float(np.median([answer.seconds for answer in self.answers.values()]))

    @property
    def parity(self) -> ParityReport | None:
        """What `validate` left in the bundle, if that was this build of it."""
        return (
            None
            if self.bundle is None
            else read_report(self.bundle, PARITY, ParityReport, command="validate")
        )

    @property
    def stale_reports(self) -> list[str]:
        """Names of records in the bundle that were taken on another build of it, and are not used."""
        found = {} if self.bundle is None else states(self.bundle)
        return [name for name, state in found.items() if state == STALE]

    @property
    def recommendation(self) -> Recommendation | None:
        """What `recommend` left in the bundle, if that was this build of it, about the same expressions."""
        if self.bundle is None:
            return None
        found = read_recommendation(self.bundle)
        if found is None:
            return None
        same = (found.protocol, found.expressions) == (self.run.record.protocol, len(self.run.ids))
        return found if same else None


@dataclass(frozen=True)
class ReportedRuns:
    """All that a page is about.

    Attributes:
        runs: that answered the same expressions, the reference run first.
        chosen: place of the subject.
        left_out: name of an evaluation of the bundle -> why it is not on the page.
    """

    runs: tuple[Evaluated, ...]
    chosen: int
    left_out: dict[str, str]

    @property
    def reference(self) -> Evaluated:
        """The run that others are compared with."""
        return self.runs[0]

    @property
    def subject(self) -> Evaluated:
        """The run that the page is about."""
        return self.runs[self.chosen]


def open_runs(folders: Sequence[Path], protocol: str) -> ReportedRuns:
    """The runs that a page is to be about.

    Args:
        folders: evaluations, of which the first is the reference run and the last is the subject; or one bundle, whose evaluations
            beside it are then taken, from the one with most tokens on, and the share that `recommend` chose is the subject.
        protocol: of all.

    Raises:
        InputError: no evaluation under that protocol, or evaluations of different expressions.
    """
    if len(folders) == 1 and is_file(folders[0] / MANIFEST):
        return _of_bundle(open_bundle(folders[0]), protocol)
    runs = tuple(_evaluated(folder, protocol) for folder in folders)
    for other in runs[1:]:
        if set(other.run.ids) != set(runs[0].run.ids):
            raise InputError(
                "answer different expressions",
                subject=f"{runs[0].run.folder} and {other.run.folder}",
                hint="a page is about runs over the same data, split and --limit",
            )
    return ReportedRuns(runs, len(runs) - 1, {})


def _of_bundle(bundle: Bundle, protocol: str) -> ReportedRuns:
    """Of all evaluations beside a bundle, those of this build of it that compare."""
    found, left_out = [], {}
    for path in sorted(bundle.runs.glob("*/")):
        try:
            run = _evaluated(path, protocol, bundle)
        except InputError as error:
            left_out[path.name] = error.message
            continue
        if run.settings is not None and run.settings.manifest_sha256 != bundle.manifest_sha256:
            left_out[run.name] = "is stale: it was taken on another build of the bundle"
        else:
            found.append(run)
    if not found:
        raise InputError(
            f"has no finished evaluation under {protocol}",
            subject=str(bundle.folder),
            hint="run gap-export eval or gap-export recommend first, or name the folders of evaluations",
        )
    # Of most expressions, and of these those of most runs: all others would not compare.
    asked = [frozenset(run.run.ids) for run in found]
    common = max(asked, key=lambda ids: (len(ids), asked.count(ids)))
    left_out |= {
        run.name: "answers other expressions" for run, ids in zip(found, asked, strict=True) if ids != common
    }
    runs = [run for run, ids in zip(found, asked, strict=True) if ids == common]
    runs.sort(key=lambda run: (-run.run.record.mean_kept, run.backend != "torch", run.name))
    recommended = runs[0].recommendation
    chosen = len(runs) - 1
    if recommended is not None and recommended.chosen is not None:
        places = [
            place
            for place, run in enumerate(runs)
            if run.settings is not None and run.settings.keep == recommended.chosen
        ]
        chosen = places[-1] if places else chosen
    return ReportedRuns(tuple(runs), chosen, left_out)


def _evaluated(folder: Path, protocol: str, bundle: Bundle | None = None) -> Evaluated:
    """An evaluation, with the bundle that answered: the one given, if it is that build, or what lies where it lay."""
    run, provenance = open_run(folder, protocol), read_provenance(folder)
    settings = read_settings(folder)
    lacks = ""
    if bundle is None or settings is None or settings.manifest_sha256 != bundle.manifest_sha256:
        bundle, lacks = _bundle(provenance, settings)
    if bundle is not None:
        _check_tokens(run, bundle)
    return Evaluated(run, provenance, settings, bundle, lacks)


def _check_tokens(run: EvalRun, bundle: Bundle) -> None:
    """Refuse answers of tokens that the bundle does not have.

    Raises:
        InputError: there are some.
    """
    count = bundle.manifest.spec.visual_tokens
    for number, row in enumerate(run.rows, 1):
        if max(row.kept_indices, default=0) >= count:
            raise InputError(
                f"kept_indices has {max(row.kept_indices)}, and the bundle has {count} visual tokens",
                subject=f"{results_path(run.folder, run.record.protocol)}, row {number}",
                hint="run the evaluation again",
            )


def _bundle(provenance: Provenance, settings: Settings | None) -> tuple[Bundle | None, str]:
    """The bundle, or why there is none."""
    if provenance.bundle is None or settings is None:
        return None, "answers came from a file"
    folder = Path(provenance.bundle)
    if not is_file(folder / MANIFEST):
        return None, f"its bundle is not at {folder} any more"
    if sha256_of(folder / MANIFEST) != settings.manifest_sha256:
        return None, f"its bundle at {folder} was built anew since"
    try:
        return open_bundle(folder), ""
    except GapExportError as error:
        return None, f"its bundle at {folder} {error.message}"


def provenance_facts(run: Evaluated) -> dict[str, Any]:
    """Facts that a number is worth nothing without."""
    facts: dict[str, Any] = {
        "folder": str(run.run.folder),
        "protocol": run.run.record.description,
        "data": run.provenance.data,
        "split": run.run.record.split,
        "processor": run.provenance.processor,
        "versions": ", ".join(f"{name} {version}" for name, version in run.provenance.versions.items()),
    }
    if run.run.record.box_format is not None:
        facts["box format"] = run.run.record.box_format
    if run.settings is not None:
        facts |= {"manifest sha256": run.settings.manifest_sha256, "annotations": run.settings.annotations}
    if run.bundle is not None:
        manifest = run.bundle.manifest
        facts |= {
            "bundle": str(run.bundle.folder),
            "checkpoint": manifest.checkpoint,
            "precision": manifest.precision,
            "built with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        }
    else:
        facts["bundle"] = run.bundle_lacks
    return facts
