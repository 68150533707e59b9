"""Latency of bundles as one call: candidates are opened, measured in interleaved rounds, and measured for memory in isolated processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gap_export import bounds
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.environment import peak_rss_bytes
from gap_export.errors import MissingRequirementError
from gap_export.evaluation import plotting
from gap_export.evaluation.bundle_reports import BENCH, BENCH_PLOT, check_reports_can_be_written
from gap_export.evaluation.latency.candidate import Candidate, candidate
from gap_export.evaluation.latency.cost import measure_device
from gap_export.evaluation.latency.measure import measure, time_request
from gap_export.evaluation.latency.record import BenchRecord
from gap_export.evaluation.latency.show import figure
from gap_export.files import write_atomically
from gap_export.progress import SILENT, Progress
from gap_export.runtime.backends import open_session
from gap_export.runtime.backends import row as backend_row
from gap_export.runtime.session import Session

_WARMUP = 10
_MEMORY_TOKENS = 4


@dataclass(frozen=True)
class CandidateSpec:
    """What a candidate is made of; can be sent to another process.

    Attributes:
        name: unique in a run.
        folder: of the bundle.
        backend: runtime, or `torch`.
        keep: fraction of the visual tokens to keep; the bundle's own when left out.
        batch: images per request.
    """

    name: str
    folder: Path
    backend: str
    keep: float | None
    batch: int


def bench(
    bundles: Bundle | Path | str | Sequence[Bundle | Path | str],
    *,
    backends: Sequence[str] = ("onnxruntime",),
    keeps: Sequence[float | None] = (None,),
    batches: Sequence[int] = (1,),
    requests: int = 100,
    new_tokens: int | None = None,
    memory: bool = True,
    threads: int = 0,
    progress: Progress = SILENT,
) -> BenchRecord:
    """Latency and cost of a request, part by part. Candidates are measured in interleaved rounds, so that their ratios hold.

    Args:
        bundles: one, or several to compare in one run.
        backends: runtimes, or `torch`.
        keeps: fractions of the visual tokens, in bundles that let requests choose; None for the bundle's own.
        batches: images per request.
        requests: rounds measured.
        new_tokens: generated per request; the shortest limit of the bundles when left out.
        memory: measure the memory of each candidate in a process of its own.
        threads: of ONNX Runtime and PyTorch; 0 lets them choose.
        progress: told of every round.

    Returns:
        The record, which also lies in the reports of every bundle, with a plot where matplotlib is installed.

    Raises:
        GapExportError: a bundle cannot be opened, or not be asked in that way.
    """
    bounds.check(requests=requests, new_tokens=new_tokens, threads=threads)
    for batch in batches:
        bounds.check(batch=batch)
    for backend in backends:
        backend_row(backend)  # an unknown one is refused before the machine is measured
    given = [bundles] if isinstance(bundles, Bundle | Path | str) else bundles
    opened = [open_bundle(each) for each in given]
    for bundle in opened:
        check_reports_can_be_written(bundle, BENCH, BENCH_PLOT)
    specs = candidate_specs([bundle.folder for bundle in opened], backends, keeps, batches)
    progress.stage("measuring what this machine can do")
    roofline = measure_device(threads)
    with ExitStack() as stack:
        record = measure(
            _open_candidates(specs, opened, threads, stack),
            requests=requests,
            new_tokens=new_tokens or min(bundle.manifest.max_new_tokens for bundle in opened),
            warmup=_WARMUP,
            roofline=roofline,
            progress=progress,
        )
    builds = {bundle.folder: bundle.manifest_sha256 for bundle in opened}
    rows_of_builds = tuple(
        row.model_copy(update={"manifest_sha256": builds[spec.folder]})
        for row, spec in zip(record.rows, specs, strict=True)
    )
    record = record.model_copy(update={"rows": rows_of_builds})
    if memory:
        progress.stage("memory, one by one", total=len(specs))
        rows = []
        for row, spec in zip(record.rows, specs, strict=True):
            rows.append(
                row.model_copy(update={"peak_rss_bytes": peak_of(partial(open_candidate, spec, threads))})
            )
            progress.advance()
        record = record.model_copy(update={"rows": tuple(rows)})
    return _store(record, opened)


def candidate_specs(
    folders: Sequence[Path],
    backends: Sequence[str],
    keeps: Sequence[float | None],
    batches: Sequence[int],
) -> list[CandidateSpec]:
    """Every combination, named by what it differs in from others."""
    specs = []
    for folder in folders:
        for backend in backends:
            for keep in keeps:
                for batch in batches:
                    name = [str(folder)]
                    name += [backend] if len(backends) > 1 else []
                    name += [] if keep is None else [f"keep {keep:g}"]
                    name += [f"batch {batch}"] if len(batches) > 1 else []
                    specs.append(CandidateSpec(" ".join(name), folder, backend, keep, batch))
    return specs


def _open_candidates(
    specs: Sequence[CandidateSpec], bundles: Sequence[Bundle], threads: int, stack: ExitStack
) -> list[Candidate]:
    """Every bundle is loaded once per backend."""
    by_folder = {bundle.folder: bundle for bundle in bundles}
    loaded: dict[tuple[Path, str], Session] = {}
    candidates = []
    for spec in specs:
        key = spec.folder, spec.backend
        if key not in loaded:
            session = open_session(by_folder[spec.folder], spec.backend, threads=threads)
            loaded[key] = stack.enter_context(session)
        candidates.append(
            candidate(spec.name, by_folder[spec.folder], loaded[key], batch=spec.batch, keep=spec.keep)
        )
    return candidates


def open_candidate(spec: CandidateSpec, threads: int) -> Candidate:
    """A candidate by itself."""
    bundle = open_bundle(spec.folder)
    session = open_session(bundle, spec.backend, threads=threads)
    return candidate(spec.name, bundle, session, batch=spec.batch, keep=spec.keep)


def peak_of(make_candidate: Callable[[], Candidate]) -> int | None:
    """Largest resident memory of a process that opens a bundle and answers one request, bytes; None where that is not known.

    Args:
        make_candidate: can be pickled.

    Raises:
        GapExportError: the bundle cannot be opened or asked.
        MissingRequirementError: the process was killed, most probably for its memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        try:
            return child.submit(_peak, make_candidate).result()
        except BrokenProcessPool as error:
            raise MissingRequirementError(
                "was killed while its memory was measured",
                subject="a process",
                hint="it may need more memory than there is; --no-memory leaves this out",
            ) from error


def _peak(make_candidate: Callable[[], Candidate]) -> int | None:
    each = make_candidate()
    time_request(each, min(_MEMORY_TOKENS, each.bundle.manifest.max_new_tokens))
    return peak_rss_bytes()


def _store(record: BenchRecord, bundles: Sequence[Bundle]) -> BenchRecord:
    """Every bundle gets a copy that names it; the first one's is given back."""
    plot = plotting.png(figure(record)) if plotting.available() else None
    copies = [record.model_copy(update={"manifest_sha256": bundle.manifest_sha256}) for bundle in bundles]
    for bundle, copy in zip(bundles, copies, strict=True):
        copy.write(bundle.reports / BENCH)
        if plot is not None:
            write_atomically(bundle.reports / BENCH_PLOT, plot)
    return copies[0]
