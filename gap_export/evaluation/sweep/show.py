"""The record of a sweep for people: tables for the screen and a page in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.evaluation.sweep.record import Comparison, SweepRecord

if TYPE_CHECKING:
    from rich.table import Table

_COMPARED = ("gap - shifted (95 %)", "gap beats shifted")


def tables(record: SweepRecord) -> list[Table]:
    """Accuracy of every point, one line per pruner and count; then what was skipped, where anything was."""
    from rich.markup import escape
    from rich.table import Table

    policies = list(dict.fromkeys(row.positions for row in record.rows[1:]))
    compared = {(each.pruner, each.kept): each for each in record.gap_against_shifted}
    found = {(row.pruner, row.kept, row.positions): row for row in record.rows}
    lines = list(dict.fromkeys((row.pruner, row.kept) for row in record.rows[1:]))
    table = Table("pruner", "keep", *policies, *(_COMPARED if compared else ()))
    table.title = (
        f"accuracy@0.5 of {escape(record.model)} in {record.settings.backend}, {record.settings.limit} held-out scenes; "
        f"unpruned: {record.full:.3f}"
    )
    for pruner, kept in lines:
        measured = [found.get((pruner, kept, policy)) for policy in policies]
        table.add_row(
            pruner,
            f"{kept} of {record.visual_tokens}",
            *("-" if row is None else f"{row.accuracy:.3f}" for row in measured),
            *(_compared(compared.get((pruner, kept))) if compared else ()),
        )
    if not record.skipped:
        return [table]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for each in record.skipped:
        key = (each.pruner, f"{each.kept} of {record.visual_tokens}", each.reason)
        reasons.setdefault(key, []).append(each.positions)
    skipped = Table("skipped", "keep", "positions", "why")
    for (pruner, count, reason), positions in reasons.items():
        skipped.add_row(pruner, count, ", ".join(positions), escape(reason))
    return [table, skipped]


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
    from io import StringIO

    from rich import box
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=1000, emoji=False)
    console.print(f"# Sweep of {record.model}\n\n{verdict(record)}", highlight=False, markup=False)
    if plot:
        console.print(f"\n![accuracy against the number of visual tokens]({plot})", markup=False)
    for table in tables(record):
        title, table.title, table.box = table.title, None, box.MARKDOWN
        console.print(*([f"\n{title}"] if title else []), table, sep="\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _compared(each: Comparison | None) -> tuple[str, str]:
    if each is None:
        return "-", "-"
    return f"{each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f})", "yes" if each.beats else "no"
