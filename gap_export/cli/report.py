"""`gap-export report`: evaluations as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console, out
from gap_export.cli.numbers import number
from gap_export.cli.options import AccuracyDropOption, AgreementOption, BoxIouOption, ProtocolOption
from gap_export.cli.progress import progress_shown


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="An evaluated bundle; or folders of evaluations, the reference run first, the subject last."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    protocol: ProtocolOption = "unc",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if they moved.")] = None,
    worst: Annotated[
        int,
        typer.Option(
            **number(bounds.SHOWN), help="How many of the expressions with the largest differences to show."
        ),
    ] = 12,
    drawn: Annotated[
        int, typer.Option(**number(bounds.SHOWN), help="How many randomly chosen expressions to show.")
    ] = 12,
    pruners: Annotated[
        bool, typer.Option(help="Show what every pruner would keep; loads the PyTorch model.")
    ] = True,
    max_accuracy_drop: AccuracyDropOption = None,
    min_prediction_agreement: AgreementOption = None,
    min_box_iou: BoxIouOption = None,
) -> None:
    """One HTML page of evaluations: tables, plots, boxes over images, what pruners keep. Works without a network."""
    from gap_export.evaluation.report.write import report as write_report

    with progress_shown() as progress:
        written = write_report(
            runs,
            output,
            protocol=protocol,
            images=images,
            worst=worst,
            drawn=drawn,
            pruners=pruners,
            max_accuracy_drop=max_accuracy_drop,
            min_prediction_agreement=min_prediction_agreement,
            min_box_iou=min_box_iou,
            progress=progress,
        )
    for note in written.notes:
        console.say((note, "yellow"))
    out.say(f"{output}: {written.bytes / 1e6:.1f} MB")
