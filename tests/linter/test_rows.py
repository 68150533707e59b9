"""Rows picked by counting: the verdict is that of the table they are picked from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.linter import Report, lint_graph
from gap_export.linter.call import Call
from gap_export.linter.rotary import Rows


def lint(small: SimpleNamespace, *, prove: bool = False) -> Report:
    return lint_graph(small.model(), prove=prove)


@pytest.mark.parametrize("rotate", ["microsoft-rows", "operator-rows"])
def test_a_table_made_from_ids_survives_though_its_rows_are_counted(
    parts: SimpleNamespace, rotate: str
) -> None:
    report = lint(parts.Small(rotate=parts.ROTATE[rotate], rows=parts.TOKEN_ROWS), prove=True)
    assert report.verdict.answer == "survive", report.verdict.reason
    assert report.proof is not None
    assert report.proof.outcome == "survive"


@pytest.mark.parametrize("operands", ["cos_rows, sin_rows, places", "cos_rows, sin_rows"])
def test_attention_that_rotates_by_such_a_table_survives(parts: SimpleNamespace, operands: str) -> None:
    report = lint(parts.inside(operands), prove=True)
    assert report.verdict.answer == "survive", report.verdict.reason
    assert report.proof is not None
    assert report.proof.outcome == "survive"
    assert {f.rule for f in report.errors} == set()


def test_ids_of_another_name_are_found_in_tables(parts: SimpleNamespace) -> None:
    small = parts.inside("cos_rows, sin_rows, places")
    proto = small.proto(lambda text: text.replace("position_ids", "rope_index"))
    report = lint_graph(ir.from_proto(proto), prove=True)
    assert report.verdict.reason.startswith("rope_index reach")
    assert report.proof is not None
    assert report.proof.outcome == "survive"


def test_such_attention_gives_all_rows_of_a_batch_the_ids_of_the_first(parts: SimpleNamespace) -> None:
    report = lint(parts.inside("cos_rows, sin_rows, places", batch="B"), prove=True)
    assert report.verdict.answer == "do not survive"
    assert "a row of a batch" in report.verdict.reason
    assert report.proof is not None
    assert "row 0 of a batch" in report.proof.sentence
    operators = parts.Small(rotate=parts.ROTATE["microsoft-rows"], rows=parts.TOKEN_ROWS)
    assert lint(operators).verdict.survives  # they read an index per token and row


@pytest.mark.parametrize(
    ("operands", "angles"),
    [
        ("cos_half, sin_half, position_ids", "ids"),  # constant tables: the index counts from its first on
        ("cos_half, sin_half, places", "ids"),
        ("cos_half, sin_half", "ids"),
        ("cos_rows, sin_rows, places", "range"),
        ("cos_rows, sin_rows, places", "first"),
        ("cos_rows, sin_rows, places", "relative"),
    ],
)
def test_tables_that_do_not_follow_the_ids_do_not_survive(
    parts: SimpleNamespace, operands: str, angles: str
) -> None:
    small = parts.inside(operands, angles=parts.ANGLES[angles])
    report = lint(small)
    assert report.verdict.answer == "do not survive", report.verdict.reason


@pytest.mark.parametrize(
    ("places", "answer"),
    [
        ("other = Identity (places)", "survive"),
        ("back = Neg (places) last = Sub (extent, one) other = Add (back, last)", "do not survive"),
        ("other = Sub (places, places)", "do not survive"),
        ("none = Sub (position_ids, position_ids) other = Add (places, none)", "survive"),
        ("two = Add (one, one) other = Div (places, two)", "do not survive"),
    ],
)
def test_which_rows_are_picked_is_looked_at(parts: SimpleNamespace, places: str, answer: str) -> None:
    rotate = "{x}_r = com.microsoft.RotaryEmbedding ({x}, other, cos_rows, sin_rows)"
    inputs = ("float[1,S,32] inputs_embeds", "int64[1,S] position_ids", "write_index", "last_index")
    small = parts.Small(rotate=rotate, rows=parts.TOKEN_ROWS, extra=places, inputs=inputs)
    assert lint(small).verdict.answer == answer


def test_tables_of_either_length_of_a_longrope_are_constants(parts: SimpleNamespace) -> None:
    tables = """long = Greater (length, capacity)
        cos_of, sin_of = If (long) <
            then_branch = t () => (float[64,8] ct, float[64,8] st) { ct = Identity (cos_half) st = Identity (sin_half) },
            else_branch = e () => (float[64,8] ce, float[64,8] se) { ce = Identity (sin_half) se = Identity (cos_half) }>"""
    rotate = "{x}_r = com.microsoft.RotaryEmbedding ({x}, ids_int, cos_of, sin_of)"
    rows = "ids_int = Cast <to=7> (ids_BS)"
    for angles, answer in (("ids", "survive"), ("range", "do not survive")):
        small = parts.Small(rotate=rotate, rows=rows, extra=tables, angles=parts.ANGLES[angles])
        assert lint(small).verdict.answer == answer


def picked(places: str, past: int) -> np.ndarray | None:
    """Rows of a table 0, 1, 2, ... that two rows of three tokens get."""
    table, index, lengths = (ir.Value(name=name) for name in ("table", "index", "lengths"))
    found = {
        table: np.arange(40)[:, None],
        index: np.array([[4, 9, 11], [20, 30, 31]]),
        lengths: np.array([past + 2, past + 2]),
    }
    rows = {
        "operator": Rows(table, index),
        "offset": Rows(table, lengths),
        "attention": Rows(table, index, lengths),
        "attention without index": Rows(table, None, lengths),
    }[places]
    if places == "offset":
        found[lengths] = np.array([7])
    result = rows.pick(found, Call(2, 3, past))
    return None if result is None else result[..., 0]


@pytest.mark.parametrize(
    ("places", "past", "wanted"),
    [
        ("operator", 0, [[4, 9, 11], [20, 30, 31]]),
        ("offset", 0, [[7, 8, 9], [7, 8, 9]]),
        ("attention", 0, [[4, 5, 6], [4, 5, 6]]),
        ("attention", 5, [[4, 9, 11], [20, 30, 31]]),
        ("attention without index", 0, [[0, 1, 2], [0, 1, 2]]),
        ("attention without index", 5, [[5, 6, 7], [5, 6, 7]]),
        ("attention without index", 39, None),
    ],
)
def test_rows_are_picked_as_onnx_runtime_picks_them(places: str, past: int, wanted: object) -> None:
    result = picked(places, past)
    assert (None if result is None else result.tolist()) == wanted
