"""Which runtime answers a bundle's requests fastest here, from what was measured; nothing is measured for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.environment import cpu_name
from gap_export.errors import SessionError, in_one_line
from gap_export.evaluation.bundle_reports import BENCH, read_report
from gap_export.evaluation.latency.record import BenchRecord, Row
from gap_export.runtime.backends import names, runtime

USUAL = "onnxruntime"
"""Where nothing was measured."""


class Fastest(NamedTuple):
    """A choice.

    Attributes:
        backend: as `load` takes it.
        reason: in words.
    """

    backend: str
    reason: str


def fastest_backend(bundle: Bundle | Path | str) -> Fastest:
    """The runtime with the smallest median of a whole request, of those that the bundle's newest `bench` measured on this processor.

    Requests of one kind are compared: those of the record's first row, with as many visual tokens and rows.

    Args:
        bundle: opened, or its folder.

    Returns:
        The choice; ONNX Runtime, and the command that would measure, where there is nothing to choose by.

    Raises:
        InputError: the record is damaged.
    """
    opened = open_bundle(bundle)
    measure = (
        f"gap-export bench {shlex.quote(str(opened.folder))} --backend onnxruntime,openvino,openvino:bf16"
    )
    record = read_report(opened, BENCH, BenchRecord, command="bench")
    if record is None:
        return Fastest(USUAL, f"this build was not measured; {measure} would")
    if record.device != cpu_name():
        return Fastest(
            USUAL, f"it was measured on {in_one_line(record.device, 80)}, not here; {measure} would"
        )
    rows = [
        row for row in record.rows if row.manifest_sha256 == opened.manifest_sha256 and _runs(row.backend)
    ]
    rows = [row for row in rows if (row.keep, row.batch) == (rows[0].keep, rows[0].batch)]
    if len({row.backend for row in rows}) < 2:
        return Fastest(USUAL, f"one runtime is no choice; {measure} would measure others")
    first, second, *_ = sorted(rows, key=lambda row: row.total_ms.p50)
    return Fastest(
        first.backend,
        f"a request took {first.total_ms.p50:.0f} ms, and {second.total_ms.p50:.0f} ms in {second.backend} "
        f"({record.requests} requests each, {_kind(first)})",
    )


def _runs(backend: str) -> bool:
    """Whether it is a runtime that runs bundles; records are files, and say what they like."""
    try:
        return runtime(backend).backend in names(exported=True)
    except SessionError:
        return False


def _kind(row: Row) -> str:
    return f"{row.kept} of {row.visual_tokens} visual tokens" + (
        f", batch {row.batch}" if row.batch > 1 else ""
    )
