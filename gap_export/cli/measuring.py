"""Commands that measure: against PyTorch, against the clock, over all strategies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gap_export.cli.app import (
    BackendOption,
    BundleArgument,
    EngineOption,
    JsonOption,
    KeepOption,
    RayAddressOption,
    ThreadsOption,
    WorkersOption,
    build_room,
    cluster_of,
    console,
    out,
    plain,
    print_json,
    progress_bar,
)


def validate(
    bundle: BundleArgument,
    cases: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 500,
    keep: KeepOption = None,
    backend: BackendOption = "onnxruntime",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the reference, if they moved.")] = None,
    text_tower: Annotated[Path | None, typer.Option(help="The text tower's, if they moved.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 16,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Parity and grounding against PyTorch, with negative controls; exit 1 when a gate fails."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.runtime.model import backend_of

    build_room()
    from gap_export.evaluation import validate

    staged = bool(open_bundle(bundle).manifest.pruning.stages)
    with progress_bar() as bar:
        task = bar.add_task("starting", total=validate.validation_work(cases, staged=staged))
        report = validate.validate(
            bundle,
            cases=cases,
            keep=keep,
            backend=backend_of(backend),
            checkpoint=checkpoint,
            text_tower=text_tower,
            batch=batch,
            threads=threads,
            progress=lambda words: bar.update(task, description=words),
            tick=lambda count: bar.advance(task, count),
        )
    if as_json:
        print_json(json.loads(report.model_dump_json()))  # as stored: what is not a number is null
    else:
        from gap_export.evaluation.report import terminal as page

        page.print_parity(report, out)
    raise typer.Exit(0 if report.ok else 1)


def sweep(
    model: Annotated[str, typer.Option(help="Recipe name, recipe file, checkpoint folder or hub id.")],
    pruners: Annotated[
        str, typer.Option(help="Strategies, separated by commas; all is every one of `gap-export models`.")
    ] = "all",
    keep: Annotated[
        str, typer.Option(help="Fractions of visual tokens kept, separated by commas.")
    ] = "0.5,0.25,0.11",
    positions: Annotated[
        str, typer.Option(help="Position policies, separated by commas.")
    ] = "shifted,permuted,gap",
    cases: Annotated[int, typer.Option(min=1, help="Held-out scenes per cell.")] = 500,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the sweep; finished cells in it are kept.")
    ] = Path("out/sweep"),
    backend: BackendOption = "onnxruntime",
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 16,
    threads: Annotated[
        int, typer.Option(min=0, help="ONNX Runtime threads of every process; 0 lets it choose.")
    ] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that cells are dealt to; results do not depend on it.")
    ] = 2,
    engine: EngineOption = "local",
    workers: WorkersOption = 2,
    ray_address: RayAddressOption = None,
    plot: Annotated[bool, typer.Option(help="Draw sweep.png (needs matplotlib).")] = True,
    replace: Annotated[
        bool, typer.Option(help="Throw away a sweep of other settings in the output folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of every strategy at every count under every position policy; may be killed and goes on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    cluster = cluster_of(engine, workers, ray_address)
    build_room()
    from gap_export.evaluation.sweep import run as room
    from gap_export.evaluation.sweep.record import tables, verdict
    from gap_export.recipe.recipe import load_recipe
    from gap_export.runtime.model import backend_of

    request = room.Request(
        recipe=load_recipe(model),
        pruners=room.pruners_from(pruners),
        keeps=room.keeps_from(keep),
        positions=room.positions_from(positions),
        backend=backend_of(backend),
        cases=cases,
        batch=batch,
        threads=threads,
    )
    prepared = room.prepare(request, output, replace=replace, plot=plot)
    left = len(prepared.remaining())
    if left < len(prepared.cells):
        console.print(f"{len(prepared.cells) - left} of {len(prepared.cells)} cells are finished already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        work = bar.add_task("starting", total=left * cases, left="")

        def notify(step: Any) -> None:
            bar.update(work, advance=step.done, description=step.words or None)
            bar.update(work, left=_time_left(bar.tasks[0]))

        def finished(cell: Any, answers: Any) -> None:
            if not console.is_terminal:  # no bar is shown there
                accuracy = sum(answers.hits) / cases
                console.print(f"{cell.label}: {accuracy:.3f}; {_time_left(bar.tasks[0])}", highlight=False)

        record = room.run(prepared, jobs=jobs, cluster=cluster, plot=plot, notify=notify, finished=finished)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for table in tables(record):
        out.print(table)
    out.print(verdict(record), highlight=False, soft_wrap=True)
    out.print(f"  stored in {plain(str(output))}", highlight=False, soft_wrap=True)


def _time_left(task: Any) -> str:
    """From the mean over the whole time: cells are traced, then answered, and the pace of the moment says nothing."""
    if not task.completed:
        return "time left unknown"
    seconds = task.elapsed * (task.total - task.completed) / task.completed
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
