"""The record of a sweep for people: tables for the screen and a page in Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gap_export.evaluation.sweep.record import Comparison, SweepRecord
from gap_export.terminal import one_line

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = re.compile(r"[\\`*\[\]<>|$~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What means something in Markdown; an underscore within a word does not."""
_COMPARED = ("gap - shifted (95 %)", "gap beats shifted")


@dataclass(frozen=True)
class _Grid:
    """A table before it is drawn: for the screen or in Markdown."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""


def tables(record: SweepRecord) -> list[Table]:
    """Accuracy of every point, one line per pruner and count; then what was skipped, where anything was."""
    from rich.table import Table

    drawn = []
    for grid in _grids(record):
        table = Table(*grid.header, title=grid.title or None)
        for row in grid.rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def _grids(record: SweepRecord) -> list[_Grid]:
    policies = list(dict.fromkeys(row.positions for row in record.rows[1:]))
    compared = {(each.pruner, each.kept): each for each in record.gap_against_shifted}
    found = {(row.pruner, row.kept, row.positions): row for row in record.rows}
    lines = list(dict.fromkeys((row.pruner, row.kept) for row in record.rows[1:]))
    rows = []
    for pruner, kept in lines:
        measured = [found.get((pruner, kept, policy)) for policy in policies]
        rows.append(
            (
                pruner,
                f"{kept} of {record.visual_tokens}",
                *("-" if row is None else f"{row.accuracy:.3f}" for row in measured),
                *(_compared(compared.get((pruner, kept))) if compared else ()),
            )
        )
    accuracy = _Grid(
        ("pruner", "keep", *policies, *(_COMPARED if compared else ())),
        tuple(rows),
        f"accuracy@0.5 of {record.model} in {record.settings.backend}, {record.settings.limit} held-out scenes; "
        f"unpruned: {record.full:.3f}",
    )
    if not record.skipped:
        return [accuracy]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for each in record.skipped:
        key = (each.pruner, f"{each.kept} of {record.visual_tokens}", each.reason)
        reasons.setdefault(key, []).append(each.positions)
    skipped = tuple(
        (pruner, count, ", ".join(positions), reason)
        for (pruner, count, reason), positions in reasons.items()
    )
    return [accuracy, _Grid(("skipped", "keep", "positions", "why"), skipped)]


def verdict(record: SweepRecord) -> str:
    """Whether GAP beats renumbered ids, and where it does not."""
    compared, missed = len(record.gap_against_shifted), record.gap_does_not_beat_shifted
    if not compared:
        return "gap and shifted were not both measured anywhere"
    won = (
        f"gap beats shifted in {compared - len(missed)} of {compared} points "
        "(95 % interval of the paired difference above 0)"
    )
    if not missed:
        return won
    places = (
        f"{each.pruner} at {each.kept} of {record.visual_tokens} ({each.difference:+.3f}, {each.low:+.3f} to {each.high:+.3f})"
        for each in missed
    )
    return f"{won}; not in: {', '.join(places)}"


def page(record: SweepRecord, plot: str | None) -> str:
    """The record as Markdown.

    Args:
        record: of a sweep.
        plot: file name of the plot, beside the page.
    """
    parts = [f"# Sweep of {_in_markdown(record.model)}", _in_markdown(verdict(record))]
    if plot:
        parts.append(f"![accuracy against the number of visual tokens]({plot})")
    for grid in _grids(record):
        if grid.title:
            parts.append(_in_markdown(grid.title))
        header, *rows = (f"| {' | '.join(map(_in_markdown, row))} |" for row in (grid.header, *grid.rows))
        parts.append("\n".join([header, "|---" * len(grid.header) + "|", *rows]))
    return "\n\n".join(parts) + "\n"


def _in_markdown(text: str) -> str:
    """Text from outside as text: it begins no emphasis, link, table cell, formula or HTML."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", one_line(text))


def _compared(each: Comparison | None) -> tuple[str, str]:
    if each is None:
        return "-", "-"
    return f"{each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f})", "yes" if each.beats else "no"
