"""The plot of pruners: every point where it is, the front, the loss that is allowed, and the point to take."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gap_export.evaluation.plotting import png
from gap_export.evaluation.recommend.choose import choose_pruner
from gap_export.evaluation.recommend.plot import figure
from gap_export.evaluation.recommend.record import Recommendation
from tests.evaluation.recommend.test_choose import measured


def record(pruners: int, drop: float = 0.05) -> Recommendation:
    draws = np.random.default_rng(pruners)
    of = {
        f"p{number}": (0.25, float(draws.integers(320, 370)) / 400, float(draws.uniform(0.2, 1.1)))
        for number in range(pruners)
    }
    return choose_pruner(measured(**of), drop, ttft_ms=50.0)


@pytest.mark.parametrize("pruners", [1, 17])
def test_every_point_is_drawn_with_its_interval(pruners: int) -> None:
    wanted = record(pruners)
    (axes,) = figure(wanted).axes
    drawn = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        for x, y, (low, high) in zip(*line.get_data(), bars.get_segments(), strict=True):
            drawn[container.get_label()] = (x, y, low[1], high[1])
    assert len(drawn) == len(wanted.points)
    base = wanted.points[0]
    for point in wanted.points:
        name = "unpruned" if point is base else point.pruner
        x, y, low, high = drawn[name]
        assert (x, y) == pytest.approx((point.ttft_ms, 100 * point.accuracy))
        assert (low, high) == pytest.approx(
            (100 * (base.accuracy + point.low), 100 * (base.accuracy + point.high))
        )


def test_pruners_are_told_apart() -> None:
    (axes,) = figure(record(17)).axes
    styles = {(each.lines[0].get_color(), each.lines[0].get_marker()) for each in axes.containers}
    assert len(styles) == 18


def test_front_allowed_loss_and_choice_are_drawn() -> None:
    wanted = record(8)
    plot = figure(wanted)
    (axes,) = plot.axes
    lines = {line.get_label(): line for line in axes.lines}
    front = sorted((point.time_ms, 100 * point.accuracy) for point in wanted.points if point.front)
    assert list(zip(*lines["Pareto front"].get_data(), strict=True)) == front
    assert set(lines["5 points below unpruned"].get_ydata()) == {100 * (wanted.points[0].accuracy - 0.05)}
    assert wanted.choice is not None
    (ring,) = [line for line in axes.lines if line.get_markersize() == 15]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (wanted.choice.time_ms, 100 * wanted.choice.accuracy)
    (legend,) = plot.legends
    assert len(legend.get_texts()) == 1 + 8 + 2
    assert axes.get_xlim()[0] == 0


def test_where_nothing_is_chosen_nothing_is_ringed() -> None:
    (axes,) = figure(record(8, drop=0.0)).axes
    assert not [line for line in axes.lines if line.get_markersize() == 15]


def test_the_file_is_an_image() -> None:
    with Image.open(io.BytesIO(png(figure(record(17))))) as image:
        assert image.size == (1280, 800)
