"""The record of a sweep, from answers made up to have known accuracies."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from gap_export.evaluation.sweep.record import (
    FULL,
    Answers,
    Positions,
    Settings,
    Skipped,
    SweepPoint,
    SweepRecord,
    record_from_answers,
)
from gap_export.evaluation.sweep.show import page, tables, verdict
from gap_export.positions import PositionPolicy

GAP, SHIFTED, PERMUTED = PositionPolicy.GAP, PositionPolicy.SHIFTED, PositionPolicy.PERMUTED
CASES = 40
SETTINGS = Settings(
    recipe={"name": "tiny"}, checkpoint_sha256="0", backend="onnxruntime", limit=CASES, scenes_seed=1, batch=4, threads=1, versions={}
)  # fmt: skip


def answers(hits: int, first: int = 0) -> Answers:
    """So many scenes are hit, from the given one on, the first of them exactly at the threshold."""
    ious = [0.5] + [0.75] * (hits - 1) if hits else []
    ious = [0.25] * first + ious
    return Answers(
        texts=("",) * CASES, ious=tuple(ious + [0.25] * (CASES - len(ious))), without_box=2, cut_off=1
    )


def point(pruner: str, kept: int, positions: Positions) -> SweepPoint:
    return SweepPoint(pruner=pruner, keep=kept / 36, kept=kept, positions=positions)


def record(*measured: tuple[SweepPoint, Answers], skipped: tuple[Skipped, ...] = ()) -> SweepRecord:
    full = point("none", 36, FULL), answers(38)
    return record_from_answers("tiny", 36, [full, *measured], skipped, SETTINGS)


USUAL = record(
    (point("random", 18, SHIFTED), answers(2, first=30)),
    (point("random", 18, PERMUTED), answers(4)),
    (point("random", 18, GAP), answers(30)),
    (point("random", 4, SHIFTED), answers(2, first=3)),
    (point("random", 4, GAP), answers(3)),
    (point("spatial", 18, GAP), answers(20)),
    skipped=(
        Skipped(**point("dart", 4, GAP).model_dump(), reason="keeps at least 5 tokens"),
        Skipped(**point("dart", 4, SHIFTED).model_dump(), reason="keeps at least 5 tokens"),
    ),
)  # fmt: skip


def test_rows() -> None:
    assert (USUAL.full, USUAL.rows[0].positions, USUAL.rows[0].kept) == (38 / 40, "full", 36)
    row = USUAL.rows[3]
    assert (row.pruner, row.kept, row.positions, row.cases) == ("random", 18, "gap", CASES)
    assert row.accuracy == 30 / 40, "IoU at the threshold is a hit"
    assert row.standard_error == pytest.approx((0.75 * 0.25 / 40) ** 0.5)
    assert row.low < row.accuracy < row.high
    assert row.mean_iou == pytest.approx((0.5 + 29 * 0.75 + 10 * 0.25) / 40)
    assert (row.without_box, row.cut_off, row.visual_tokens) == (2, 1, 36)


def test_gap_is_compared_with_shifted_scene_by_scene() -> None:
    clear, unclear = USUAL.gap_against_shifted
    assert (clear.pruner, clear.kept) == ("random", 18)
    assert (clear.gained, clear.lost) == (30, 2)
    assert clear.difference == 28 / 40
    assert clear.low < clear.difference < clear.high
    assert clear.beats
    assert (unclear.kept, unclear.gained, unclear.lost, unclear.beats) == (4, 3, 2, False)
    assert USUAL.gap_does_not_beat_shifted == (unclear,)


def test_a_tie_and_a_loss_are_no_win() -> None:
    tie, loss = record(
        (point("random", 18, SHIFTED), answers(20)),
        (point("random", 18, GAP), answers(20)),
        (point("random", 9, SHIFTED), answers(30)),
        (point("random", 9, GAP), answers(10)),
    ).gap_against_shifted  # fmt: skip
    assert (tie.difference, tie.beats) == (0, False)
    assert (loss.difference, loss.beats) == (-0.5, False)
    assert loss.high < 0


def test_the_verdict_says_where_gap_does_not_win() -> None:
    assert "1 of 2 points" in verdict(USUAL)
    assert "random at 4 of 36 (+0.025" in verdict(USUAL)
    won = record((point("random", 18, SHIFTED), answers(0)), (point("random", 18, GAP), answers(30)))
    assert "1 of 1 points" in verdict(won)
    assert "not in" not in verdict(won)
    assert "not both" in verdict(record())


def shown(each: SweepRecord) -> str:
    console = Console(file=io.StringIO(), width=160)
    for table in tables(each):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_tables() -> None:
    text = shown(USUAL)
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    (won,) = [line for line in lines if line.startswith("random 18 of 36")]
    assert won.startswith("random 18 of 36 0.050 0.100 0.750 +0.700 (")
    assert won.endswith(" yes")
    assert any("random 4 of 36 0.050 - 0.075 +0.025 (" in line and line.endswith(" no") for line in lines)
    assert any(line == "spatial 18 of 36 - - 0.500 - -" for line in lines)
    assert any(line == "dart 4 of 36 gap, shifted keeps at least 5 tokens" for line in lines)
    assert "unpruned: 0.950" in text
    assert "gap - shifted" not in shown(record((point("random", 18, GAP), answers(30))))


def test_the_page_is_markdown() -> None:
    text = page(USUAL, "sweep.png")
    assert text.startswith("# Sweep of tiny\n\ngap beats shifted in 1 of 2 points")
    assert "![accuracy against the number of visual tokens](sweep.png)" in text
    blocks = [block.splitlines() for block in text.split("\n\n")]
    points, skipped = [[line for line in block if line.startswith("|")] for block in blocks if len(block) > 2]
    assert [len(points), len(skipped)] == [2 + 3, 2 + 1]
    for table in (points, skipped):
        assert len({line.count("|") for line in table}) == 1, "as many columns in every line"
        assert set(table[1]) == {"|", "-"}
    assert "sweep.png" not in page(USUAL, None)


def test_records_come_back_from_json() -> None:
    text = USUAL.model_dump_json()
    assert SweepRecord.model_validate_json(text) == USUAL
    for row in json.loads(text)["rows"]:
        assert set(row) >= {"pruner", "keep", "kept", "positions", "accuracy", "cases"}
