"""The plot of a recommendation among pruners: accuracy against time to the first token, with the Pareto front and the loss that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.evaluation.plotting import COLOURS, MARKS, hide_frame, ring, without_math
from gap_export.evaluation.recommend.record import Point, Recommendation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = (8.0, 5.0)
_LEGEND_COLUMNS = 5
_GREY = "#555555"


def figure(record: Recommendation) -> Figure:
    """Every point, a colour and mark for each pruner; bars are 95 % intervals of the paired difference to the unpruned model.

    The line is the Pareto front: the most accurate of all that is at least as fast. The point to take is ringed.
    """
    from matplotlib.figure import Figure

    plot = Figure(figsize=_INCHES, layout="constrained")
    axes = plot.subplots()
    baseline = record.points[0]
    for number, pruner in enumerate(dict.fromkeys(point.pruner or "" for point in record.points)):
        own = [point for point in record.points if (point.pruner or "") == pruner]
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number // len(COLOURS) % len(MARKS)]
        _draw(axes, own, baseline, "unpruned" if own[0] is baseline else pruner, colour, mark)
    front = sorted((point for point in record.points if point.front), key=lambda point: point.time_ms)
    axes.plot(
        [point.time_ms for point in front],
        [100 * point.accuracy for point in front],
        color=_GREY,
        linewidth=1.2,
        drawstyle="steps-post",
        label="Pareto front",
        zorder=1,
    )
    axes.axhline(
        100 * (baseline.accuracy - record.max_accuracy_drop),
        color=_GREY,
        linestyle="--",
        linewidth=1,
        label=f"{100 * record.max_accuracy_drop:g} points below unpruned",
    )
    if record.choice is not None:
        ring(axes, record.choice.time_ms, 100 * record.choice.accuracy)
    axes.set_xlim(left=0)
    axes.set_xlabel("time to the first token, ms")
    axes.set_ylabel(f"accuracy, %, of {record.expressions} expressions ({without_math(record.protocol)})")
    hide_frame(axes)
    plot.legend(loc="outside upper center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)
    return plot


def _draw(axes: Axes, points: list[Point], baseline: Point, label: str, colour: str, mark: str) -> None:
    below = [max(0.0, 100 * (point.difference - point.low)) for point in points]
    above = [max(0.0, 100 * (point.high - point.difference)) for point in points]
    axes.errorbar(
        [point.time_ms for point in points],
        [100 * point.accuracy for point in points],
        yerr=[below, above],
        label=without_math(label),
        color=colour,
        marker=mark,
        markersize=5,
        linestyle="none",
        elinewidth=0.7,
        capsize=2,
    )
