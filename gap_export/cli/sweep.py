"""`gap-export sweep`: accuracy of many pruners at many keep ratios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import cluster_of, console, out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    LimitOption,
    PrecisionHintOption,
    ProviderOption,
    RayAddressOption,
    RayOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from gap_export.evaluation.sweep.record import Answers, SweepPoint


def sweep(
    model: Annotated[str, typer.Option(help="Recipe name, recipe file, checkpoint folder or hub id.")],
    pruners: Annotated[
        str, typer.Option(help="Pruners, separated by commas; all is every one of `gap-export models`.")
    ] = "all",
    keep: Annotated[
        str, typer.Option(help="Fractions of visual tokens kept, separated by commas.")
    ] = "0.5,0.25,0.11",
    positions: Annotated[
        str, typer.Option(help="Position policies, separated by commas.")
    ] = "shifted,permuted,gap",
    limit: LimitOption = 500,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the sweep; finished points in it are kept.")
    ] = Path("out/sweep"),
    backend: BackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    batch: Annotated[int, typer.Option(**number(bounds.BATCH), help="Images per call.")] = 16,
    threads: Annotated[
        int,
        typer.Option(
            **number(bounds.THREADS), help="ONNX Runtime threads of every process; 0 lets it choose."
        ),
    ] = 1,
    workers: Annotated[
        int,
        typer.Option(
            **number(bounds.WORKERS),
            help="Processes that points are dispatched to; results do not depend on it.",
        ),
    ] = 2,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    plot: Annotated[bool, typer.Option(help="Draw sweep.png (needs matplotlib).")] = True,
    replace: Annotated[
        bool, typer.Option(help="Discard a sweep with other settings in the output folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of many pruners at many keep ratios. Can be interrupted; rerun the same command to resume."""
    cluster = cluster_of(ray, workers, ray_address)
    from gap_export.environment import check_build_extra

    check_build_extra("gap-export sweep")
    from gap_export.evaluation.sweep.request import SweepRequest, keeps_from, positions_from, pruners_from
    from gap_export.evaluation.sweep.run import prepare, run
    from gap_export.evaluation.sweep.show import tables, verdict
    from gap_export.recipe.recipe import load_recipe

    request = SweepRequest(
        recipe=load_recipe(model),
        pruners=pruners_from(pruners),
        keeps=keeps_from(keep),
        positions=positions_from(positions),
        backend=runtime_of(backend, device, precision_hint, provider),
        limit=limit,
        batch=batch,
        threads=threads,
    )
    prepared = prepare(request, output, replace=replace, plot=plot)
    left = len(prepared.remaining())
    if left < len(prepared.points):
        console.say(f"{len(prepared.points) - left} of {len(prepared.points)} points are finished already")
    with progress_shown() as progress:

        def finished(point: SweepPoint, answers: Answers) -> None:
            if not console.is_terminal:  # no bar is shown there
                accuracy = sum(answers.hits) / limit
                console.say(f"{point.label}: {accuracy:.3f}; {progress.time_left()}")

        record = run(
            prepared, workers=workers, cluster=cluster, plot=plot, progress=progress, finished=finished
        )
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for table in tables(record):
        out.print(table)
    out.say(verdict(record))
    out.say(f"  stored in {output}")
