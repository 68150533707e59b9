"""What the screen says of a recommendation, of one bundle and of many."""

from __future__ import annotations

import io

from gap_export.evaluation.recommend.choose import choose, choose_pruner
from gap_export.evaluation.recommend.record import LeftOut, Recommendation
from gap_export.evaluation.recommend.show import tables, verdict
from gap_export.terminal import Terminal
from tests.evaluation.recommend.test_choose import measured, runs_of


def shown(record: Recommendation) -> list[list[str]]:
    """Cells of every row of every table."""
    stream = io.StringIO()
    terminal = Terminal(file=stream, width=200)
    for table in tables(record):
        terminal.print(table)
    rows = [line for line in stream.getvalue().splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in row.strip("│┃").replace("┃", "│").split("│")] for row in rows]


def test_shares_of_a_bundle() -> None:
    times = {1.0: 50.0, 0.25: 20.0}
    record = choose(runs_of(k100=0.9, k50=0.9, k25=0.895, k10=0.8), 0.02, manifest_sha256="m", ttft_ms=times)
    header, *rows = shown(record)
    assert header == ["keep", "tokens", "accuracy, %", "loss, points", "95 % interval", "first token", ""]
    assert [(row[0], row[2], row[3], row[5], row[6]) for row in rows] == [
        ("1", "90.00", "0.00", "1.00 times as fast", ""),
        ("0.5", "90.00", "0.00", "-", ""),
        ("0.25", "89.50", "0.50", "2.50 times as fast", "<- this one"),
        ("0.1", "80.00", "10.00", "-", "may lose more"),
    ]


def test_nothing_to_take_of_a_bundle() -> None:
    record = choose(runs_of(k100=0.9, k25=0.885), 0.02, manifest_sha256="m")
    assert verdict(record).startswith("no smaller keep ratio is sure to lose at most 2 points")


def test_the_front_of_pruners_and_what_was_left_out() -> None:
    record = choose_pruner(
        measured(dart=(0.5, 0.9, 0.5), random=(0.5, 0.85, 0.6), spatial=(0.25, 0.7, 0.25)),
        0.02,
        ttft_ms=50.0,
        left_out=[LeftOut(pruner="trim", keeps=(0.5, 0.25), reason="has no text tower")],
    )
    header, *rows, below, left_out = shown(record)
    assert header[:2] == ["pruner", "keep"]
    assert [(row[0], row[1], row[6], row[7], row[8]) for row in rows] == [
        ("none", "1", "1.00 times as fast", "50.00", ""),
        ("dart", "0.5", "2.00 times as fast", "25.00", "<- this one"),
        ("spatial", "0.25", "4.00 times as fast", "12.50", "may lose more"),
    ]
    assert below == ["left out", "keep", "why"]
    assert left_out == ["trim", "0.5, 0.25", "has no text tower"]
    assert verdict(record) == (
        "dart, keep 0.5: first token 2.00 times as fast, accuracy +0.00 points, +0.00 at worst"
        "; none of 400 expressions changed, which does not exclude a loss of 0.75 points"
    )


def test_an_interval_of_some_width_speaks_for_itself() -> None:
    record = choose_pruner(measured(dart=(0.5, 0.895, 0.5)), 0.02, ttft_ms=50.0)
    assert record.chosen_pruner == "dart"
    assert "exclude" not in verdict(record)


def test_nothing_to_take_among_pruners() -> None:
    record = choose_pruner(measured(dart=(0.5, 0.7, 0.5)), 0.02, ttft_ms=50.0)
    assert "nothing that is faster is sure to lose at most 2 points" in verdict(record)
