"""Plots of a page: that every number is drawn, whole, and nothing covers it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from matplotlib.figure import Figure

from gap_export.evaluation.report.plots import accuracy_figure, latency_figure
from gap_export.evaluation.report.runs import ReportedRuns


@dataclass
class Run:
    """What plots ask of an evaluation."""

    tokens: float
    accuracy: float
    median_seconds: float
    positions: str = "gap"
    backend: str = "onnxruntime"
    recommendation: Any = None

    @property
    def run(self) -> Any:
        return SimpleNamespace(
            record=SimpleNamespace(
                mean_kept=self.tokens,
                accuracy=self.accuracy,
                low=max(0.0, self.accuracy - 0.05),
                high=min(1.0, self.accuracy + 0.05),
            )
        )


def reported(*runs: Run, chosen: int = 0) -> ReportedRuns:
    return ReportedRuns(cast(Any, runs), chosen, {})


def shares(*times: float) -> Any:
    """What `recommend` leaves: the largest share takes longest, and was chosen."""
    points = [
        SimpleNamespace(keep=1 / (n + 1), mean_kept=144 / (n + 1), ttft_ms=time)
        for n, time in enumerate(times)
    ]
    return SimpleNamespace(points=points, chosen=1.0)


def markers(figure: Figure) -> list[tuple[float, float, float]]:
    """Of every marker: x, y and radius in pixels of the figure as it is drawn."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    pixels_per_point = figure.dpi / 72
    found = []
    for line in axes.lines:
        if line.get_marker() not in ("None", None, "", "_", "|"):
            for x, y in line.get_xydata():
                centre = axes.transData.transform((x, y))
                found.append((*centre, pixels_per_point * line.get_markersize() / 2))
    return found


PLOTS = {
    "accuracy": lambda: accuracy_figure(
        reported(Run(144, 1.0, 0.4), Run(36, 0.5, 0.2), Run(36, 0.4, 0.1, backend="torch"))
    ),
    "seconds": lambda: latency_figure(
        reported(Run(144, 0.9, 0.4), Run(36, 0.5, 0.2), Run(36, 0.4, 0.1, backend="torch"))
    )[0],
    "seconds of one": lambda: latency_figure(reported(Run(144, 0.9, 0.4)))[0],
    "first token": lambda: latency_figure(reported(Run(144, 0.9, 0.4, recommendation=shares(80, 40, 30))))[0],
}


@pytest.mark.parametrize("name", PLOTS)
def test_no_marker_is_cut_off_or_under_the_legend(name: str) -> None:
    figure = PLOTS[name]()
    found = markers(figure)
    assert len(found) >= 2, "a line's markers, and the ring around one"
    frame = figure.axes[0].get_window_extent()
    legends = [
        legend.get_window_extent() for legend in (*figure.legends, *figure.axes[0].findobj(match=is_legend))
    ]
    for x, y, radius in found:
        assert y + radius <= frame.y1 + 1, "its top is inside"
        assert frame.x0 - 1 <= x <= frame.x1 + 1
        for legend in legends:
            assert not (
                legend.x0 - radius < x < legend.x1 + radius and legend.y0 - radius < y < legend.y1 + radius
            )


def is_legend(artist: Any) -> bool:
    from matplotlib.legend import Legend

    return isinstance(artist, Legend)


def test_a_marker_under_the_legend_would_be_noticed() -> None:
    """A legend inside the axes, in the corner where the highest marker is, as it once was."""
    figure = PLOTS["seconds"]()
    (axes,) = figure.axes
    axes.legend(loc="upper right")
    axes.set_ylim(0, 400)
    figure.draw_without_rendering()
    (legend,) = axes.findobj(match=is_legend)
    box = legend.get_window_extent()
    assert any(box.x0 - r < x < box.x1 + r and box.y0 - r < y < box.y1 + r for x, y, r in markers(figure))


def test_every_backend_and_policy_is_named_once() -> None:
    figure = accuracy_figure(
        reported(Run(144, 0.9, 1, positions="unpruned"), Run(36, 0.5, 1), Run(36, 0.4, 1), Run(9, 0.2, 1))
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["unpruned, onnxruntime", "gap, onnxruntime"]
