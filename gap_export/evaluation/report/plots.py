"""Plots of a page: accuracy and latency against the number of visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gap_export.evaluation.plotting import COLOURS, MARKS, hide_frame, ring, without_math
from gap_export.evaluation.report.runs import Evaluated, ReportedRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = (5.2, 3.5)
_HEADROOM = 0.12
"""Above the highest value, as a share of the axis: a marker and the ring around it end inside."""


@dataclass(frozen=True)
class _Point:
    tokens: float
    value: float
    below: float = 0.0
    above: float = 0.0


def accuracy_figure(reported: ReportedRuns) -> Figure:
    """Accuracy of every run with its 95 % interval (Wilson's), the subject ringed."""

    def point(run: Evaluated) -> _Point:
        record = run.run.record
        return _Point(
            record.mean_kept, record.accuracy, record.accuracy - record.low, record.high - record.accuracy
        )

    figure, axes = _panel("accuracy")
    _draw(figure, axes, reported, point)
    axes.set_ylim(0, 1 + _HEADROOM)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    return figure


def latency_figure(reported: ReportedRuns) -> tuple[Figure, str]:
    """Time against tokens, and a caption that says what kind of time.

    Where `recommend` measured it, time to the first token: shares were interleaved there, so that ratios hold. Otherwise the median time per
    expression of each evaluation, which ran at different moments.
    """
    recommendation = reported.reference.recommendation
    if recommendation is not None and any(point.ttft_ms for point in recommendation.points):
        figure, axes = _panel("time to the first token, ms")
        points = [point for point in recommendation.points if point.ttft_ms is not None]
        times = [point.ttft_ms or 0.0 for point in points]
        axes.plot([point.mean_kept for point in points], times, color=COLOURS[0], marker=MARKS[0])
        for point, time in zip(points, times, strict=True):
            if point.keep == recommendation.chosen:
                ring(axes, point.mean_kept, time)
        axes.set_xlim(left=0)
        caption = "Median time to the first token; shares were interleaved in one run (gap-export recommend)."
    else:
        figure, axes = _panel("per expression, ms")
        times = [1000 * run.median_seconds for run in reported.runs]
        _draw(
            figure,
            axes,
            reported,
            lambda run: _Point(run.run.record.mean_kept, 1000 * run.median_seconds),
        )
        caption = (
            "Median time per expression of each evaluation, which were not interleaved: compare with care."
        )
    axes.set_ylim(0, (1 + _HEADROOM) * max(times) or 1)
    return figure, caption


def _panel(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("visual tokens kept, on average")
    axes.set_ylabel(label)
    hide_frame(axes)
    return figure, axes


def _draw(
    figure: Figure, axes: Axes, reported: ReportedRuns, point_of: Callable[[Evaluated], _Point]
) -> None:
    """One line per backend and position policy."""
    lines: dict[str, list[_Point]] = {}
    for run in reported.runs:
        lines.setdefault(f"{run.positions}, {run.backend}", []).append(point_of(run))
    for number, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.tokens)
        axes.errorbar(
            [point.tokens for point in points],
            [point.value for point in points],
            yerr=_bars(points),
            label=without_math(label),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            capsize=3,
        )
    # Beside the axes and not in them, where it would cover what is drawn.
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    subject = point_of(reported.subject)
    ring(axes, subject.tokens, subject.value)
    axes.set_xlim(left=0)


def _bars(points: Sequence[_Point]) -> list[list[float]] | None:
    if not any(point.below or point.above for point in points):
        return None
    return [[point.below for point in points], [point.above for point in points]]
