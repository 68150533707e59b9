"""Commands before there is a bundle: what can be built, and building it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from gap_export.cli.app import (
    BundleArgument,
    JsonOption,
    ThreadsOption,
    build_room,
    console,
    interruptible,
    out,
    plain,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from gap_export.boxes.codecs import BoxCodec


def models(as_json: JsonOption = False) -> None:
    """Recipes, families, and what each needs."""
    from dataclasses import asdict

    from gap_export import families, prune
    from gap_export.boxes.codecs import CODECS
    from gap_export.recipe import recipe

    recipes = [recipe.load_recipe(name) for name in recipe.known_recipes()]
    known = {r.name: families.row(r.family) for r in recipes if r.family in families.names()}
    needed = {
        r.name: {
            part: getattr(r, part) for part in ("base", "vision_tower", "text_tower") if getattr(r, part)
        }
        for r in recipes
    }
    boxes = {name: _boxes(CODECS[each.box.codec], each.box.frame) for name, each in known.items()}
    if as_json:
        print_json(
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
        "recipe",
        "family",
        Column("boxes", overflow="fold"),
        Column("checkpoint, and what lies beside it", overflow="fold"),
        "pruners that do not work",
    )
    for r in recipes:
        checkpoints = [r.checkpoint, *(f"{part}: {given}" for part, given in needed[r.name].items())]
        not_working = [name for name in prune.names() if name not in known[r.name].pruners]
        table.add_row(
            r.name, r.family, plain(boxes[r.name]), "\n".join(checkpoints), ", ".join(not_working) or "-"
        )
    out.print(table)
    pruners = Table("pruner", "keeps", "needs", "prunes", "merges")
    for row in prune.STRATEGIES:
        pruners.add_row(row.name, row.summary, prune.needs(row), row.where, prune.merging(row))
    out.print(pruners)


def _boxes(codec: BoxCodec, frame: str) -> str:
    """How a box is written, and of what."""
    if codec.unit is None:
        return f"{codec.example} in pixels of the {frame} as scaled, here to 640x480"
    return f"{codec.example} of the {frame.replace('_', ' ')}"


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
        float | None, typer.Option(help="Most that --keep adaptive may keep of an image, as a fraction.")
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
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, int8, int4, int4-fp16, fp8 or nvfp4.")
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(help="How large activations get, for fp8 and nvfp4; see `gap-export calibrate`."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="onnx, tensorrt-rtx or tensorrt; repeatable.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint folder or hub id instead of the recipe's.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            help="Make the cache static, with so many slots; by default as many as a request needs."
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Scale larger images down, in models that take them at their own size; sets the cache too."
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of strategies that draw at random.")] = None,
    self_contained: Annotated[bool, typer.Option(help="Copy weights instead of linking them.")] = False,
    replace: Annotated[bool, typer.Option(help="Replace another bundle in the output folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to bundle: graphs, then engines for every --target."""
    from gap_export.recipe import recipe as recipes

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
        ranges=None if ranges is None else str(ranges.absolute()),
        targets=target,
        checkpoint=checkpoint,
        capacity=capacity,
        max_pixels=max_pixels,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    pipeline = build_room()
    with interruptible() as go_on, console.status("starting") as status:

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
    from gap_export.evaluation.report.terminal import cache_length, keeping

    manifest = built.bundle.manifest
    pruning = manifest.pruning
    if as_json:
        print_json(
            {
                "bundle": str(output),
                "name": manifest.name,
                "family": manifest.family,
                "precision": manifest.precision,
                "pruner": pruning.pruner,
                "kept": pruning.kept_after_last_stage,
                "mean_kept": pruning.mean_kept,
                "keep_mode": pruning.keep_mode,
                "min_tokens": pruning.min_tokens,
                "max_tokens": pruning.max_tokens,
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
        f"positions {pruning.positions}, {cache_length(manifest)}",
        highlight=False,
        soft_wrap=True,
    )
    for name, engines in manifest.engines.items():
        out.print(f"  {name} engines: {', '.join(engines)}", highlight=False)
    out.print(f"  {_size(built.written_bytes)} written besides linked weights", highlight=False)


def calibrate(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, for `build --ranges`.")],
    samples: Annotated[int, typer.Option(min=1, help="Questions to answer.")] = 128,
    data: Annotated[
        str | None,
        typer.Option(help="Annotations to take them from, as for `eval`; generated scenes when left out."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Where the data set has several.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its images.")] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """How large a model's activations get, measured on an fp32 or fp16 bundle: what fp8 and nvfp4 need."""
    from gap_export.errors import InputError
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.files import write_atomically

    build_room()
    from gap_export.evaluation import calibrate

    if data is None and (split is not None or images is not None):
        raise InputError(
            "belongs to a data set",
            subject="--split" if split is not None else "--images",
            hint="name one with --data, or leave it out to measure on generated scenes",
        )
    dataset = None if data is None else open_dataset(data, split=split, images=images)
    with progress_bar() as bar:
        task = bar.add_task("answering", total=samples)
        found = calibrate.calibrate(
            bundle,
            samples=samples,
            dataset=dataset,
            threads=threads,
            tick=lambda count: bar.advance(task, count),
        )
    write_atomically(output, found.model_dump_json(indent=2) + "\n")
    if as_json:
        print_json(found.model_dump())
        return
    name, largest = max(found.largest.items(), key=lambda each: each[1])
    out.print(
        f"[bold green]measured[/] {output}: {len(found.largest)} layers over {found.samples} questions ({plain(found.source)}); "
        f"the largest activation is {largest:.4g}, read by {name}",
        highlight=False,
        soft_wrap=True,
    )


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
