"""The plot of a sweep: that it shows the numbers of the record, all of them, and can be read."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import MissingRequirementError
from gap_export.evaluation.plotting import check_matplotlib, png
from gap_export.evaluation.sweep.plot import figure
from gap_export.evaluation.sweep.record import FULL, Row, Settings, SweepRecord
from gap_export.positions import PositionPolicy

COUNTS = (72, 36, 16)


def row(pruner: str, kept: int, positions: str, accuracy: float) -> Row:
    return Row(
        pruner=pruner, keep=kept / 144, kept=kept, positions=positions, visual_tokens=144, accuracy=accuracy,
        standard_error=0.02, low=max(0.0, accuracy - 0.04), high=accuracy + 0.05, mean_iou=0.5, without_box=0, cut_off=0, cases=500,
    )  # fmt: skip


def record(pruners: int) -> SweepRecord:
    """Every point has an accuracy of its own."""
    draws = np.random.default_rng(pruners).uniform(0, 0.9, (pruners, 3, len(COUNTS)))
    rows = [
        row(f"strategy_{number}", kept, policy, float(draws[number, p, k]))
        for number in range(pruners)
        for k, kept in enumerate(COUNTS)
        for p, policy in enumerate(PositionPolicy)
    ]
    settings = Settings(
        recipe={}, checkpoint_sha256="0", backend="onnxruntime", limit=500, scenes_seed=1, batch=16, threads=1, versions={}
    )  # fmt: skip
    return SweepRecord(
        model="shapes", visual_tokens=144, full=0.91, rows=(row("none", 144, FULL, 0.91), *rows),
        gap_against_shifted=(), gap_does_not_beat_shifted=(), skipped=(), settings=settings,
    )  # fmt: skip


@pytest.mark.parametrize("pruners", [1, 4, 18])
def test_every_number_of_the_record_is_drawn(pruners: int) -> None:
    wanted = record(pruners)
    panels = figure(wanted).axes
    assert [panel.get_title() for panel in panels] == [f"strategy_{n}" for n in range(pruners)]
    drawn: dict[tuple[str, str, float], tuple[float, ...]] = {}
    for panel in panels:
        (reference,) = [line for line in panel.lines if line.get_linestyle() == "--"]
        assert set(reference.get_ydata()) == {0.91}
        for container in panel.containers:
            line, _, (bars,) = container.lines
            for x, y, (low, high) in zip(*line.get_data(), bars.get_segments(), strict=True):
                drawn[panel.get_title(), container.get_label(), x] = (y, low[1], high[1])
    expected = {
        (each.pruner, str(each.positions), each.kept): (each.accuracy, each.low, each.high)
        for each in wanted.rows[1:]
    }
    assert drawn.keys() == expected.keys()
    for key, values in expected.items():
        assert drawn[key] == pytest.approx(values)


def test_axes_and_legend_say_what_is_shown() -> None:
    plot = figure(record(8))
    assert "visual tokens" in plot.get_supxlabel()
    assert "144" in plot.get_supxlabel()
    assert "accuracy" in plot.get_supylabel()
    (legend,) = plot.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "unpruned (144 tokens)", "gap", "shifted", "permuted",
    ]  # fmt: skip
    assert "500 held-out scenes" in legend.get_title().get_text()
    panel = plot.axes[0]
    assert [label.get_text() for label in plot.axes[-1].get_xticklabels()] == ["16", "36", "72"]
    assert {tuple(each.get_ylim()) for each in plot.axes} == {panel.get_ylim()}, "panels share their axes"
    low, high = panel.get_xlim()
    assert low < 16
    assert high > 72


def test_the_lowest_panel_of_every_column_has_its_counts() -> None:
    plot = figure(record(9))
    plot.draw_without_rendering()
    named = [any(label.get_text() for label in panel.get_xticklabels()) for panel in plot.axes]
    assert named == [False] * 4 + [True] * 5


@pytest.mark.parametrize("pruners", [1, 18])
def test_the_file_is_an_image_that_fits_a_page(pruners: int) -> None:
    with Image.open(io.BytesIO(png(figure(record(pruners))))) as image:
        assert image.format == "PNG"
        width, height = image.size
        assert 800 < width < 2400
        assert 400 < height < 1600
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20, "there is something on it"


def test_a_policy_that_was_not_measured_is_not_in_the_legend() -> None:
    whole = record(2)
    gap_alone = whole.model_copy(
        update={"rows": tuple(each for each in whole.rows if each.positions in ("gap", FULL))}
    )
    (legend,) = figure(gap_alone).legends
    assert [text.get_text() for text in legend.get_texts()] == ["unpruned (144 tokens)", "gap"]


def test_a_sweep_of_nothing_but_the_unpruned_model_can_be_drawn() -> None:
    whole = record(1)
    assert png(figure(whole.model_copy(update={"rows": whole.rows[:1]}))).startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    check_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match="not installed") as caught:
        check_matplotlib()
    assert "gap-export[report]" in caught.value.hint
