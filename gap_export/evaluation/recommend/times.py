"""Time to the first token of candidates that answer in turn, so that ratios hold."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.evaluation.latency.candidate import Candidate
from gap_export.evaluation.latency.measure import measure
from gap_export.progress import SILENT, Progress

WARMUP = 5
"""Rounds before the first that counts."""


def first_token_ms(
    candidates: Sequence[Candidate], *, requests: int, progress: Progress = SILENT
) -> dict[str, float]:
    """Name of a candidate -> median time to its first token, ms.

    Args:
        candidates: of distinct names.
        requests: rounds measured, after `WARMUP` others.
        progress: told of every round.

    Raises:
        GapExportError: a request does not fit into a cache, or the runtime failed.
    """
    measured = measure(candidates, requests=requests, new_tokens=1, warmup=WARMUP, progress=progress)
    return {row.name: row.ttft_ms.p50 for row in measured.rows}
