"""The image of a latency measurement: what every contender's time goes into, with the roofline as a mark."""

from __future__ import annotations

import io

from gap_export.evaluation.latency.record import BenchRecord

# Okabe and Ito's, as in the other plots.
_PHASES = {
    "encode_ms": ("vision", "#0072B2"),
    "splice_ms": ("splice", "#009E73"),
    "prefill_ms": ("prefill", "#E69F00"),
}
_DECODE = "#CC79A7"


def png(record: BenchRecord) -> bytes:
    """Time to the first token in its parts, and time per token, medians; whiskers reach to the 90th percentile."""
    from matplotlib.figure import Figure

    rows = record.rows
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    first, later = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places, left = range(len(rows)), [0.0] * len(rows)
    for quantity, (words, colour) in _PHASES.items():
        widths = [getattr(row, quantity).p50 for row in rows]
        first.barh(places, widths, left=left, color=colour, label=words)
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
    first.set_yticks(list(places), [row.name for row in rows])
    first.invert_yaxis()
    first.set_xlabel("time to the first token, ms (black: the least this machine allows)")
    later.set_xlabel("per token, ms")
    first.legend(frameon=False, fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    return target.getvalue()
