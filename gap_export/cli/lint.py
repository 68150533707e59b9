"""`gap-export lint`: whether gapped position ids survive a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli.app import console, out, plain, print_json
from gap_export.cli.options import JsonOption


def lint(
    graph: Annotated[Path, typer.Argument(help="An ONNX file of any exporter.")],
    strict: Annotated[bool, typer.Option(help="Also check the contract of this project's bundles.")] = False,
    kind: Annotated[str, typer.Option(help="decoder, vision, splice, embed or auto.")] = "auto",
    ids_input: Annotated[str, typer.Option(help="Name of the input with position ids.")] = "position_ids",
    as_json: JsonOption = False,
) -> None:
    """Would gapped position ids survive this graph? Exit 1 when they would not."""
    import gap_export as gap

    report = gap.lint(graph, kind=kind, strict=strict, ids_input=ids_input)  # type: ignore[arg-type]
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        verdict = report.verdict
        word = "[bold green]survive[/]" if verdict.survives else "[bold red]do not survive[/]"
        out.print(
            f"{plain(report.subject)}: gapped ids {word}: {plain(verdict.reason)}",
            highlight=False,
            soft_wrap=True,
        )
        for finding in report.findings:
            console.print(f"  {plain(str(finding))}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if report.verdict.survives and not report.errors else 1)
