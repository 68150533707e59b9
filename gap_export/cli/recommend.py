"""`gap-export recommend`: the smallest keep ratio within the accuracy tolerance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import list_skipped, out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    BundleArgument,
    DataOption,
    DeviceOption,
    ExpressionLimitOption,
    IgnoreExifOption,
    ImagesOption,
    JsonOption,
    PrecisionHintOption,
    ProtocolOption,
    ProviderOption,
    ReplaceOption,
    RescaleBoxesOption,
    SkipBadRowsOption,
    SplitOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown
from gap_export.terminal import styled

if TYPE_CHECKING:
    from gap_export.evaluation.refer.recommend import Recommendation


def recommend(
    bundle: BundleArgument,
    data: DataOption = "scenes:7",
    max_accuracy_drop: Annotated[
        float,
        typer.Option(
            **number(bounds.SHARE),
            help="Accuracy tolerance: the whole 95 % interval of the loss must lie within it.",
        ),
    ] = 0.02,
    keep: Annotated[
        str,
        typer.Option(help="Fractions to try, separated by commas; losses are relative to the largest."),
    ] = "1.0,0.5,0.35,0.25,0.15,0.1",
    split: SplitOption = None,
    images: ImagesOption = None,
    rescale_boxes: RescaleBoxesOption = False,
    ignore_exif: IgnoreExifOption = False,
    skip_bad_rows: SkipBadRowsOption = False,
    protocol: ProtocolOption = "unc",
    limit: ExpressionLimitOption = None,
    requests: Annotated[
        int, typer.Option(**number(bounds.REQUESTS), help="Requests measured per fraction.")
    ] = 30,
    backend: BackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = 0,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The smallest keep ratio within the accuracy tolerance, and its speedup; exit 1 when there is none."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.recommend import recommend as recommended
    from gap_export.evaluation.text_parity import loss_of

    dataset = open_dataset(
        data, split=split, images=images, ignore_exif=ignore_exif, skip_bad_rows=skip_bad_rows
    )
    list_skipped(dataset)
    with progress_shown() as progress:
        result = recommended(
            bundle,
            dataset,
            keeps=bounds.several(keep, bounds.FRACTION, "--keep"),
            max_accuracy_drop=max_accuracy_drop,
            protocol=protocol,
            limit=limit,
            requests=requests,
            backend=runtime_of(backend, device, precision_hint, provider, bundle),
            threads=threads,
            rescale_boxes=rescale_boxes,
            replace=replace,
            progress=progress,
        )
    if as_json:
        print_json(result.model_dump())
    else:
        _print_recommendation(result)
        opened = open_bundle(bundle)
        if opened.manifest.precision != "fp32":
            out.say(f"losses are those of pruning; {opened.manifest.precision} itself: {loss_of(opened)}")
    raise typer.Exit(0 if result.chosen is not None else 1)


def _print_recommendation(result: Recommendation) -> None:
    from rich.table import Table

    table = Table(
        "keep",
        "tokens",
        "accuracy, %",
        "loss, points",
        "95 % interval",
        "first token",
        "",
        title=f"{result.expressions} expressions, {result.protocol}",
    )
    for point in result.points:
        mark = (
            styled(("<- this one", "bold green"))
            if point.keep == result.chosen
            else ""
            if point.inside
            else styled(("may lose more", "red"))
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
        out.say(
            f"no smaller keep ratio is sure to lose at most {100 * result.max_accuracy_drop:g} points; more expressions narrow the intervals"
        )
