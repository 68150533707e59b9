"""`gap-export validate`: parity and grounding against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    BundleArgument,
    JsonOption,
    KeepOption,
    LimitOption,
    ThreadsOption,
)
from gap_export.cli.progress import progress_shown


def validate(
    bundle: BundleArgument,
    limit: LimitOption = 500,
    keep: KeepOption = None,
    backend: BackendOption = "onnxruntime",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the reference, if they moved.")] = None,
    text_tower: Annotated[Path | None, typer.Option(help="The text tower's, if they moved.")] = None,
    batch: Annotated[int, typer.Option(**number(bounds.BATCH), help="Images per call.")] = 16,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Parity and grounding against PyTorch, with negative controls; exit 1 when a gate is not met."""
    import gap_export as gap

    with progress_shown() as progress:
        report = gap.validate(
            bundle,
            limit=limit,
            keep=keep,
            backend=backend,
            checkpoint=checkpoint,
            text_tower=text_tower,
            batch=batch,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(json.loads(report.model_dump_json()))  # as stored: what is not a number is null
    else:
        from gap_export.evaluation.report.terminal import print_parity

        print_parity(report, out)
    raise typer.Exit(0 if report.ok else 1)
