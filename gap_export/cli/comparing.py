"""Commands that compare evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli.app import console, out, print_json
from gap_export.cli.options import BackendOption, BundleArgument, JsonOption, ThreadsOption

if TYPE_CHECKING:
    from gap_export.evaluation.refer.compare import Comparison
    from gap_export.evaluation.refer.recommend import Recommendation

_WARMUP = 5


# Where they are left out: the recipe's where a bundle is held against PyTorch, otherwise those of NVIDIA's grounding checks.
AccuracyDropOption = Annotated[
    float | None, typer.Option(help="Largest loss of accuracy; the recipe's against PyTorch, else 0.05.")
]
AgreementOption = Annotated[
    float | None,
    typer.Option(
        help="Smallest fraction of expressions whose two boxes have an IoU of at least 0.5; 0.95 by default."
    ),
]
BoxIouOption = Annotated[
    float | None,
    typer.Option(help="Smallest mean IoU of the two boxes; the recipe's against PyTorch, else 0.90."),
]


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of the reference run.")],
    second: Annotated[
        Path, typer.Argument(help="Folder of the run to compare with it, over the same expressions.")
    ],
    protocol: Annotated[str, typer.Option(help="unc or lmms-eval.")] = "unc",
    max_accuracy_drop: AccuracyDropOption = None,
    min_prediction_agreement: AgreementOption = None,
    min_box_iou: BoxIouOption = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst disagreements to list.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Two evaluations expression by expression; exit 1 when a gate is not met."""
    from gap_export.evaluation.refer import tables
    from gap_export.evaluation.refer.compare import compare as compared
    from gap_export.evaluation.refer.compare import open_run, thresholds_on

    tables.check_pyarrow()
    one, other = open_run(first, protocol), open_run(second, protocol)
    thresholds = thresholds_on(
        one,
        other,
        max_accuracy_drop=max_accuracy_drop,
        min_prediction_agreement=min_prediction_agreement,
        min_box_iou=min_box_iou,
    )
    result = compared(one, other, thresholds, worst=worst)
    if as_json:
        print_json(result.model_dump())
    else:
        _print_comparison(result)
    raise typer.Exit(0 if result.passed else 1)


def _print_comparison(result: Comparison) -> None:
    from rich.table import Table

    out.print(
        f"{result.expressions} expressions about {result.images} images, {result.protocol}: "
        f"{100 * result.first_accuracy:.2f} -> {100 * result.second_accuracy:.2f} "
        f"({100 * result.difference:+.2f}, 95 % interval {100 * result.low:+.2f} to {100 * result.high:+.2f}); "
        f"{result.gained} gained, {result.lost} lost, McNemar p {result.mcnemar_p:.3g}",
        highlight=False,
        soft_wrap=True,
    )
    gates = Table("gate", "measured", "required", "")
    for gate in result.gates:
        gates.add_row(
            gate.name,
            f"{gate.measured:.4f}",
            f"{gate.comparison} {gate.limit:g}",
            "ok" if gate.passed else "[red]no[/]",
        )
    out.print(gates)
    if result.worst:
        table = Table("expression", "image", "IoU of both boxes", "first", "second")
        for each in result.worst:
            table.add_row(
                each.id,
                each.image,
                f"{each.iou:.3f}",
                *("hit" if hit else "miss" for hit in (each.first_hits, each.second_hits)),
            )
        out.print(table)


def recommend(
    bundle: BundleArgument,
    data: Annotated[str, typer.Option(help="As for `gap-export eval`.")] = "scenes:7",
    max_accuracy_drop: Annotated[
        float,
        typer.Option(help="Accuracy tolerance: the whole 95 % interval of the loss must lie within it."),
    ] = 0.02,
    keeps: Annotated[
        str,
        typer.Option(help="Fractions to try, separated by commas; losses are relative to the largest."),
    ] = "1.0,0.5,0.35,0.25,0.15,0.1",
    split: Annotated[str | None, typer.Option(help="As for `gap-export eval`.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    protocol: Annotated[str, typer.Option(help="unc or lmms-eval.")] = "unc",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N expressions.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests measured per fraction.")] = 30,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """The smallest keep ratio within the accuracy tolerance, and its speedup; exit 1 when there is none."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.cli.evaluating import EvalOptions, evaluate_bundle, store
    from gap_export.errors import InputError
    from gap_export.evaluation.bundle_reports import RECOMMENDATION
    from gap_export.evaluation.latency.candidate import candidate
    from gap_export.evaluation.latency.measure import measure
    from gap_export.evaluation.refer import tables
    from gap_export.evaluation.refer.compare import open_run
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.provenance import provenance_of
    from gap_export.evaluation.refer.recommend import recommend as recommended
    from gap_export.runtime.backends import open_session

    tables.check_pyarrow()
    try:
        shares = sorted({float(share) for share in keeps.split(",")}, reverse=True)
    except ValueError as error:
        raise InputError(
            "is not a list of fractions", subject=f"--keeps {keeps}", hint="for example 1.0,0.5,0.25"
        ) from error
    if len(shares) < 2:
        raise InputError(
            "is one fraction",
            subject=f"--keeps {keeps}",
            hint="give at least two: losses are relative to the largest",
        )
    dataset = open_dataset(data, split=split, images=images)
    runs = {}
    for share in shares:
        options = EvalOptions(split or "all", protocol, backend, share, limit, 8, True, threads)
        record, scored, folder = evaluate_bundle(bundle, dataset, options, None, False)
        store(record, scored, provenance_of(bundle, data, split, images), folder)
        runs[share] = open_run(folder, protocol)
    opened = open_bundle(bundle)
    session = open_session(opened, backend, threads=threads)
    candidates = [candidate(f"{share:g}", opened, session, keep=share) for share in shares]
    with console.status("measuring"):
        measured = measure(candidates, requests=requests, new_tokens=1, warmup=_WARMUP)
    times = {float(row.name): row.ttft_ms.p50 for row in measured.rows}
    result = recommended(runs, max_accuracy_drop, manifest_sha256=opened.manifest_sha256, ttft_ms=times)
    result.write(opened.reports / RECOMMENDATION)
    if as_json:
        print_json(result.model_dump())
    else:
        _print_recommendation(result)
    raise typer.Exit(0 if result.chosen is not None else 1)


def _print_recommendation(result: Recommendation) -> None:
    from rich.table import Table

    table = Table(
        "keep",
        "tokens",
        "accuracy",
        "loss",
        "95 % interval",
        "first token",
        "",
        title=f"{result.expressions} expressions, {result.protocol}",
    )
    for point in result.points:
        mark = (
            "[bold green]<- this one[/]"
            if point.keep == result.chosen
            else ""
            if point.inside
            else "[red]may lose more[/]"
        )
        table.add_row(
            f"{point.keep:g}",
            f"{point.mean_kept:.1f}",
            f"{100 * point.accuracy:.2f}",
            f"{0.0 - 100 * point.difference:.2f}",
            f"{0.0 - 100 * point.high:.2f} to {0.0 - 100 * point.low:.2f}",
            "-" if point.speedup is None else f"{point.speedup:.2f} times as fast",
            mark,
        )
    out.print(table)
    if result.chosen is None:
        out.print(
            f"no smaller share is sure to lose at most {100 * result.max_accuracy_drop:g} points; more expressions narrow the intervals",
            highlight=False,
            soft_wrap=True,
        )
