"""Which share of the visual tokens to keep: the smallest whose loss of accuracy is known to be small enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gap_export import bounds
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import InputError
from gap_export.evaluation.bundle_reports import RECOMMENDATION, check_reports_can_be_written
from gap_export.evaluation.latency.candidate import candidate
from gap_export.evaluation.recommend.choose import choose
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.recommend.times import first_token_ms
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.evaluation.refer.evaluate import evaluate
from gap_export.progress import SILENT, Prefixed, Progress
from gap_export.runtime.backends import open_session

KEEPS = (1.0, 0.5, 0.35, 0.25, 0.15, 0.1)
"""Shares that are tried where nothing else is said."""


def recommend(
    bundle: Bundle | Path | str,
    dataset: Dataset | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    max_accuracy_drop: float = 0.02,
    protocol: str = "unc",
    limit: int | None = None,
    requests: int = 30,
    backend: str = "onnxruntime",
    threads: int = 0,
    rescale_boxes: bool = False,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Recommendation:
    """The smallest share of visual tokens within the accuracy tolerance, and how much sooner its first token comes.

    The bundle is evaluated at every share (these evaluations lie beside it and are kept), then all shares answer in turn.

    Args:
        bundle: built with a range of shares.
        dataset: 2000 generated scenes with seven expressions each when left out.
        keeps: fractions of the visual tokens, at least two; losses are against the largest.
        max_accuracy_drop: loss that is allowed, with all of its 95 % interval.
        protocol: under which answers are scored.
        limit: only so many expressions.
        requests: per share, whose time is measured.
        backend: runtime.
        threads: of ONNX Runtime; 0 lets it choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations; refused otherwise.
        replace: throw evaluations of other settings away, for example those of another build.
        progress: told of every answer and every round.

    Returns:
        What was tried and which of it to take, also stored among the reports of the bundle.

    Raises:
        InputError: fewer than two shares, one that the bundle was not built for, or a data set without images.
        GapExportError: the bundle could not be asked.
    """
    bounds.check(max_accuracy_drop=max_accuracy_drop, limit=limit, requests=requests, threads=threads)
    shares = sorted(set(keeps), reverse=True)
    if len(shares) < 2:
        raise InputError(
            "is one fraction",
            subject=f"keep {', '.join(f'{share:g}' for share in shares)}",
            hint="give at least two: losses are against the largest",
        )
    opened = open_bundle(bundle)
    check_reports_can_be_written(opened, RECOMMENDATION)
    asked = dataset or open_dataset("scenes:7")
    asking = len(asked.expressions[:limit])
    progress.stage("evaluating", total=len(shares) * asking)
    runs = {
        share: evaluate(
            opened,
            asked,
            protocol=protocol,
            backend=backend,
            keep=share,
            limit=limit,
            threads=threads,
            rescale_boxes=rescale_boxes,
            replace=replace,
            progress=Prefixed(progress, f"keep {share:g}"),
        )
        for share in shares
    }
    with open_session(opened, backend, threads=threads) as session:
        candidates = [candidate(f"{share:g}", opened, session, keep=share) for share in shares]
        named = first_token_ms(candidates, requests=requests, progress=progress)
    times = {float(name): median for name, median in named.items()}
    found = choose(runs, max_accuracy_drop, manifest_sha256=opened.manifest_sha256, ttft_ms=times)
    found.write(opened.reports / RECOMMENDATION)
    return found
