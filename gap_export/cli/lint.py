"""`gap-export lint`: whether gapped position ids survive a graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli.app import console, out, print_json
from gap_export.cli.options import JsonOption

if TYPE_CHECKING:
    from gap_export.linter import Proof

_ANSWERS: dict[str, tuple[str | tuple[str, str], ...]] = {
    "survive": ("gapped ids ", ("survive", "bold green")),
    "do not survive": ("gapped ids ", ("do not survive", "bold red")),
    "cannot tell": (("cannot tell", "bold yellow"), " whether gapped ids survive"),
    "no position ids": (("no position ids", "bold yellow"), " here"),
}


def lint(
    graph: Annotated[Path, typer.Argument(help="An ONNX file of any exporter.")],
    strict: Annotated[bool, typer.Option(help="Also check the contract of this project's bundles.")] = False,
    kind: Annotated[str, typer.Option(help="decoder, vision, splice, embed or auto.")] = "auto",
    ids_input: Annotated[str, typer.Option(help="Name of the input with position ids.")] = "position_ids",
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Also run a decoder in ONNX Runtime and see whether its logits follow the ids."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Would gapped position ids survive this graph? Exit 1 when they would not, when lint cannot tell, or when a graph of
    a decoder's name has none."""
    import gap_export as gap

    report = gap.lint(graph, kind=kind, strict=strict, ids_input=ids_input, prove=prove)  # type: ignore[arg-type]
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        verdict = report.verdict
        out.say(f"{report.subject}: ", *_ANSWERS[verdict.answer], f": {verdict.reason}")
        if report.proof is not None:
            out.say(f"  {_proof(report.proof)}")
        for finding in report.findings:
            console.say(f"  {finding}")
    raise typer.Exit(0 if report.verdict.survives and not report.errors else 1)


def _proof(proof: Proof) -> str:
    if proof.outcome == "not run here":
        return f"not run here: {proof.sentence}"
    aside = (
        ""
        if proof.whole or proof.outcome != "survive"
        else "; no input hides tokens, so that less was seen than the graph tells"
    )
    return f"run in ONNX Runtime ({proof.runs} times): gapped ids {proof.outcome}: {proof.sentence}{aside}"
