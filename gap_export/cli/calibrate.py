"""`gap-export calibrate`: activation ranges for precisions whose activations have fixed scales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BundleArgument,
    DeviceOption,
    JsonOption,
    ProviderOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown


def calibrate(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, for `build --ranges`.")],
    limit: Annotated[int, typer.Option(**number(bounds.COUNT), help="Number of expressions.")] = 128,
    data: Annotated[
        str | None,
        typer.Option(help="Annotations to take them from, as for `eval`; generated scenes when left out."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Where the data set has several.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its images.")] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="[onnxruntime]", help="Runtime that runs the bundle; others do not tell ranges."
        ),
    ] = "onnxruntime",
    device: DeviceOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure activation ranges (amax), on a bundle in floats, for precisions whose activations have fixed scales."""
    import gap_export as gap
    from gap_export.errors import InputError
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.files import check_output_file
    from gap_export.recipe.ranges import is_ranges

    if data is None and (split is not None or images is not None):
        raise InputError(
            "belongs to a data set",
            subject="--split" if split is not None else "--images",
            hint="name one with --data, or leave it out to measure on generated scenes",
        )
    read = [bundle, *([] if data is None else [Path(data)])]
    check_output_file(output, inputs=read, closed=[bundle], ours=is_ranges, holds="activation ranges")
    ran = runtime_of(backend, device, None, provider, bundle)
    dataset = None if data is None else open_dataset(data, split=split, images=images)
    with progress_shown() as progress:
        found = gap.calibrate(
            bundle, limit=limit, dataset=dataset, backend=ran, threads=threads, progress=progress
        )
    found.write(output)
    if as_json:
        print_json(found.model_dump())
        return
    name, largest = max(found.largest.items(), key=lambda each: each[1])
    out.say(
        ("measured", "bold green"),
        f" {output}: {len(found.largest)} layers over {found.samples} expressions ({found.source}); "
        f"the largest activation is {largest:.4g}, read by {name}",
    )
