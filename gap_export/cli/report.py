"""`gap-export report`: evaluations as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli.app import console, needs_build_extra, out
from gap_export.cli.comparing import AccuracyDropOption, AgreementOption, BoxIouOption

if TYPE_CHECKING:
    from gap_export.evaluation.refer.image_source import Source
    from gap_export.evaluation.report.page import AskPruners
    from gap_export.evaluation.report.runs import Subject


def report(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            help="An evaluated bundle; or folders of evaluations, the reference run first, the run under test last."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    protocol: Annotated[str, typer.Option(help="unc or lmms-eval.")] = "unc",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if they moved.")] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="How many of the expressions with the largest differences to show.")
    ] = 12,
    drawn: Annotated[int, typer.Option(min=0, help="How many randomly chosen expressions to show.")] = 12,
    pruners: Annotated[
        bool, typer.Option(help="Show what every pruner would keep; loads the PyTorch model.")
    ] = True,
    max_accuracy_drop: AccuracyDropOption = None,
    min_prediction_agreement: AgreementOption = None,
    min_box_iou: BoxIouOption = None,
) -> None:
    """One HTML page of evaluations: tables, plots, boxes over images, what pruners keep. Works without a network."""
    from gap_export.evaluation.refer.compare import thresholds_on
    from gap_export.evaluation.report.page import page, require
    from gap_export.evaluation.report.runs import open_subject
    from gap_export.files import write_atomically

    require()
    subject = open_subject(subjects, protocol)
    with console.status("drawing the page"):
        text = page(
            subject,
            thresholds_on(
                subject.first.run,
                subject.candidate.run,
                max_accuracy_drop=max_accuracy_drop,
                min_prediction_agreement=min_prediction_agreement,
                min_box_iou=min_box_iou,
            ),
            _source(subject, images),
            title=f"Grounding of {subject.candidate.name}",
            worst=worst,
            drawn=drawn,
            pruners=_ask(subject) if pruners else "left out (--no-pruners)",
        )
    write_atomically(output, text)
    out.print(f"{output}: {len(text.encode()) / 1e6:.1f} MB", highlight=False, soft_wrap=True)


def _source(subject: Subject, images: Path | None) -> Source | None:
    """Images of the data set, or None, after a message."""
    from gap_export.errors import GapExportError
    from gap_export.evaluation.refer.dataset import open_dataset

    provenance = subject.first.provenance
    folder = images or (None if provenance.images is None else Path(provenance.images))
    try:
        source = open_dataset(provenance.data, split=provenance.split, images=folder).source
    except GapExportError as error:
        console.print(
            f"[yellow]images are not shown[/]: {error}; give their folder (--images)", highlight=False
        )
        return None
    if source is None:
        console.print("[yellow]images are not shown[/]: give their folder (--images)", highlight=False)
    return source


def _ask(subject: Subject) -> AskPruners | str:
    """Ask every pruner, or why that cannot be done."""
    from functools import partial

    from gap_export.pipeline.build import RANDOM

    bundle = subject.candidate.bundle
    if bundle is None:
        return subject.candidate.bundle_lacks
    if bundle.manifest.checkpoint == RANDOM:
        return "the bundle holds random weights"
    try:
        from gap_export.evaluation.report.choices import choices
    except ImportError as error:
        lacking = needs_build_extra(error)
        return f"{lacking.subject} {lacking.message} ({lacking.hint})"
    return partial(choices, bundle)
