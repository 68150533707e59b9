"""The command that measures latency."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gap_export.cli.app import console, out, plain, print_json, progress_bar
from gap_export.cli.options import JsonOption, ThreadsOption
from gap_export.runtime.backends import names

if TYPE_CHECKING:
    from gap_export.bundle.folder import Bundle
    from gap_export.evaluation.latency.measure import Contender
    from gap_export.evaluation.latency.record import BenchRecord

_WARMUP = 10


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="One bundle, or several to compare in one run.")],
    backend: Annotated[
        str, typer.Option(help=f"One or several, separated by commas: {', '.join(names())}.")
    ] = "onnxruntime",
    against: Annotated[
        str, typer.Option(help="Further backends to take turns with, for example torch.")
    ] = "",
    keep: Annotated[
        str,
        typer.Option(help="Fractions of visual tokens, separated by commas, in bundles built with a range."),
    ] = "",
    batch: Annotated[str, typer.Option(help="Images per request; several, separated by commas.")] = "1",
    requests: Annotated[int, typer.Option(min=1, help="Requests measured, per contender.")] = 100,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generated per request; the shortest limit by default.")
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Measure the memory of each contender in a process of its own.")
    ] = True,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """What a request costs and how long it takes, part by part; all contenders take turns, so that their ratios hold."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.evaluation.latency.cost import measure_device
    from gap_export.evaluation.latency.measure import measure
    from gap_export.evaluation.latency.memory import peak_of
    from gap_export.runtime.backends import open_session

    wanted = _contenders(bundles, _words(f"{backend},{against}"), _fractions(keep), _counts(batch))
    opened = {folder: open_bundle(folder) for folder in bundles}
    with console.status("measuring what this machine can do"):
        roofline = measure_device(threads)
    sessions = {
        (one.folder, one.backend): open_session(opened[one.folder], one.backend, threads=threads)
        for one in wanted
    }
    contenders = [_contender(one, opened[one.folder], sessions[one.folder, one.backend]) for one in wanted]
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=_WARMUP + requests)
        record = measure(
            contenders,
            requests=requests,
            new_tokens=new_tokens or min(bundle.manifest.max_new_tokens for bundle in opened.values()),
            warmup=_WARMUP,
            roofline=roofline,
            tick=lambda: bar.advance(task),
        )
    del contenders, sessions
    if memory:
        with progress_bar() as bar:
            task = bar.add_task("memory, one by one", total=len(wanted))
            rows = []
            for row, one in zip(record.rows, wanted, strict=True):
                rows.append(row.model_copy(update={"peak_rss_bytes": peak_of(partial(alone, one, threads))}))
                bar.advance(task)
        record = record.model_copy(update={"rows": tuple(rows)})
    _store(record, list(opened.values()))
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        _print(record)


class Wanted(NamedTuple):
    """One contender."""

    name: str
    folder: Path
    backend: str
    keep: float | None
    batch: int


def alone(one: Wanted, threads: int) -> Contender:
    """A contender in a process that holds nothing else."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.runtime.backends import open_session

    bundle = open_bundle(one.folder)
    return _contender(one, bundle, open_session(bundle, one.backend, threads=threads))


def _contender(one: Wanted, bundle: Bundle, session: Any) -> Contender:
    from gap_export.evaluation.latency.measure import contender

    return contender(one.name, bundle, session, batch=one.batch, keep=one.keep)


def _contenders(
    folders: Sequence[Path],
    backends: Sequence[str],
    keeps: Sequence[float | None],
    batches: Sequence[int],
) -> list[Wanted]:
    """Every combination, named by what it differs in from others."""
    wanted = []
    for folder in folders:
        for backend in backends:
            for keep in keeps:
                for batch in batches:
                    name = [str(folder)]
                    name += [backend] if len(backends) > 1 else []
                    name += [] if keep is None else [f"keep {keep:g}"]
                    name += [f"batch {batch}"] if len(batches) > 1 else []
                    wanted.append(Wanted(" ".join(name), folder, backend, keep, batch))
    return wanted


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _fractions(text: str) -> list[float | None]:
    from gap_export.errors import InputError

    try:
        return [float(word) for word in _words(text)] or [None]
    except ValueError as error:
        raise InputError(
            "is not a list of fractions", subject=f"--keep {text}", hint="for example 1.0,0.5,0.25"
        ) from error


def _counts(text: str) -> list[int]:
    from gap_export.errors import InputError

    words = _words(text)
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise InputError("is not a list of counts", subject=f"--batch {text}", hint="for example 1,4")
    return [int(word) for word in words]


def _store(record: BenchRecord, bundles: Sequence[Bundle]) -> None:
    from gap_export.files import write_atomically

    for bundle in bundles:
        record.write(bundle.reports / "bench.json")
    try:
        from gap_export.evaluation.latency.plot import png

        image = png(record)
    except ImportError as error:
        console.print(f"no plot is drawn: {error.name} is not installed (pip install 'gap-export[report]')")
        return
    for bundle in bundles:
        write_atomically(bundle.reports / "bench.png", image)


def _print(record: BenchRecord) -> None:
    from gap_export.evaluation.latency.record import tables

    for table in tables(record):
        out.print(table)
    for row in record.rows:
        per_second = 1e3 / row.total_ms.p50 if row.total_ms.p50 else 0.0
        tokens = row.batch * 1e3 / row.tpot_ms.p50 if row.tpot_ms.p50 else 0.0
        out.print(
            f"{plain(row.name)}: {row.batch * per_second:.2f} requests/s, {tokens:.1f} tokens/s while decoding",
            highlight=False,
            soft_wrap=True,
        )
