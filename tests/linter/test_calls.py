"""Inputs of a call, whatever an exporter named them and however it laid them out: batches of one extent, several ids to a token."""

from __future__ import annotations

from types import SimpleNamespace

import onnx_ir as ir
import pytest

from gap_export.linter import Report, lint_graph

CAUSAL = """keys_C = Range (zero, length, one) rows_Q = Unsqueeze (keys_C, ax1) columns_K = Unsqueeze (keys_C, ax0)
    mask = LessOrEqual (columns_K, rows_Q)"""
SECTIONS = """at5 = Constant <value_ints=[5]> ()
    time_BS1 = Unsqueeze (time_BS, ax2) height_BS1 = Unsqueeze (height_BS, ax2) width_BS1 = Unsqueeze (width_BS, ax2)
    time_f = Mul (time_BS1, inv_freq) height_f = Mul (height_BS1, inv_freq) width_f = Mul (width_BS1, inv_freq)
    time_s = Slice (time_f, at0, at2, ax2) height_s = Slice (height_f, at2, at5, ax2) width_s = Slice (width_f, at5, at8, ax2)
    freqs = Concat <axis=-1> (time_s, height_s, width_s) angle = Concat <axis=-1> (freqs, freqs)
    cos3 = Cos (angle) sin3 = Sin (angle) cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""
"""M-RoPE: two frequencies of time, three of height, three of width."""
APART = """ids_f = Cast <to=1> (first) time, height, width = Split <axis=0, num_outputs=3> (ids_f)
    time_BS = Squeeze (time, ax0) height_BS = Squeeze (height, ax0) width_BS = Squeeze (width, ax0)"""


def prompt(parts: SimpleNamespace, batch: str = "B", **changes: object) -> SimpleNamespace:
    """A prompt without a cache."""
    ids = changes.pop("ids", f"int64[{batch},S]")
    baseline = {
        "mask": CAUSAL,
        "cache": parts.NO_CACHE,
        "present": f"float[{batch},1,S,16]",
        "inputs": (f"float[{batch},S,32] inputs_embeds", f"{ids} position_ids", "last_index"),
    }
    return parts.Small(**{**baseline, **changes})


def outcomes(report: Report) -> tuple[str, str]:
    assert report.proof is not None
    return report.verdict.answer, report.proof.outcome


@pytest.mark.parametrize("batch", ["2", "4"])
@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "survive"),
        ({"rows": "TOKEN_ROWS", "rotate": "microsoft-rows"}, "survive"),
        (
            {"angles": "of_one = Slice (position_ids, at0, at1, ax0) ids_BS = Cast <to=1> (of_one)"},
            "do not survive",
        ),
    ],
)
def test_each_row_of_a_batch_of_one_extent_has_its_own_ids(
    parts: SimpleNamespace, batch: str, changes: dict[str, str], answer: str
) -> None:
    if "rows" in changes:
        changes = {"rows": parts.TOKEN_ROWS, "rotate": parts.ROTATE[changes["rotate"]]}
    report = lint_graph(prompt(parts, batch, **changes).model(), prove=True)
    assert outcomes(report) == (answer, answer), report.verdict.reason


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        ("int64[3,B,S]", "first = Identity (position_ids)"),
        ("int64[C,B,S]", "first = Identity (position_ids)"),
        ("int64[B,3,S]", "first = Transpose <perm=[1,0,2]> (position_ids)"),
        ("int64[B,S,3]", "first = Transpose <perm=[2,0,1]> (position_ids)"),
        ("int64[4,B,S]", "at4 = Constant <value_ints=[4]> () first = Slice (position_ids, at1, at4, ax0)"),
        ("int64[3,S]", "first = Unsqueeze (position_ids, ax1)"),
    ],
)
def test_three_ids_of_a_token_are_found_wherever_they_lie(
    parts: SimpleNamespace, ids: str, first: str
) -> None:
    small = prompt(
        parts, "1" if ids == "int64[3,S]" else "B", ids=ids, angles=f"{first} {APART}", rows=SECTIONS
    )
    report = lint_graph(small.model(), prove=True)
    assert outcomes(report) == ("survive", "survive"), report.verdict.reason
    small.rows = SECTIONS.replace("Mul (width_BS1", "Mul (height_BS1")
    last = 3 if "4," in ids else 2
    assert f"row {last} of the ids is not read" in lint_graph(small.model()).verdict.reason


@pytest.mark.parametrize("name", ["tokens", "token_ids", "idx", "x"])
def test_tokens_of_any_name_differ_from_each_other(parts: SimpleNamespace, name: str) -> None:
    # Alike, they would give the same logits whatever their ids.
    def looked_up(text: str) -> str:
        text = text.replace("float[B,S,32] inputs_embeds", f"int64[B,S] {name}")
        text = text.replace("h0 = Identity (inputs_embeds)", f"h0 = Gather (position_table, {name})")
        return text.replace("(inputs_embeds)", f"({name})")

    report = lint_graph(ir.from_proto(prompt(parts).proto(looked_up)), prove=True)
    assert outcomes(report) == ("survive", "survive")


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias", "attn_bias"])
def test_a_mask_to_be_added_is_causal_whatever_its_name(parts: SimpleNamespace, name: str) -> None:
    small = prompt(parts, mask=f"mask = Identity ({name})")
    small.inputs = (*small.inputs, f"float[B,1,S,T] {name}")
    assert outcomes(lint_graph(small.model(), prove=True)) == ("survive", "survive")


def test_a_table_cut_to_the_sequence_has_no_angles_for_gaps(parts: SimpleNamespace) -> None:
    # cos_cached[:seq_len][position_ids], as older models have it: contiguous ids are always found.
    cut = """ids_int = Cast <to=7> (ids_BS) cos_cut = Slice (cos_table, at0, extent, ax0) sin_cut = Slice (sin_table, at0, extent, ax0)
        cos3 = Gather (cos_cut, ids_int) sin3 = Gather (sin_cut, ids_int) cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""
    report = lint_graph(prompt(parts, rows=cut).model(), prove=True)
    assert outcomes(report) == ("do not survive", "do not survive")
    assert "cut to the length of the sequence" in report.verdict.reason
    assert report.proof is not None
    assert "more tokens have such ids" in report.proof.sentence
    assert outcomes(lint_graph(prompt(parts, rows=parts.TABLE_ROWS).model(), prove=True)) == (
        "survive",
        "survive",
    )


def test_extents_without_a_name_are_told_by_where_they_stand(parts: SimpleNamespace) -> None:
    for small in (prompt(parts), parts.Small()):
        proto = small.proto()
        for value in proto.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")
        assert outcomes(lint_graph(ir.from_proto(proto), prove=True)) == ("survive", "survive")


def test_the_standard_domain_has_two_names(parts: SimpleNamespace) -> None:
    proto = prompt(parts).proto()
    for entry in (*proto.graph.node, *proto.opset_import):
        entry.domain = entry.domain or "ai.onnx"
    assert lint_graph(ir.from_proto(proto)).verdict.survives


@pytest.mark.parametrize(("shape", "axes"), [("int64[1]", "ax0"), ("int64", "at01")])
def test_one_number_is_the_id_of_a_step(parts: SimpleNamespace, shape: str, axes: str) -> None:
    inputs = (
        "float[1,1,32] inputs_embeds",
        f"{shape} input_pos",
        "int64[1] write_index",
        "int64[1] last_index",
    )
    angles = f"at01 = Constant <value_ints=[0, 1]> () ids = Cast <to=1> (input_pos) ids_BS = Unsqueeze (ids, {axes})"
    step = parts.Small(angles=angles, inputs=inputs, past="float[1,1,12,16]", present="float[1,1,12,16]")
    assert outcomes(lint_graph(step.model(), prove=True)) == ("survive", "survive")
    # The same number is a count where it says how many tokens came before several.
    inputs = ("float[1,S,32] inputs_embeds", *inputs[1:])
    counted = "counted = Range (zero, length, one) all = Add (input_pos, counted) ids = Cast <to=1> (all) ids_BS = Unsqueeze (ids, ax0)"
    report = lint_graph(parts.Small(**{**vars(step), "angles": counted, "inputs": inputs}).model())
    assert report.verdict.answer == "do not survive"


def test_a_window_that_lets_nothing_of_a_gap_through_is_no_contradiction(parts: SimpleNamespace) -> None:
    near = """three_0 = Constant <value_int=3> () distance = Sub (rows_Q, columns_K) close = Less (distance, three_0)
        not_later = GreaterOrEqual (distance, zero) mask = And (close, not_later)"""
    mask = CAUSAL.replace("mask = LessOrEqual (columns_K, rows_Q)", near)
    assert outcomes(lint_graph(prompt(parts, mask=mask).model(), prove=True)) == ("survive", "survive")
    counted = prompt(parts, mask=mask, angles=parts.ANGLES["range"])
    assert outcomes(lint_graph(counted.model(), prove=True)) == ("do not survive", "do not survive")


def test_ids_that_play_no_part_beside_rows_of_the_caller_are_not_measured(parts: SimpleNamespace) -> None:
    small = prompt(parts, angles="", rows="cos = Unsqueeze (cos_rows, ax1) sin = Unsqueeze (sin_rows, ax1)")
    small.inputs = (*small.inputs, "float[B,S,16] cos_rows", "float[B,S,16] sin_rows")
    assert outcomes(lint_graph(small.model(), prove=True)) == ("survive", "not run here")


def test_nodes_may_stand_in_any_order(parts: SimpleNamespace) -> None:
    proto = prompt(parts).proto()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert lint_graph(ir.from_proto(proto)).verdict.survives


@pytest.mark.parametrize("name", ["past.", "layer_", "in_kv_", "prev_"])
def test_a_past_is_told_by_more_than_one_name(parts: SimpleNamespace, name: str) -> None:
    mask = """past_1 = Shape <start=2, end=3> (past.0.key) past_0 = Squeeze (past_1) all = Add (past_0, length)
        keys_T = Range (zero, all, one) queries_Q = Range (past_0, all, one) rows_Q = Unsqueeze (queries_Q, ax1)
        columns_T = Unsqueeze (keys_T, ax0) mask = LessOrEqual (columns_T, rows_Q)"""
    cache = {"cache": parts.GROW, "past": "float[B,1,P,16]", "present": "float[B,1,T,16]"}
    inputs = ("inputs_embeds", "position_ids", "last_index")
    added = "before = Shape <start=2, end=3> (past.0.key) all_ids = Add (position_ids, before) ids_BS = Cast <to=1> (all_ids)"
    for angles, reason in ((parts.ANGLES["ids"], "token by token"), (added, "after a longer past")):
        proto = prompt(parts, **cache, mask=mask, inputs=inputs, angles=angles).proto()
        for node in proto.graph.node:
            node.input[:] = [each.replace("past.", name) for each in node.input]
        for value in proto.graph.input:
            value.name = value.name.replace("past.", name)
        assert reason in lint_graph(ir.from_proto(proto)).verdict.reason
