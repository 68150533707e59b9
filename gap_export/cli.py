"""The table of commands, the words on the screen, the exit codes.

0: fine. 1: a gate was not met. 2: the user can do something about it (message and hint, no traceback). Anything that shows
a traceback is a bug of ours. Heavy imports happen inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from gap_export import __version__
from gap_export.errors import GapExportError

app = typer.Typer(
    name="gap-export",
    help="Export pruned multimodal LLMs to ONNX and TensorRT with their position ids intact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

console = Console(stderr=True)
"""Words for people go to standard error; standard output carries results."""
out = Console(width=None if sys.stdout.isatty() else 140)

BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder made by `gap-export build`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record alone, as one line of JSON.")]
BackendOption = Annotated[str, typer.Option(help="onnxruntime, tensorrt-rtx or tensorrt.")]
KeepOption = Annotated[
    float | None,
    typer.Option(
        help="Fraction of visual tokens to keep, in bundles built with a range; their default when left out."
    ),
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="ONNX Runtime threads; 0 lets it choose.")]

_INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it."""


def main() -> NoReturn:
    """Entry point: run a command, turn errors of ours into a message and exit code 2."""
    try:
        # Outside standalone mode, typer gives the code of a raised Exit back, and for Ctrl-C the shell's.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except GapExportError as error:
        code = _report(error.stage, error.subject, error.message, error.hint)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.print(
            "[yellow]interrupted[/]: nothing half-written was left behind; run the same command again"
        )
        code = _INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # a click usage error knows how to show itself
            raise
        code = _report("usage", "command line", error.format_message(), "see gap-export --help")
    sys.exit(code)


def _report(stage: str, subject: str, message: str, hint: str) -> int:
    console.print(
        f"[bold red]{stage}[/]: {_plain(subject)}: {_plain(message)}", highlight=False, soft_wrap=True
    )
    console.print(f"  [cyan]hint[/]: {_plain(hint)}", highlight=False, soft_wrap=True)
    return 2


def _plain(text: str) -> str:
    """Square brackets in paths and node names are not markup."""
    return text.replace("[", r"\[")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def models(as_json: JsonOption = False) -> None:
    """Recipes, families, and what each needs."""
    from dataclasses import asdict

    from gap_export import prune, recipe
    from gap_export.families.overview import OVERVIEW
    from gap_export.grounding.boxes import CODECS

    recipes = [recipe.load_recipe(name) for name in recipe.known_recipes()]
    known = {r.name: OVERVIEW[r.family] for r in recipes if r.family in OVERVIEW}
    needed = {
        r.name: {
            part: getattr(r, part) for part in ("base", "vision_tower", "text_tower") if getattr(r, part)
        }
        for r in recipes
    }
    boxes = {
        name: f"{CODECS[each.box.codec].example} of the {each.box.frame.replace('_', ' ')}"
        for name, each in known.items()
    }
    if as_json:
        _print_json(
            {
                "recipes": [
                    {
                        "name": r.name,
                        "family": r.family,
                        "box_format": known[r.name].box.model_dump(),
                        "pruners": list(known[r.name].pruners),
                        "checkpoint": r.checkpoint,
                        "needs": needed[r.name],
                        "summary": r.summary,
                    }
                    for r in recipes
                ],
                "pruners": [asdict(row) for row in prune.STRATEGIES],
            }
        )
        return
    table = Table(
        "recipe", "family", "boxes", "checkpoint, and what lies beside it", "pruners that do not work"
    )
    for r in recipes:
        checkpoints = [r.checkpoint, *(f"{part}: {given}" for part, given in needed[r.name].items())]
        not_working = [name for name in prune.names() if name not in known[r.name].pruners]
        table.add_row(
            r.name, r.family, _plain(boxes[r.name]), "\n".join(checkpoints), ", ".join(not_working) or "-"
        )
    out.print(table)
    pruners = Table("pruner", "keeps", "needs", "prunes", "merges")
    for row in prune.STRATEGIES:
        pruners.add_row(row.name, row.summary, prune.needs(row), row.where, prune.merging(row))
    out.print(pruners)


@app.command()
def build(
    model: Annotated[str, typer.Option(help="Recipe name, recipe file, checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to make.")],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Fraction of visual tokens kept, in (0, 1]; a range such as 0.1:1.0, in which every request chooses; or adaptive."
        ),
    ] = None,
    keep_bound: Annotated[
        float | None, typer.Option(help="Most that --keep adaptive may keep of a picture, as a fraction.")
    ] = None,
    pruner: Annotated[str | None, typer.Option(help="Pruning strategy; see `gap-export models`.")] = None,
    prune_layers: Annotated[
        list[int] | None,
        typer.Option(
            help="Decoder layer before which tokens are dropped, for pruners that do so inside the decoder; repeatable."
        ),
    ] = None,
    positions: Annotated[str | None, typer.Option(help="gap (default), shifted or permuted.")] = None,
    merged_id: Annotated[
        str | None,
        typer.Option(help="Place of tokens merged from many: last_visual (default), max_kept or centroid."),
    ] = None,
    text_tower: Annotated[
        str | None,
        typer.Option(help="CLIP checkpoint (folder or hub id) for pruners that look at the expression."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="checkpoint (default), or random: of the published sizes, for latency work without a download."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model that the checkpoint is a delta over, or low-rank updates of (folder or hub id)."
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Vision tower of models published without theirs (folder, .pth file or hub id)."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="onnx, tensorrt-rtx or tensorrt; repeatable.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint folder or hub id instead of the recipe's.")
    ] = None,
    capacity: Annotated[int | None, typer.Option(help="Cache slots; by default just enough.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of strategies that draw at random.")] = None,
    self_contained: Annotated[bool, typer.Option(help="Copy weights instead of linking them.")] = False,
    replace: Annotated[bool, typer.Option(help="Replace another bundle in the output folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to bundle: graphs, then engines for every --target."""
    from gap_export import recipe as recipes

    recipe = recipes.load_recipe(model).replaced(
        keep=keep,
        keep_bound=keep_bound,
        pruner=pruner,
        prune_layers=prune_layers,
        text_tower=text_tower,
        weights=weights,
        base=base,
        vision_tower=vision_tower,
        positions=positions,
        merged_id=merged_id,
        precision=precision,
        targets=target,
        checkpoint=checkpoint,
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    pipeline = _pipeline()
    with _interruptible() as go_on, console.status("starting") as status:

        def show(words: str) -> None:
            go_on()
            status.update(f"{words} ...")

        built = pipeline.build(
            recipe,
            output,
            replace=replace,
            self_contained=self_contained,
            progress=show,
        )
    from gap_export.report import keeping

    manifest = built.bundle.manifest
    pruning = manifest.pruning
    if as_json:
        _print_json(
            {
                "bundle": str(output),
                "name": manifest.name,
                "family": manifest.family,
                "precision": manifest.precision,
                "pruner": pruning.pruner,
                "kept": pruning.left,
                "mean_kept": pruning.mean_kept,
                "counting": pruning.counting,
                "fewest": pruning.fewest,
                "most": pruning.most,
                "visual_tokens": manifest.model.visual_tokens,
                "positions": pruning.positions,
                "capacity": manifest.capacity,
                "graphs": sorted(manifest.graphs),
                "engines": {target: sorted(engines) for target, engines in manifest.engines.items()},
                "written_bytes": built.written_bytes,
            }
        )
        return
    out.print(
        f"[bold green]built[/] {output}: {manifest.name}, {manifest.precision}, {keeping(pruning, manifest.model.visual_tokens)} ({pruning.pruner}), "
        f"positions {pruning.positions}, cache {manifest.capacity} slots",
        highlight=False,
        soft_wrap=True,
    )
    for name, engines in manifest.engines.items():
        out.print(f"  {name} engines: {', '.join(engines)}", highlight=False)
    out.print(f"  {_size(built.written_bytes)} written besides linked weights", highlight=False)


@app.command()
def validate(
    bundle: BundleArgument,
    cases: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 500,
    keep: KeepOption = None,
    backend: BackendOption = "onnxruntime",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the reference, if they moved.")] = None,
    text_tower: Annotated[Path | None, typer.Option(help="The text tower's, if they moved.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 16,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Parity and grounding against PyTorch, with negative controls; exit 1 when a gate fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gap_export.bundle import open_bundle
    from gap_export.runtime.ground import backend_of

    pipeline = _pipeline()
    staged = bool(open_bundle(bundle).manifest.pruning.stages)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=pipeline.validation_work(cases, staged=staged))
        report = pipeline.validate(
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
        _print_json(json.loads(report.model_dump_json()))  # as stored: what is not a number is null
    else:
        from gap_export import report as page

        page.print_parity(report, out)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def run(
    bundle: BundleArgument,
    image: Annotated[Path, typer.Option(help="A picture.")],
    refer: Annotated[str, typer.Option(help="The referring expression: what to find.")],
    draw: Annotated[
        Path | None, typer.Option(help="Write the picture with the box and the kept patches.")
    ] = None,
    keep: KeepOption = None,
    backend: BackendOption = "onnxruntime",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find what an expression refers to in a picture."""
    from gap_export.bundle import open_bundle
    from gap_export.runtime.generate import refuse_overflow
    from gap_export.runtime.ground import Grounder, backend_of, open_session
    from gap_export.runtime.preprocess import load_image

    opened = open_bundle(bundle)
    manifest = opened.manifest
    picture = load_image(image)
    grounder = Grounder(opened)
    unknown = grounder.unknown_words(refer)
    session = open_session(opened, backend_of(backend), threads=threads)
    grounded = grounder.ground(session, [picture], [refer], keep=keep, max_new_tokens=max_new_tokens)
    refuse_overflow(grounded.generation, session.backend)
    answer = grounded.answers[0]
    if draw is not None:
        _draw(draw, picture, answer, manifest, refer, grounded.pictures)
    box = None if answer.box is None else [round(float(edge), 2) for edge in answer.box]
    if as_json:
        _print_json(
            {
                "box": box,
                "answer": answer.text,
                "ended": grounded.generation.ended[0],
                "kept": len(answer.kept_indices),
                "kept_indices": [int(index) for index in answer.kept_indices],
                "image_size": list(picture.size),
                "unknown_words": list(unknown),
                "backend": session.backend,
            }
        )
        return
    if not grounded.generation.ended[0]:
        console.print(f"[yellow]the answer was cut off[/] after {len(grounded.generation.tokens[0])} tokens")
    if unknown:
        console.print(f"[yellow]the model has no word for[/] {', '.join(unknown)}", highlight=False)
    size = f"{picture.width} x {picture.height}"
    shown = f"no box on the picture ({size})" if box is None else f"box {box} in pixels of {size}"
    out.print(f"{_plain(shown)}", highlight=False)
    out.print(f"  answer {_plain(answer.text)}, keep {len(answer.kept_indices)} of {int(grounded.pictures.visual_tokens[0])}", highlight=False)  # fmt: skip
    if draw is not None:
        out.print(f"  drawn to {draw}", highlight=False)


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="One bundle, or several to compare in one run.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests measured, per bundle.")] = 100,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generated per request; the shortest limit by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per request.")] = 1,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Time to first token, time per token and memory; several bundles take turns, so that their ratios hold."""
    from rich.progress import Progress

    from gap_export import bench as room
    from gap_export.artifact import write_atomically
    from gap_export.bench_record import tables
    from gap_export.bundle import open_bundle
    from gap_export.runtime.ground import backend_of, open_session

    runtime = backend_of(backend)
    opened = [open_bundle(folder) for folder in bundles]
    contenders = [
        room.contender(str(folder), bundle, open_session(bundle, runtime, threads=threads), batch=batch)
        for folder, bundle in zip(bundles, opened, strict=True)
    ]
    warmup = 10
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=warmup + requests)
        record = room.measure(
            contenders,
            requests=requests,
            new_tokens=new_tokens or min(bundle.manifest.max_new_tokens for bundle in opened),
            warmup=warmup,
            tick=lambda: bar.advance(task),
        )
    for bundle in opened:
        write_atomically(bundle.reports / "bench.json", record.model_dump_json(indent=2) + "\n")
    if as_json:
        _print_json(record.model_dump(mode="json"))
    else:
        for table in tables(record):
            out.print(table)


@app.command()
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
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 16,
    threads: Annotated[
        int, typer.Option(min=0, help="ONNX Runtime threads of every process; 0 lets it choose.")
    ] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that cells are dealt to; results do not depend on it.")
    ] = 2,
    plot: Annotated[bool, typer.Option(help="Draw sweep.png (needs matplotlib).")] = True,
    replace: Annotated[
        bool, typer.Option(help="Throw away a sweep of other settings in the output folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of every strategy at every count under every position policy; may be killed and goes on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    _pipeline()
    from gap_export import sweep as room
    from gap_export.recipe import load_recipe
    from gap_export.runtime.ground import backend_of
    from gap_export.sweep_record import tables, verdict

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

        record = room.run(prepared, jobs=jobs, plot=plot, notify=notify, finished=finished)
    if as_json:
        _print_json(record.model_dump(mode="json"))
        return
    for table in tables(record):
        out.print(table)
    out.print(verdict(record), highlight=False, soft_wrap=True)
    out.print(f"  stored in {_plain(str(output))}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    bundle: BundleArgument,
    verify: Annotated[bool, typer.Option(help="Hash large files too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is inside a bundle: ids, slots, ops, engines, sizes."""
    from gap_export import report as page
    from gap_export.bundle import open_bundle

    facts = page.bundle_facts(open_bundle(bundle, every_hash=verify))
    if as_json:
        _print_json(facts)
    else:
        page.print_bundle(facts, out)


@app.command()
def lint(
    graph: Annotated[Path, typer.Argument(help="An ONNX file, ours or another exporter's.")],
    own: Annotated[bool, typer.Option(help="Hold it to the contract of this project's bundles too.")] = False,
    kind: Annotated[str, typer.Option(help="decoder, vision, splice, embed or auto.")] = "auto",
    ids_input: Annotated[str, typer.Option(help="Name of the input with position ids.")] = "position_ids",
    as_json: JsonOption = False,
) -> None:
    """Would gapped position ids survive this graph? Exit 1 when they would not."""
    from gap_export.errors import InputError

    kinds = ("auto", "decoder", "vision", "splice", "embed")
    if kind not in kinds:
        raise InputError(
            "is not a kind of graph", subject=repr(kind), hint=f"choose one of {', '.join(kinds)}"
        )
    try:
        from gap_export.graph.lint import lint_graph
    except ImportError as error:
        raise _needs_build_extra(error) from error

    report = lint_graph(graph, profile=kind, own=own, ids_input=ids_input)  # type: ignore[arg-type]
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        verdict = report.verdict
        word = "[bold green]survive[/]" if verdict.survives else "[bold red]do not survive[/]"
        out.print(
            f"{_plain(report.subject)}: gapped ids {word}: {_plain(verdict.reason)}",
            highlight=False,
            soft_wrap=True,
        )
        for finding in report.findings:
            console.print(f"  {_plain(str(finding))}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if report.verdict.survives and not report.errors else 1)


def _draw(target: Path, picture: Any, answer: Any, manifest: Any, expression: str, pictures: Any) -> None:
    from gap_export.errors import InputError
    from gap_export.grounding.draw import draw

    image = draw(
        picture,
        answer.box,
        answer.kept_indices,
        manifest.model.grid if pictures.grids is None else tuple(pictures.grids[0].tolist()),
        manifest.preprocessing,
        visual_tokens=int(pictures.visual_tokens[0]),
        caption=expression,
    )
    try:
        image.save(target)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be written: {error}",
            subject=str(target),
            hint="use a .png or .jpg path in a folder that exists",
        ) from error


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends what runs inside, even where a library catches it and goes on: then when the function given is next called."""
    came = False

    def interrupt(*_: Any) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def go_on() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield go_on
    finally:
        signal.signal(signal.SIGINT, before)


def _pipeline() -> Any:
    try:
        from gap_export import pipeline
        from gap_export.graph import trace  # noqa: F401  (fails early where torch is missing)
    except ImportError as error:
        raise _needs_build_extra(error) from error
    return pipeline


def _needs_build_extra(error: ImportError) -> GapExportError:
    from gap_export.errors import EnvironmentLacks

    return EnvironmentLacks(
        "is needed for this command and not installed",
        subject=error.name or str(error),
        hint="pip install 'gap-export[build]'",
    )


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, allow_nan=False))


def _time_left(task: Any) -> str:
    """From the mean over the whole time: cells are traced, then answered, and the pace of the moment says nothing."""
    if not task.completed:
        return "time left unknown"
    seconds = task.elapsed * (task.total - task.completed) / task.completed
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
