"""Records among the reports of a bundle: each names the build that it was taken on, and is used for that build alone.

A bundle may be built anew in the same folder; its reports stay there, and are stale from then on.
"""

from __future__ import annotations

import os
from typing import TypeVar

from pydantic import ConfigDict

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError
from gap_export.records import Record

R = TypeVar("R", bound=Record)

PARITY, BENCH, BENCH_PLOT, RECOMMENDATION = "parity.json", "bench.json", "bench.png", "recommend.json"
"""What `validate`, `bench` and `recommend` leave there."""

CURRENT, STALE, UNREADABLE = "current", "stale: taken on another build of this bundle", "cannot be read"


def read_report(bundle: Bundle, name: str, kind: type[R], *, command: str) -> R | None:
    """A record among the reports, if it is there and was taken on this build.

    Args:
        bundle: opened.
        name: of the file.
        kind: of the record.
        command: that writes it.

    Raises:
        InputError: it is of this build and cannot be read.
    """
    path = bundle.reports / name
    if not os.path.lexists(path) or state_of(bundle, name) == STALE:
        return None
    hint = f"it is damaged or was written by another version: run gap-export {command} again"
    return kind.read(path, hint=hint)


def state_of(bundle: Bundle, name: str) -> str:
    """Whether a record among the reports may be used: `CURRENT`, `STALE` or `UNREADABLE`."""
    try:
        taken_on = _Head.read(bundle.reports / name, hint="").manifest_sha256
    except GapExportError:
        return UNREADABLE
    return CURRENT if taken_on == bundle.manifest_sha256 else STALE


def states(bundle: Bundle) -> dict[str, str]:
    """File name -> state, of every record among the reports."""
    return {path.name: state_of(bundle, path.name) for path in sorted(bundle.reports.glob("*.json"))}


class _Head(Record):
    """What all of them have."""

    model_config = ConfigDict(extra="ignore")

    manifest_sha256: str
