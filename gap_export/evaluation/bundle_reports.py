"""Records among the reports of a bundle: each names the build that it was taken on, and is used for that build alone.

A bundle may be built anew in the same folder; its reports stay there, and are stale from then on.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError
from gap_export.files import check_output_file
from gap_export.records import Record

R = TypeVar("R", bound=Record)

PARITY, TEXT_PARITY, BENCH, BENCH_PLOT, RECOMMENDATION = (
    "parity.json",
    "text_parity.json",
    "bench.json",
    "bench.png",
    "recommend.json",
)
"""What `validate`, `validate --text`, `bench` and `recommend` leave there."""

_PNG = b"\x89PNG\r\n\x1a\n"

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
    hint = (
        f"it is damaged or was written by another version: move it away, and run gap-export {command} again"
    )
    return kind.read(path, hint=hint)


def check_reports_can_be_written(bundle: Bundle, *names: str) -> None:
    """Refuse, before the work, where a report is to go and something else is, or nothing can be written.

    Args:
        bundle: opened.
        names: of the files.

    Raises:
        BundleError: the file there is no report, or the folder cannot be written.
    """
    for name in names:
        check_output_file(bundle.reports / name, ours=_is_report, holds="report of gap-export")


def _is_report(path: Path) -> bool:
    """By its content: a record names a build, and a plot is a PNG image."""
    if path.suffix == ".json":
        with suppress(GapExportError):
            return bool(_Head.read(path, hint="").manifest_sha256)
        return False
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


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
