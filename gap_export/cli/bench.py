"""`gap-export bench`: latency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console, out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    DeviceOption,
    JsonOption,
    PrecisionHintOption,
    ProviderOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown
from gap_export.runtime.backends import names
from gap_export.runtime.providers import split_outside_braces

if TYPE_CHECKING:
    from gap_export.evaluation.latency.record import BenchRecord


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="One bundle, or several to compare in one run.")],
    backend: Annotated[
        str, typer.Option(help=f"One or several, separated by commas: {', '.join(names())}.")
    ] = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    against: Annotated[str, typer.Option(help="Further backends to compare with, for example torch.")] = "",
    keep: Annotated[
        str,
        typer.Option(
            help="Fractions of visual tokens to keep, separated by commas, in bundles built with a range."
        ),
    ] = "",
    batch: Annotated[str, typer.Option(help="Images per request; several, separated by commas.")] = "1",
    requests: Annotated[
        int, typer.Option(**number(bounds.REQUESTS), help="Requests measured, per candidate.")
    ] = 100,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            **number(bounds.TOKENS),
            help="Tokens generated per request; by default the bundles' lowest limit.",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, each candidate in an isolated process.")
    ] = True,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Latency and cost of a request, part by part; candidates are measured in interleaved rounds."""
    from gap_export.evaluation import plotting
    from gap_export.evaluation.latency.bench import bench as measured

    chosen = [runtime_of(each, device, precision_hint, provider) for each in _words(backend)]
    with progress_shown() as progress:
        record = measured(
            bundles,
            backends=list(dict.fromkeys([*chosen, *_words(against)])),
            keeps=bounds.several(keep, bounds.FRACTION, "--keep") if keep else [None],
            batches=[int(each) for each in bounds.several(batch, bounds.BATCH, "--batch")],
            requests=requests,
            new_tokens=new_tokens,
            memory=memory,
            threads=threads,
            progress=progress,
        )
    if not plotting.available():
        console.say("no plot is drawn: matplotlib is not installed (pip install 'gap-export[report]')")
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        _print(record)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in split_outside_braces(text, ",") if word.strip()))


def _print(record: BenchRecord) -> None:
    from gap_export.evaluation.latency.show import tables

    for table in tables(record):
        out.print(table)
    for row in record.rows:
        per_second = 1e3 / row.total_ms.p50 if row.total_ms.p50 else 0.0
        tokens = row.batch * 1e3 / row.tpot_ms.p50 if row.tpot_ms.p50 else 0.0
        out.say(f"{row.name}: {row.batch * per_second:.2f} requests/s, {tokens:.1f} tokens/s while decoding")
