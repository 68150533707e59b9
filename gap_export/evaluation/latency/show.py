"""A latency measurement for people: tables for the screen, and a plot of what the time goes into."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING

from gap_export.evaluation.latency.record import QUANTITIES, BenchRecord, Device
from gap_export.evaluation.plotting import PALETTE, without_math

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_PHASES = {
    "encode_ms": ("vision", PALETTE["blue"]),
    "splice_ms": ("splice", PALETTE["green"]),
    "prefill_ms": ("prefill", PALETTE["orange"]),
}
_DECODE = PALETTE["purple"]


def tables(record: BenchRecord) -> list[Table]:
    """The record for the screen: the cost card, one column per candidate, then one per pair of them."""
    from rich.table import Table

    cards = [] if record.roofline is None else [_card(record, record.roofline)]

    rows = Table("", *(row.name for row in record.rows))
    rows.title = f"median over {record.requests} requests, ms (90th percentile in brackets)"
    rows.add_row("visual tokens", *(f"keep {row.kept} of {row.visual_tokens}" for row in record.rows))
    rows.add_row("cache slots", *(f"prompt {row.prompt_slots} of {row.capacity}" for row in record.rows))
    for quantity, label in QUANTITIES.items():
        spans = [getattr(row, quantity) for row in record.rows]
        rows.add_row(label, *(f"{span.p50:.3f} ({span.p90:.3f})" for span in spans))
    if len(record.rows) == 1:
        return [*cards, rows]
    pairs = list(combinations([row.name for row in record.rows], 2))
    found = {(each.numerator, each.denominator, each.quantity): each for each in record.ratios}
    ratios = Table("", *(f"{one} / {other}" for one, other in pairs))
    ratios.title = "ratio of medians, same rounds (95 % interval)"
    for quantity, label in QUANTITIES.items():
        shown = [found.get((*pair, quantity)) for pair in pairs]
        ratios.add_row(
            label,
            *(f"{each.ratio:.3f} ({each.low:.3f} to {each.high:.3f})" if each else "" for each in shown),
        )
    return [*cards, rows, ratios]


def _card(record: BenchRecord, device: Device) -> Table:
    from rich.table import Table

    card = Table("cost", *(row.name for row in record.rows))
    card.title = f"this machine at its best: {device.flops_per_second / 1e9:.0f} GFLOP/s, {device.bytes_per_second / 1e9:.1f} GB/s"

    def line(label: str, values: Iterable[str]) -> None:
        card.add_row(label, *values)

    costs = [row.cost for row in record.rows]
    for phase in ("vision", "prefill", "decode"):
        parts = [None if cost is None else getattr(cost, phase) for cost in costs]
        line(f"{phase}, GFLOP", (_number(part and part.flops, 1e9) for part in parts))
        line(f"{phase}, MB", (_number(part and part.bytes, 1e6) for part in parts))
    line("cache, MB", (_number(None if cost is None else cost.cache_bytes, 1e6) for cost in costs))
    line("roofline / time to first token", (_share(row.roofline_fraction) for row in record.rows))
    line("roofline / time per token", (_share(row.tpot_roofline_fraction) for row in record.rows))
    line("peak memory alone, MB", (_number(row.peak_rss_bytes, 1e6) for row in record.rows))
    first = costs[0] and costs[0].first_token_flops
    if first and len(costs) > 1:
        shares = ((cost and cost.first_token_flops) for cost in costs)
        line(
            "operations to the first token / first column", (_share(n / first if n else None) for n in shares)
        )
    return card


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def figure(record: BenchRecord) -> Figure:
    """Time to the first token in its parts, and time per token, medians; whiskers reach to the 90th percentile."""
    from matplotlib.figure import Figure

    rows = record.rows
    plot = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    first, later = plot.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places, left = range(len(rows)), [0.0] * len(rows)
    for quantity, (label, colour) in _PHASES.items():
        widths = [getattr(row, quantity).p50 for row in rows]
        first.barh(places, widths, left=left, color=colour, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    later.barh(places, [row.tpot_ms.p50 for row in rows], color=_DECODE)
    for panel, spans in (
        (first, [row.ttft_ms for row in rows]),
        (later, [row.tpot_ms for row in rows]),
    ):
        panel.errorbar(
            [span.p50 for span in spans],
            places,
            xerr=[[0.0] * len(rows), [max(0.0, span.p90 - span.p50) for span in spans]],
            fmt="none",
            ecolor="#333333",
            capsize=3,
        )
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    for place, row in enumerate(rows):
        if row.cost is not None and row.cost.first_token_ms is not None:
            first.plot(
                [row.cost.first_token_ms] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=2
            )
        if row.cost is not None and row.cost.decode.roofline_ms is not None:
            later.plot(
                [row.cost.decode.roofline_ms] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=2
            )
    first.set_yticks(list(places), [without_math(row.name) for row in rows])
    first.invert_yaxis()
    first.set_xlabel("time to the first token, ms (black: the least this machine allows)")
    later.set_xlabel("per token, ms")
    plot.legend(loc="outside upper center", ncols=len(_PHASES), frameon=False, fontsize=8)
    return plot
