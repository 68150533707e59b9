"""`gap-export compare`: two evaluations, expression by expression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    AccuracyDropOption,
    AgreementOption,
    BoxIouOption,
    JsonOption,
    ProtocolOption,
)
from gap_export.terminal import styled

if TYPE_CHECKING:
    from gap_export.evaluation.refer.compare import Comparison


def compare(
    reference: Annotated[Path, typer.Argument(help="Folder of the reference run.")],
    subject: Annotated[
        Path, typer.Argument(help="Folder of the run to compare with it, over the same expressions.")
    ],
    protocol: ProtocolOption = "unc",
    max_accuracy_drop: AccuracyDropOption = None,
    min_prediction_agreement: AgreementOption = None,
    min_box_iou: BoxIouOption = None,
    worst: Annotated[
        int, typer.Option(**number(bounds.SHOWN), help="How many of the worst disagreements to list.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Two evaluations expression by expression; exit 1 when a gate is not met."""
    from gap_export.evaluation.refer.compare import compare as compared
    from gap_export.evaluation.refer.compare import thresholds_on
    from gap_export.evaluation.refer.results import check_pyarrow, open_run

    check_pyarrow()
    first, second = open_run(reference, protocol), open_run(subject, protocol)
    thresholds = thresholds_on(
        first,
        second,
        max_accuracy_drop=max_accuracy_drop,
        min_prediction_agreement=min_prediction_agreement,
        min_box_iou=min_box_iou,
    )
    result = compared(first, second, thresholds, worst=worst)
    if as_json:
        print_json(result.model_dump())
    else:
        _print_comparison(result)
    raise typer.Exit(0 if result.passed else 1)


def _print_comparison(result: Comparison) -> None:
    from rich.table import Table

    out.say(
        f"{result.expressions} expressions about {result.images} images, {result.protocol}: "
        f"accuracy {100 * result.reference_accuracy:.2f} -> {100 * result.subject_accuracy:.2f} % "
        f"({100 * result.difference:+.2f}, 95 % interval {100 * result.low:+.2f} to {100 * result.high:+.2f}); "
        f"{result.gained} gained, {result.lost} lost, McNemar p {result.mcnemar_p:.3g}",
    )
    gates = Table("gate", "measured", "required", "")
    for gate in result.gates:
        gates.add_row(
            gate.name,
            f"{gate.measured:.4f}",
            f"{gate.comparison} {gate.limit:g}",
            "ok" if gate.passed else styled(("no", "red")),
        )
    out.print(gates)
    if result.worst:
        table = Table("expression", "image", "IoU of both boxes", "reference", "subject")
        for each in result.worst:
            table.add_row(
                each.id,
                each.image,
                f"{each.iou:.3f}",
                *("hit" if hit else "miss" for hit in (each.reference_hits, each.subject_hits)),
            )
        out.print(table)
