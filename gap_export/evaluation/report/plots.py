"""Plots of a page: accuracy and latency against the number of visual tokens, as SVG that goes into the page as it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gap_export.evaluation.report.runs import Evaluated, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito), as in the plot of a sweep.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("o", "s", "^", "D", "v", "P")
_INCHES = (5.2, 3.5)


@dataclass(frozen=True)
class _Point:
    tokens: float
    value: float
    below: float = 0.0
    above: float = 0.0


def accuracy_plot(subject: Subject) -> str:
    """Accuracy of every run with its 95 % interval (Wilson's), that of the candidate ringed."""

    def point(run: Evaluated) -> _Point:
        record = run.run.record
        value = record["accuracy"]
        return _Point(record["mean_kept"], value, value - record["low"], record["high"] - value)

    figure, axes = _panel("accuracy")
    _draw(axes, subject, point)
    axes.set_ylim(0, 1)
    return _svg(figure)


def latency_plot(subject: Subject) -> tuple[str, str]:
    """Time against tokens, and in words what kind of time.

    Where `recommend` measured it, time to the first token: shares took turns there, so that ratios hold. Otherwise the median time per
    expression of each evaluation, which ran at different moments.
    """
    recommendation = subject.first.recommendation
    if recommendation is not None and any(point.ttft_ms for point in recommendation.points):
        figure, axes = _panel("time to the first token, ms")
        points = [point for point in recommendation.points if point.ttft_ms is not None]
        axes.plot(
            [point.mean_kept for point in points],
            [point.ttft_ms or 0.0 for point in points],
            color=_COLOURS[0],
            marker="o",
        )
        for point in points:
            if point.keep == recommendation.chosen:
                _ring(axes, point.mean_kept, point.ttft_ms or 0.0)
        axes.set_ylim(bottom=0)
        return (
            _svg(figure),
            "Median time to the first token; shares took turns in one run (gap-export recommend).",
        )
    figure, axes = _panel("per expression, ms")
    _draw(axes, subject, lambda run: _Point(run.run.record["mean_kept"], 1000 * run.median_seconds))
    axes.set_ylim(bottom=0)
    return (
        _svg(figure),
        "Median time per expression of each evaluation, which were not interleaved: compare with care.",
    )


def _panel(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("visual tokens kept, on average")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(axes: Axes, subject: Subject, point_of: Callable[[Evaluated], _Point]) -> None:
    """One line per backend and position policy."""
    lines: dict[str, list[_Point]] = {}
    for run in subject.runs:
        lines.setdefault(f"{run.positions}, {run.backend}", []).append(point_of(run))
    for number, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.tokens)
        axes.errorbar(
            [point.tokens for point in points],
            [point.value for point in points],
            yerr=_bars(points),
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKS[number % len(_MARKS)],
            capsize=3,
        )
    axes.legend(frameon=False, fontsize=8)
    candidate = point_of(subject.candidate)
    _ring(axes, candidate.tokens, candidate.value)
    axes.set_xlim(left=0)


def _bars(points: Sequence[_Point]) -> list[list[float]] | None:
    if not any(point.below or point.above for point in points):
        return None
    return [[point.below for point in points], [point.above for point in points]]


def _ring(axes: Axes, tokens: float, value: float) -> None:
    axes.plot([tokens], [value], "o", markersize=15, markerfacecolor="none", color="#222222")


def _svg(figure: Figure) -> str:
    """The drawing alone, the same bytes for the same numbers."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.hashsalt": "gap-export"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    text = target.getvalue()
    return text[text.index("<svg") :]
