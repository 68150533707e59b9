"""`gap-export eval`: referring expression comprehension on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import cluster_of, console, list_skipped, out, print_json, warn_of_missing
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    AnyBackendOption,
    BoxFormatOption,
    DataOption,
    DeviceOption,
    ExpressionLimitOption,
    IgnoreExifOption,
    ImagesOption,
    JsonOption,
    KeepOption,
    PrecisionHintOption,
    ProtocolOption,
    ProviderOption,
    RayAddressOption,
    RayOption,
    ReplaceOption,
    RescaleBoxesOption,
    SkipBadRowsOption,
    SplitOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from gap_export.bundle.folder import Bundle
    from gap_export.evaluation.refer.dataset import Dataset
    from gap_export.evaluation.refer.run import EvalRecord


_PredictionsOption = Annotated[
    Path | None,
    typer.Option(help="Score answers from a file (JSON lines of id, answer) instead of a model's."),
]
_FamilyOption = Annotated[
    str | None,
    typer.Option(
        help="With --predictions: family whose box format and frame the answers have; see `gap-export models`."
    ),
]
_OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder of the results; by default beside the bundle, in BUNDLE.runs.",
    ),
]


def evaluate(
    data: DataOption,
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; none with --predictions.")] = None,
    split: SplitOption = None,
    images: ImagesOption = None,
    rescale_boxes: RescaleBoxesOption = False,
    ignore_exif: IgnoreExifOption = False,
    skip_bad_rows: SkipBadRowsOption = False,
    protocol: ProtocolOption = "unc",
    backend: AnyBackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    keep: KeepOption = None,
    limit: ExpressionLimitOption = None,
    rows: Annotated[
        int, typer.Option(**number(bounds.BATCH), help="Maximum number of expressions per call.")
    ] = 8,
    one_by_one: Annotated[
        bool, typer.Option(help="Run every prompt separately and in full; for comparison.")
    ] = False,
    predictions: _PredictionsOption = None,
    family: _FamilyOption = None,
    box_format: BoxFormatOption = None,
    output: _OutputOption = None,
    replace: ReplaceOption = False,
    ray: RayOption = False,
    workers: Annotated[
        int | None,
        typer.Option(**number(bounds.WORKERS), help="With --ray: workers of the cluster.", show_default="2"),
    ] = None,
    ray_address: RayAddressOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Referring expression comprehension on a data set. Can be interrupted; rerun the same command to resume."""
    from gap_export.errors import InputError
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.evaluate import (
        EvalOptions,
        check_output,
        evaluate_predictions,
        prepare,
        run,
    )
    from gap_export.evaluation.refer.journal import EVALUATION
    from gap_export.evaluation.refer.results import SCORED

    if (bundle is None) == (predictions is None):
        hint = "gap-export eval BUNDLE --data ..., or gap-export eval --predictions FILE --family llava --data ..."
        raise InputError("give one of them", subject="a bundle, or --predictions", hint=hint)
    _check_workers(workers, ray)
    check_output(output, EVALUATION if predictions is None else SCORED)
    dataset = open_dataset(
        data, split=split, images=images, ignore_exif=ignore_exif, skip_bad_rows=skip_bad_rows
    )
    list_skipped(dataset)
    folder = output
    if bundle is None:
        assert predictions is not None
        record = evaluate_predictions(
            predictions,
            dataset,
            family,
            protocol=protocol,
            limit=limit,
            rescale_boxes=rescale_boxes,
            box_format=box_format,
            out=output,
        )
    else:
        options = EvalOptions(
            protocol=protocol,
            backend=runtime_of(backend, device, precision_hint, provider, bundle),
            keep=keep,
            limit=limit,
            rows=rows,
            share=not one_by_one,
            threads=threads,
            rescale_boxes=rescale_boxes,
            box_format=box_format,
        )
        cluster = cluster_of(ray, workers or 2, ray_address)
        prepared = prepare(bundle, dataset, options, out=output, replace=replace)
        warn_of_missing(prepared.work)
        if options.share:
            _say_unshared(prepared.bundle)
        with progress_shown() as progress:
            finished = run(prepared, cluster=cluster, progress=progress)
        record, folder = finished.record, finished.folder
    _warn_of_scoring(record, protocol)
    if as_json:
        print_json(record.model_dump())
    else:
        _print(record, dataset, folder)


def _warn_of_scoring(record: EvalRecord, protocol: str) -> None:
    """What else than the answers decided about hits."""
    warnings: list[tuple[str, str]] = []
    if not record.boxes_are_read:
        warnings.append(
            (
                f"{protocol} does not read boxes as this family writes them",
                ": nearly all answers are misses under it",
            )
        )
    if record.rescaled_images:
        warnings.append(
            (
                f"the true boxes of {record.rescaled_images} images were scaled",
                " to the size of the image",
            )
        )
    if record.stretched_images:
        warnings.append(
            (
                f"{record.stretched_images} of these images have another shape than their annotations",
                ": the boxes are right where images were squashed, and wrong where they were cropped or padded",
            )
        )
    for warning, consequence in warnings:
        console.say((warning, "yellow"), consequence)


def _check_workers(workers: int | None, ray: bool) -> None:
    from gap_export.errors import InputError

    if workers is not None and not ray:
        raise InputError(
            "is of a Ray cluster: without one, images are answered in this process",
            subject=f"--workers {workers}",
            hint="add --ray",
        )


def _say_unshared(bundle: Bundle) -> None:
    """Once, why an evaluation takes longer than others."""
    from gap_export.runtime.grounder import Grounder

    why = Grounder(bundle).unshared_because
    if why is not None:
        console.say(f"every expression is answered whole: {why}")


def _print(record: EvalRecord, dataset: Dataset, folder: Path | None) -> None:
    from rich.table import Table

    table = Table(title=f"{dataset.name}, {record.split}: {record.description}")
    for name in (
        "accuracy, %",
        "95 % interval",
        "mean IoU",
        "expressions",
        "images",
        "without a box",
        "not scored",
        "skipped rows",
        "backend",
    ):
        table.add_column(name)
    table.add_row(
        f"{100 * record.accuracy:.2f}",
        f"{100 * record.low:.2f} to {100 * record.high:.2f}",
        f"{record.mean_iou:.4f}",
        str(record.expressions),
        str(record.images),
        str(record.unparsable),
        str(record.not_scored),
        str(record.skipped_rows),
        record.backend,
    )
    out.print(table)
    if folder is not None:
        out.say(f"  results in {folder}")
