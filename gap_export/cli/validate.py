"""`gap-export validate`: parity and grounding against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gap_export import bounds
from gap_export.cli.app import out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    KeepOption,
    LimitOption,
    PrecisionHintOption,
    ProviderOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown
from gap_export.errors import InputError

_OF_SCENES = ("limit", "keep", "text_tower", "batch")


def validate(
    context: typer.Context,
    bundle: BundleArgument,
    limit: LimitOption = 500,
    keep: KeepOption = None,
    backend: BackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the reference, if they moved.")] = None,
    text_tower: Annotated[Path | None, typer.Option(help="The text tower's, if they moved.")] = None,
    batch: Annotated[int, typer.Option(**number(bounds.BATCH), help="Images per call.")] = 16,
    threads: ThreadsOption = 0,
    text: Annotated[
        Path | None,
        typer.Option(help="Compare what is predicted after every word of this file of prose; no images."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            **number(bounds.TOKENS), help="With --text: tokens of the first call, by default 512; 256 follow."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Parity and grounding against PyTorch, with negative controls; exit 1 when a gate is not met."""
    import gap_export as gap

    if text is not None:
        _check_options_of_text(context)
        chosen = runtime_of(backend, device, precision_hint, provider, bundle)
        _validate_text(bundle, text, tokens, chosen, checkpoint, threads, as_json)
    if tokens is not None:
        raise InputError("belongs to a text", subject="--tokens", hint="name one with --text")
    with progress_shown() as progress:
        report = gap.validate(
            bundle,
            limit=limit,
            keep=keep,
            backend=runtime_of(backend, device, precision_hint, provider, bundle),
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


def _check_options_of_text(context: typer.Context) -> None:
    """Refuse what would be ignored: scenes and a text are two measurements."""
    for name in _OF_SCENES:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InputError(
                "belongs to scenes, and a text is measured by itself",
                subject=f"--{name.replace('_', '-')}",
                hint="leave it out, or leave out --text",
            )


def _validate_text(
    bundle: Path,
    text: Path,
    tokens: int | None,
    backend: str,
    checkpoint: Path | None,
    threads: int,
    as_json: bool,
) -> NoReturn:
    import gap_export as gap

    with progress_shown() as progress:
        report = gap.validate_text(
            bundle,
            text,
            **({} if tokens is None else {"tokens": tokens}),
            backend=backend,
            checkpoint=checkpoint,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(json.loads(report.model_dump_json()))
    else:
        from gap_export.evaluation.report.terminal import print_text_parity

        print_text_parity(report, out)
    raise typer.Exit(0 if report.ok else 1)
