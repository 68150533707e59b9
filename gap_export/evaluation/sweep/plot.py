"""The plot of a sweep: accuracy against the number of visual tokens, one panel per pruner, one line per policy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gap_export.evaluation.plotting import PALETTE, hide_frame, without_math
from gap_export.evaluation.sweep.record import Positions, Row, SweepRecord
from gap_export.positions import PositionPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: dict[Positions, tuple[str, str]] = {
    PositionPolicy.GAP: (PALETTE["blue"], "o"),
    PositionPolicy.SHIFTED: (PALETTE["vermilion"], "s"),
    PositionPolicy.PERMUTED: (PALETTE["green"], "^"),
}
_MOST_COLUMNS = 6
_PANEL_INCHES = 1.85


def figure(record: SweepRecord) -> Figure:
    """The plot: small panels that share their axes, so that pruners can be compared with each other and with the
    unpruned model. Bars are 95% intervals (Wilson's) of single points."""
    from matplotlib.figure import Figure

    pruners = list(dict.fromkeys(row.pruner for row in record.rows[1:])) or [""]
    lines = math.ceil(len(pruners) / _MOST_COLUMNS)
    columns = math.ceil(len(pruners) / lines)
    plot = Figure(
        figsize=(max(columns, 3) * _PANEL_INCHES + 0.5, lines * _PANEL_INCHES + 1.3), layout="constrained"
    )
    panels = plot.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, pruner in zip(panels.flat, pruners, strict=False):
        _draw(panel, pruner, record)
    for panel in panels.flat[len(pruners) :]:
        panel.remove()
    for panel in panels.flat[max(0, len(pruners) - columns) : len(pruners)]:
        panel.tick_params(labelbottom=True)  # nothing stands below it
    _label(plot, panels.flat[0], record)
    return plot


def _draw(panel: Axes, pruner: str, record: SweepRecord) -> None:
    panel.axhline(
        record.full,
        color="#555555",
        linestyle="--",
        linewidth=1,
        label=f"unpruned ({record.visual_tokens} tokens)",
    )
    for policy, (colour, mark) in _STYLES.items():
        rows = sorted(
            (row for row in record.rows[1:] if (row.pruner, row.positions) == (pruner, policy)),
            key=lambda row: row.kept,
        )
        if rows:
            _draw_line(panel, rows, str(policy), colour, mark)
    panel.set_title(without_math(pruner), fontsize=9)
    hide_frame(panel)


def _draw_line(panel: Axes, rows: list[Row], label: str, colour: str, mark: str) -> None:
    below = [row.accuracy - row.low for row in rows]
    above = [row.high - row.accuracy for row in rows]
    panel.errorbar(
        [row.kept for row in rows],
        [row.accuracy for row in rows],
        yerr=[below, above],
        label=label,
        color=colour,
        marker=mark,
        markersize=4,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
    )


def _label(plot: Figure, first: Axes, record: SweepRecord) -> None:
    """What all panels have in common, said once."""
    counts = sorted({row.kept for row in record.rows[1:]}) or [record.visual_tokens]
    first.set_xscale("log", base=2)
    first.set_xticks(counts, [str(count) for count in counts])
    first.minorticks_off()
    margin = max(1.25, (counts[-1] / counts[0]) ** 0.08)
    first.set_xlim(counts[0] / margin, counts[-1] * margin)
    first.set_ylim(-0.03, 1)
    first.set_yticks([0, 0.25, 0.5, 0.75, 1])
    for panel in plot.axes:
        panel.tick_params(labelsize=8)
    plot.supxlabel(f"visual tokens kept, of {record.visual_tokens} (log scale)", fontsize=9)
    plot.supylabel("accuracy@0.5", fontsize=9)
    shown = {
        label: handle
        for panel in plot.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    plot.legend(
        shown.values(),
        shown.keys(),
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
        fontsize=9,
        title=without_math(
            f"{record.model}: {record.settings.limit} held-out scenes, exported graphs in {record.settings.backend}"
        ),
        title_fontsize=10,
    )
