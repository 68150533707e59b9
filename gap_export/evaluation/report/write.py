"""A page as one call: what it is about is opened, images and pruners are found where they can be, and the file is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gap_export import bounds
from gap_export.errors import GapExportError
from gap_export.evaluation.refer.compare import thresholds_on
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.report.page import AskPruners, check_packages, page
from gap_export.evaluation.report.runs import ReportedRuns, open_runs
from gap_export.files import check_output_file, write_atomically
from gap_export.progress import SILENT, Progress

LEFT_OUT = "left out (--no-pruners)"
_GENERATOR, _HEAD = b'<meta name="generator" content="gap-export">', 2000
"""How pages are told from other files, and within how many bytes."""


@dataclass(frozen=True)
class WrittenPage:
    """A page that was written.

    Attributes:
        path: of the file.
        bytes: of the file.
        notes: what could not be shown, and what to do about it.
    """

    path: Path
    bytes: int
    notes: tuple[str, ...]


def report(
    runs: Path | str | Sequence[Path | str],
    out: Path | str = "report.html",
    *,
    protocol: str = "unc",
    images: Path | str | None = None,
    worst: int = 12,
    drawn: int = 12,
    pruners: bool = True,
    max_accuracy_drop: float | None = None,
    min_prediction_agreement: float | None = None,
    min_box_iou: float | None = None,
    progress: Progress = SILENT,
) -> WrittenPage:
    """One HTML page of evaluations: tables, plots, boxes over images, what pruners keep. It works without a network.

    Args:
        runs: the folder of a bundle, whose evaluations beside it are shown; or folders of evaluations, the reference run first and
            the subject last.
        out: file to write.
        protocol: of the evaluations.
        images: folder of the images, if they moved since.
        worst: how many of the expressions with the largest differences to show.
        drawn: how many randomly chosen expressions to show.
        pruners: show what every pruner would keep, which loads the PyTorch model.
        max_accuracy_drop: threshold on the subject; see `thresholds_on`.
        min_prediction_agreement: threshold on the subject; see `thresholds_on`.
        min_box_iou: threshold on the subject; see `thresholds_on`.
        progress: told of every stage.

    Raises:
        MissingRequirementError: a package is not installed.
        InputError: no evaluation under that protocol, or evaluations of different expressions.
        BundleError: the file cannot be written.
    """
    bounds.check(worst=worst, drawn=drawn)
    check_packages()
    folders = [runs] if isinstance(runs, Path | str) else list(runs)
    read = [Path(folder) for folder in folders]
    check_output_file(Path(out), inputs=read, closed=read, ours=_is_page, holds="page of gap-export")
    progress.stage("reading the evaluations")
    reported = open_runs(read, protocol)
    thresholds = thresholds_on(
        reported.reference.run,
        reported.subject.run,
        max_accuracy_drop=max_accuracy_drop,
        min_prediction_agreement=min_prediction_agreement,
        min_box_iou=min_box_iou,
    )
    source, note = _source(reported, None if images is None else Path(images))
    progress.stage("drawing the page")
    text = page(
        reported,
        thresholds,
        source,
        title=f"Grounding of {reported.subject.name}",
        worst=worst,
        drawn=drawn,
        pruners=_ask_pruners(reported) if pruners else LEFT_OUT,
    )
    write_atomically(Path(out), text)
    return WrittenPage(Path(out), len(text.encode()), (note,) if note else ())


def _is_page(path: Path) -> bool:
    """Whether a file is a page that `report` wrote."""
    with path.open("rb") as file:
        return _GENERATOR in file.read(_HEAD)


def _source(reported: ReportedRuns, images: Path | None) -> tuple[Source | None, str]:
    """Images of the data set, or why there are none."""
    provenance = reported.reference.provenance
    folder = images or (None if provenance.images is None else Path(provenance.images))
    try:
        source = open_dataset(
            provenance.data,
            split=provenance.split,
            images=folder,
            ignore_exif=provenance.ignore_exif,
            skip_bad_rows=bool(provenance.skipped),
        ).source
    except GapExportError as error:
        return None, f"images are not shown: {error}; give their folder (--images)"
    return source, "" if source else "images are not shown: give their folder (--images)"


def _ask_pruners(reported: ReportedRuns) -> AskPruners | str:
    """Ask every pruner, or why that cannot be done."""
    bundle = reported.subject.bundle
    if bundle is None:
        return reported.subject.bundle_lacks
    try:
        from gap_export.evaluation.report.choices import pruner_choices
        from gap_export.pipeline.build import RANDOM
    except ImportError as error:
        return f"{error.name} is not installed (pip install 'gap-export[build]')"
    if bundle.manifest.checkpoint == RANDOM:
        return "the bundle holds random weights"
    return partial(pruner_choices, bundle)
