"""`gap-export build`: checkpoint to bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gap_export import bounds
from gap_export.cli.app import out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import BoxFormatOption, JsonOption
from gap_export.cli.progress import progress_shown
from gap_export.precision import one_of
from gap_export.precision import precision as precision_row

if TYPE_CHECKING:
    from gap_export.pipeline.build import BuildResult

_WITH_RANGES = one_of(lambda row: row.needs_ranges)
_WITH_CALIBRATION = one_of(lambda row: row.takes_calibration)


ModelOption = Annotated[str, typer.Option(help="Recipe name, recipe file, checkpoint folder or hub id.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to make.")]
KeepOption = Annotated[
    str | None,
    typer.Option(
        help="Fraction of visual tokens kept, in (0, 1]; a range such as 0.1:1.0, in which every request chooses; or adaptive."
    ),
]
KeepBoundOption = Annotated[
    float | None,
    typer.Option(
        **number(bounds.FRACTION),
        help="Upper bound on the fraction of an image's tokens that --keep adaptive keeps.",
    ),
]
PrunerOption = Annotated[str | None, typer.Option(help="Pruner; see `gap-export models`.")]
PruneLayersOption = Annotated[
    list[int] | None,
    typer.Option(
        **number(bounds.LAYER),
        help="Decoder layer before which tokens are dropped, for pruners that do so inside the decoder; repeatable.",
    ),
]
PositionsOption = Annotated[str | None, typer.Option(help="gap (default), shifted or permuted.")]
MergedIdOption = Annotated[
    str | None,
    typer.Option(help="Position of tokens merged from several: last_visual (default), max_kept or centroid."),
]
TextTowerOption = Annotated[
    str | None,
    typer.Option(help="CLIP checkpoint (folder or hub id) for pruners that look at the expression."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="checkpoint (default), or random: published sizes with random weights, for latency work without a download."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Model that the checkpoint is a delta over, or low-rank updates of (folder or hub id)."
    ),
]
VisionTowerOption = Annotated[
    str | None,
    typer.Option(help="Vision tower of models published without theirs (folder, .pth file or hub id)."),
]
PrecisionOption = Annotated[str | None, typer.Option(help=f"{one_of()}.")]
RangesOption = Annotated[
    Path | None,
    typer.Option(help=f"Activation ranges (amax), for {_WITH_RANGES}; see `gap-export calibrate`."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        help=f"Prose in UTF-8, 512 tokens or more: compensates the rounding of weights (GPTQ), for {_WITH_CALIBRATION}."
    ),
]
TargetOption = Annotated[list[str] | None, typer.Option(help="onnx, tensorrt-rtx or tensorrt; repeatable.")]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Checkpoint folder or hub id instead of the recipe's.")
]
CapacityOption = Annotated[
    int | None,
    typer.Option(
        **number(bounds.SLOTS),
        help="Make the cache static, with this number of slots; by default it has as many as a request needs.",
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        **number(bounds.PIXELS),
        help="Scale larger images down, in models that take them at their own size; bounds the cache too.",
    ),
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option(**number(bounds.TOKENS), help="Maximum length of an answer, in tokens.")
]
MaxTextOption = Annotated[
    int | None,
    typer.Option(
        **number(bounds.TEXT),
        help="Maximum text tokens of a prompt, over all turns of a conversation.",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(**number(bounds.SEED), help="Seed of pruners that choose at random.")
]
SelfContainedOption = Annotated[bool, typer.Option(help="Copy weights instead of linking them.")]
GoldenOption = Annotated[
    bool,
    typer.Option(
        help="Store a golden request, which `serve` needs: made with PyTorch, where that fits into the memory that is free."
    ),
]
ReplaceOption = Annotated[bool, typer.Option(help="Replace another bundle in the output folder.")]


def build(
    model: ModelOption,
    output: OutputOption,
    keep: KeepOption = None,
    keep_bound: KeepBoundOption = None,
    pruner: PrunerOption = None,
    prune_layers: PruneLayersOption = None,
    positions: PositionsOption = None,
    merged_id: MergedIdOption = None,
    text_tower: TextTowerOption = None,
    weights: WeightsOption = None,
    base: BaseOption = None,
    vision_tower: VisionTowerOption = None,
    precision: PrecisionOption = None,
    ranges: RangesOption = None,
    calibration: CalibrationOption = None,
    target: TargetOption = None,
    checkpoint: CheckpointOption = None,
    capacity: CapacityOption = None,
    max_pixels: MaxPixelsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    max_text: MaxTextOption = None,
    box_format: BoxFormatOption = None,
    seed: SeedOption = None,
    self_contained: SelfContainedOption = False,
    golden: GoldenOption = True,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to bundle: graphs, then engines for every --target.

    Graphs that were traced before are taken from a cache, ~/.cache/gap-export/traces. The environment variable
    GAP_EXPORT_TRACE_CACHE names another folder, or switches it off with the value off.
    """
    from gap_export.environment import check_build_extra

    check_build_extra("gap-export build")
    from gap_export.pipeline.build import build as build_recipe
    from gap_export.recipe.recipe import Recipe

    recipe = Recipe.load(
        model,
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
        calibration=None if calibration is None else str(calibration.absolute()),
        targets=target,
        checkpoint=checkpoint,
        capacity=capacity,
        max_pixels=max_pixels,
        max_new_tokens=max_new_tokens,
        max_text=max_text,
        box_format=box_format,
        seed=seed,
    )
    with progress_shown() as progress:
        built = build_recipe(
            recipe,
            output,
            replace=replace,
            self_contained=self_contained,
            golden=golden,
            progress=progress,
        )
    if as_json:
        print_json(_facts(output, built))
    else:
        _print(output, built)


def _facts(output: Path, built: BuildResult) -> dict[str, Any]:
    from gap_export.evaluation.report.terminal import end_tokens

    manifest = built.bundle.manifest
    pruning = manifest.pruning
    return {
        "bundle": str(output),
        "name": manifest.name,
        "family": manifest.family,
        "precision": manifest.precision,
        "perplexity_rise": precision_row(manifest.precision).perplexity_rise,
        "pruner": pruning.pruner,
        "kept": pruning.kept_after_last_stage,
        "mean_kept": pruning.mean_kept,
        "keep_mode": pruning.keep_mode,
        "min_tokens": pruning.min_tokens,
        "max_tokens": pruning.max_tokens,
        "visual_tokens": manifest.spec.visual_tokens,
        "positions": pruning.positions,
        "capacity": manifest.capacity,
        "graphs": sorted(manifest.graphs),
        "graphs_from_cache": sorted(built.cached),
        "engines": {target: sorted(engines) for target, engines in manifest.engines.items()},
        "written_bytes": built.written_bytes,
        "notes": list(built.notes),
        "assumptions": list(built.assumptions),
        "prompts": list(built.prompts),
        "golden": built.golden,
        "end_tokens": end_tokens(built.bundle),
    }


def _print(output: Path, built: BuildResult) -> None:
    from gap_export.evaluation.report.terminal import cache_length, end_tokens, ends_in_words, keeping
    from gap_export.files import readable_size

    manifest = built.bundle.manifest
    pruning = manifest.pruning
    kept = f"{keeping(pruning, manifest.spec.visual_tokens)} ({pruning.pruner})"
    out.say(
        ("built", "bold green"),
        f" {output}: {manifest.name}, {manifest.precision}, {kept}, positions {pruning.positions}, {cache_length(manifest)}",
    )
    if manifest.precision != "fp32":
        out.say(
            f"  {manifest.precision}: {precision_row(manifest.precision).loss}; of this one it is measured by:"
        )
        out.say(f"  gap-export validate {output} --text FILE")
    ends = ends_in_words(end_tokens(built.bundle))
    for sentence in (*built.assumptions, *built.prompts, ends, built.golden):
        out.say(f"  {sentence}")
    for name, engines in manifest.engines.items():
        out.say(f"  {name} engines: {', '.join(engines)}")
    if built.cached:
        out.say(f"  from the trace cache: {', '.join(built.cached)}")
    out.say(f"  {readable_size(built.written_bytes)} written besides linked weights")
