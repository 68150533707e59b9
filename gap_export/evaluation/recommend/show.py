"""A recommendation for the screen: tables and one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.evaluation.recommend.record import Point, Recommendation
from gap_export.terminal import styled

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_COLUMNS = ("keep", "tokens", "accuracy, %", "loss, points", "95 % interval", "first token", "")
_CHOSEN = ("<- this one", "bold green")
_NOT_INSIDE = ("may lose more", "red")


def tables(record: Recommendation) -> list[Table]:
    """Every share of one bundle; or the Pareto front of pruners from the slowest to the fastest, and then what was left out, where anything was.

    The unpruned model and the point to take are in the table of the front wherever they lie.
    """
    from rich.table import Table

    about = f"{record.expressions} expressions, {record.protocol}"
    if not record.of_pruners:
        shares = Table(*_COLUMNS, title=about)
        for point in record.points:
            shares.add_row(*_cells(point, record))
        return [shares]
    title = f"Pareto front of {len(record.points)} points; {about}"
    front = Table("pruner", *_COLUMNS[:-1], "ms", "", title=title)
    shown = [point for point in record.points if point.front or point in (record.points[0], record.choice)]
    for point in sorted(shown, key=lambda point: -(point.time_ms)):
        *cells, mark = _cells(point, record)
        front.add_row(point.pruner, *cells, f"{point.ttft_ms:.2f}", mark)
    if not record.left_out:
        return [front]
    left_out = Table("left out", "keep", "why")
    for each in record.left_out:
        left_out.add_row(each.pruner, ", ".join(f"{keep:g}" for keep in each.keeps), each.reason)
    return [front, left_out]


def verdict(record: Recommendation) -> str:
    """What to take, or why there is nothing."""
    allowed, choice = f"{100 * record.max_accuracy_drop:g} points", record.choice
    if choice is None and record.of_pruners:
        return (
            f"nothing that is faster is sure to lose at most {allowed}; more expressions narrow the intervals"
        )
    if choice is None:
        return (
            f"no smaller keep ratio is sure to lose at most {allowed}; more expressions narrow the intervals"
        )
    changes = f"accuracy {100 * choice.difference:+.2f} points, {100 * choice.low:+.2f} at worst"
    return f"{choice.label}: first token {_speed(choice)}, {changes}{_still_possible(choice, record.expressions)}"


def _still_possible(choice: Point, expressions: int) -> str:
    """What an interval of no width hides: of few expressions none changes, and resampling them shows nothing else (rule of three)."""
    if not choice.low == choice.difference == choice.high == 0:
        return ""
    points = 100 * min(1.0, 3 / expressions)
    return (
        f"; none of {expressions} expressions changed, which does not exclude a loss of {points:.2g} points"
    )


def _cells(point: Point, record: Recommendation) -> tuple[str | Text, ...]:
    mark = _CHOSEN if point == record.choice else None if point.inside else _NOT_INSIDE
    return (
        f"{point.keep:g}",
        f"{point.mean_kept:.1f}",
        f"{100 * point.accuracy:.2f}",
        _points(point.difference),
        f"{_points(point.high)} to {_points(point.low)}",
        _speed(point),
        "" if mark is None else styled(mark),
    )


def _points(difference: float) -> str:
    """A loss of accuracy, in percentage points."""
    return f"{0.0 - 100 * difference:.2f}"


def _speed(point: Point) -> str:
    return "-" if point.speedup is None else f"{point.speedup:.2f} times as fast"
