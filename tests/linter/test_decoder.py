"""Each rule of decoder graphs: a small graph that breaks just it, and graphs that pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gap_export.errors import LintError
from gap_export.linter import Report, lint_graph

IDS_ONLY = ("inputs_embeds", "position_ids", "write_index", "last_index")
GQA = (
    "a{l}_f, present.{l}.key, present.{l}.value = com.microsoft.GroupQueryAttention "
    "<num_heads=2, kv_num_heads=1, do_rotary=%d> (%s, %s, vp{l}, past.{l}.key, past.{l}.value, "
    "lengths, total, %s) a{l}_s = Reshape (a{l}_f, split_q) a{l} = Transpose <perm=[0,2,1,3]> (a{l}_s)"
)
LENGTHS = """start_32 = Cast <to=6> (write_index) length_32 = Cast <to=6> (length) one_32 = Cast <to=6> (one)
    ends = Add (start_32, length_32) lengths = Sub (ends, one_32) totals = ReduceMax <keepdims=0> (ends) total = Identity (totals)"""


def rules_of(report: Report, severity: str | None = None) -> set[str]:
    return {f.rule for f in report.findings if severity in (None, f.severity)}


def lint(parts: SimpleNamespace, strict: bool = False, **changes: Any) -> Report:
    return lint_graph(parts.Small(**changes).model(), strict=strict)


def test_the_contract_of_our_own_decoder_passes(parts: SimpleNamespace) -> None:
    report = lint(parts, strict=True)
    assert report.verdict.survives
    assert report.findings == ()
    assert (report.kind, report.attention_layers) == ("decoder", 2)
    assert report.verdict.reason == (
        "position_ids reach the rotary angles of all 2 attention layers, token by token"
    )
    report.raise_for_errors()


@pytest.mark.parametrize(
    ("rotate", "rows"),
    [
        ("half", "ROWS"),
        ("half", "TABLE_ROWS"),
        ("apart", "HALF_ROWS"),
        ("interleaved", "ROWS"),
        ("matrix", "ROWS"),
        ("operator", "HALF_ROWS"),
        ("operator-ids", "TABLE_ROWS"),
        ("microsoft", "TABLE_ROWS"),
    ],
)
@pytest.mark.parametrize("angles", ["ids", "range"])
@pytest.mark.parametrize("attention", ["ATTENTION", "DECOMPOSED"])
def test_every_form_of_rotary_embedding_and_attention_is_recognised(
    parts: SimpleNamespace, rotate: str, rows: str, angles: str, attention: str
) -> None:
    report = lint(
        parts,
        rotate=parts.ROTATE[rotate],
        rows=getattr(parts, rows),
        angles=parts.ANGLES[angles],
        attention=getattr(parts, attention),
    )
    assert report.attention_layers == 2
    assert report.verdict.survives == (angles == "ids"), report.verdict.reason
    rope = [f for f in report.findings if f.rule == "rope-reads-position-ids"]
    ends = 2 if rotate == "apart" else 1  # halves that stay apart end in two additions
    assert [f.count for f in rope] == ([] if angles == "ids" else [4 * ends])


@pytest.mark.parametrize(
    ("angles", "words"),
    [
        ("range", "counted by Range"),
        ("cumsum", "counted by CumSum over attention_mask"),
        ("shape", "depend only on the shape of position_ids"),
        ("first", "changes the angles of other tokens"),
        ("relative", "changes the angles of other tokens"),
        ("running", "changes the angles of other tokens"),
        ("summed", "depends on where it stands"),
        ("clamped", "rounded or clamped"),
        ("rounded", "rounded or clamped"),
    ],
)
def test_angles_that_do_not_follow_the_ids_are_caught(
    parts: SimpleNamespace, angles: str, words: str
) -> None:
    inputs = (*IDS_ONLY, "attention_mask") if angles == "cumsum" else IDS_ONLY
    report = lint(parts, angles=parts.ANGLES[angles], inputs=inputs)
    assert not report.verdict.survives
    assert words in report.verdict.reason
    assert rules_of(report, "error") == {"rope-reads-position-ids"}


def test_angles_folded_to_constants_are_caught(parts: SimpleNamespace) -> None:
    report = lint(parts, angles="", rows="cos = Identity (baked_cos) sin = Identity (baked_sin)")
    assert "constants, folded at export time" in report.verdict.reason
    assert "position_ids" in {f.node for f in report.findings if f.rule == "every-input-used"}


def test_a_graph_without_position_ids_says_so(parts: SimpleNamespace) -> None:
    inputs = ("inputs_embeds", "write_index", "last_index")
    report = lint(parts, angles=parts.ANGLES["range"], inputs=inputs)
    assert not report.verdict.survives
    assert "there is no position-ids input" in report.verdict.reason


def test_one_layer_that_counts_is_enough(parts: SimpleNamespace) -> None:
    counted = parts.ROTATE["half"].replace("cos)", "other_cos)").replace("sin)", "other_sin)")
    extra = "other_cos = Identity (baked_cos) other_sin = Identity (baked_sin)"
    report = lint(parts, second={"rotate": counted}, extra=extra)
    assert not report.verdict.survives
    assert [f.count for f in report.errors] == [2]  # queries and keys of one layer


def test_ids_are_found_under_another_name(parts: SimpleNamespace) -> None:
    angles = parts.ANGLES["ids"].replace("position_ids", "positions")
    inputs = ("inputs_embeds", "int64[B,S] positions", "write_index", "last_index")
    report = lint(parts, angles=angles, inputs=inputs)
    assert report.verdict.survives
    assert report.verdict.reason.startswith("positions reach")
    mask = parts.Small(angles=parts.ANGLES["cumsum"], inputs=(*inputs[:1], *inputs[2:], "attention_mask"))
    assert not lint_graph(mask.model()).verdict.survives


def test_an_offset_for_the_whole_call_is_not_a_position_id_per_token(parts: SimpleNamespace) -> None:
    angles = "ids_int = Identity (position_ids)"
    inputs = ("inputs_embeds", "int64[1] position_ids", "write_index", "last_index")
    report = lint(parts, angles=angles, rows="", rotate=parts.ROTATE["microsoft"], inputs=inputs)
    assert not report.verdict.survives


def test_rows_that_the_caller_computes_survive(parts: SimpleNamespace) -> None:
    inputs = ("inputs_embeds", "float[B,S,32] rope_rotary_cos_sin", "write_index", "last_index")
    report = lint(parts, angles="", rows=parts.CALLER_ROWS, inputs=inputs)
    assert report.verdict.survives
    assert "the caller computes the rotary rows (rope_rotary_cos_sin)" in report.verdict.reason


def test_a_plugin_that_takes_rows_survives_and_an_opaque_one_does_not(parts: SimpleNamespace) -> None:
    plugin = "a{l} = plugin.AttentionPlugin (q{l}_r, present.{l}.key, present.{l}.value, %s)"
    none = {"angles": "", "rows": "", "rotate": parts.ROTATE["none"]}
    inputs = ("inputs_embeds", "float[B,S,32] rope_rotary_cos_sin", "write_index", "last_index")
    rows = lint(parts, **none, inputs=inputs, attention=plugin % "rope_rotary_cos_sin")
    assert rows.verdict.survives, rows.verdict.reason
    assert "rope_rotary_cos_sin" in rows.verdict.reason
    opaque = lint(parts, **none, attention=plugin % "position_ids")
    assert rules_of(opaque, "error") == {"no-rotary-inside-attention"}
    rotated_before = lint(parts, attention=plugin % "mask")
    assert rotated_before.verdict.survives


def test_no_rotary_embedding_at_all_is_an_error_and_in_some_layers_a_warning(parts: SimpleNamespace) -> None:
    bare = lint(parts, angles="", rows="", rotate=parts.ROTATE["none"])
    assert rules_of(bare, "error") == {"rope-reads-position-ids"}
    some = lint(parts, second={"rotate": parts.ROTATE["none"]})
    assert some.verdict.survives
    assert "1 of 2" in some.verdict.reason
    assert rules_of(some, "warning") == {"rope-reads-position-ids"}


def test_an_unknown_form_of_rotation_is_judged_by_what_enters_it(parts: SimpleNamespace) -> None:
    unknown = "{x}_r = Mul ({x}, cos)"
    assert lint(parts, second={"rotate": unknown}).verdict.survives
    counted = lint(parts, second={"rotate": unknown}, extra="", angles=parts.ANGLES["range"])
    assert not counted.verdict.survives


def test_learned_absolute_positions_survive(parts: SimpleNamespace) -> None:
    small = parts.Small(angles="", rows="", rotate=parts.ROTATE["none"])
    text = "position_BSH = Gather (position_table, position_ids) h0 = Add (inputs_embeds, position_BSH)"
    proto = small.proto(lambda source: source.replace("h0 = Identity (inputs_embeds)", text))
    report = lint_graph(parts.ir.from_proto(proto))
    assert report.verdict.survives
    assert "learned absolute positions" in report.verdict.reason


@pytest.mark.parametrize(
    ("operands", "words"),
    [
        ("cos_half, sin_half, position_ids", "reads only the first"),
        ("cos_half, sin_half", "has no position_ids"),
    ],
)
def test_rotary_inside_grouped_query_attention_is_caught(
    parts: SimpleNamespace, operands: str, words: str
) -> None:
    attention = GQA % (1, "qp{l}", "kp{l}", operands)
    report = lint(
        parts, angles="", rows="", mask=LENGTHS, cache="", rotate=parts.ROTATE["none"], attention=attention
    )
    assert not report.verdict.survives
    assert rules_of(report, "error") == {"no-rotary-inside-attention"}
    assert words in report.verdict.reason


def test_grouped_query_attention_over_rotated_queries_survives_with_a_warning(parts: SimpleNamespace) -> None:
    fused = (GQA % (0, "q{l}_j", "k{l}_j", "")).replace(", )", ")")
    attention = "q{l}_t = Transpose <perm=[0,2,1,3]> (q{l}_r) q{l}_j = Reshape (q{l}_t, join) " + fused
    keys = "k{l}_t = Transpose <perm=[0,2,1,3]> (k{l}_r) k{l}_j = Reshape (k{l}_t, join_k)"
    report = lint(parts, mask=LENGTHS, cache=keys, attention=attention)
    assert report.verdict.survives, report.verdict.reason
    noted = [f for f in report.warnings if f.rule == "standard-ops-only"]
    assert "GroupQueryAttentionFusion" in noted[0].hint
    assert noted[0].count == 2


def test_a_mask_made_from_ids_is_caught(parts: SimpleNamespace) -> None:
    change = {
        "cache": parts.NO_CACHE,
        "present": "float[B,1,S,16]",
        "inputs": ("inputs_embeds", "position_ids"),
    }
    for attention in (parts.ATTENTION, parts.DECOMPOSED):
        report = lint(parts, mask=parts.PACKED_MASK, attention=attention, **change)
        assert not report.verdict.survives
        assert rules_of(report, "error") == {"mask-follows-slots"}
    # Reading only the shape of the ids is harmless.
    shaped = parts.MASK.replace("(zero, length, one)", "(zero, rows, one)")
    extent = "ids_extent = Shape <start=1, end=2> (position_ids) rows = Squeeze (ids_extent) "
    assert lint(parts, mask=extent + shaped, strict=True).findings == ()


def test_slots_made_from_ids_are_caught(parts: SimpleNamespace) -> None:
    slot = "first = Slice (position_ids, at0, at1, ax1) slot = Squeeze (first, ax1)"
    cache = parts.SCATTER.replace("write_index", "slot")
    report = lint(parts, extra=slot, cache=cache)
    assert not report.verdict.survives
    assert rules_of(report, "error") == {"cache-follows-slots"}


@pytest.mark.parametrize("cache", ["SCATTER", "GROW"])
def test_a_causal_flag_over_a_cache_is_caught(parts: SimpleNamespace, cache: str) -> None:
    attention = parts.ATTENTION.replace("is_causal=0", "is_causal=1").replace(", mask", "")
    report = lint(parts, attention=attention, cache=getattr(parts, cache))
    assert "no-causal-flag-with-cache" in rules_of(report, "error")
    assert report.verdict.survives  # the ids do; decoding does not, and the reason says so
    assert "decode step sees only the first key" in report.verdict.reason
    with pytest.raises(LintError, match="is_causal=1"):
        report.raise_for_errors()


def test_a_causal_flag_without_a_cache_is_fine(parts: SimpleNamespace) -> None:
    attention = parts.ATTENTION.replace("is_causal=0", "is_causal=1").replace(", mask", "")
    change = {
        "cache": parts.NO_CACHE,
        "present": "float[B,1,S,16]",
        "mask": "",
        "inputs": ("inputs_embeds", "position_ids"),
    }
    assert rules_of(lint(parts, attention=attention, **change)) == {"cache-in-place"}


def test_a_cache_inside_attention_and_lengths_are_errors_only_for_us(parts: SimpleNamespace) -> None:
    inside = (
        "a{l}, present.{l}.key, present.{l}.value = Attention <is_causal=1> "
        "(q{l}_r, k{l}_r, v{l}, , past.{l}.key, past.{l}.value)"
    )
    change = {
        "attention": inside,
        "cache": "",
        "mask": "",
        "inputs": ("inputs_embeds", "position_ids", "last_index"),
    }
    lengths = {"attention": parts.ATTENTION.replace(", mask", ", , , , write_index")}
    for changes in (change, lengths):
        foreign = lint(parts, **changes)
        assert foreign.verdict.survives
        assert foreign.errors == ()
        assert "explicit-mask" in rules_of(foreign, "warning")
        assert "explicit-mask" in rules_of(lint(parts, strict=True, **changes), "error")


def test_a_cache_without_mask_or_lengths_is_attended_in_full(parts: SimpleNamespace) -> None:
    report = lint(parts, attention=parts.ATTENTION.replace(", mask", ""), mask="")
    assert rules_of(report, "error") == {"explicit-mask"}


def test_an_idle_input_is_an_error_for_us_and_a_warning_for_others(parts: SimpleNamespace) -> None:
    inputs = (*IDS_ONLY, "attention_mask")
    own = lint(parts, strict=True, inputs=inputs)
    assert [(f.rule, f.node) for f in own.errors] == [("every-input-used", "attention_mask")]
    assert lint(parts, inputs=inputs).errors == ()


def test_other_domains_are_errors_for_us_and_warnings_for_others(parts: SimpleNamespace) -> None:
    change = {"rotate": parts.ROTATE["microsoft"], "rows": parts.TABLE_ROWS.split("cos3")[0]}
    own = lint(parts, strict=True, **change)
    assert [(f.rule, f.count) for f in own.errors] == [("standard-ops-only", 4)]
    assert lint(parts, **change).errors == ()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("<axis=2>", '<axis=2, mode="circular">', "circular"),
        ("<axis=2>", "<axis=1>", "along axis 1"),
        (", write_index)", ")", "no write index"),
        ("past.{l}.value, v{l}", "past.{l}.key, v{l}", "a cache of another name"),
        ("(past.{l}.key,", "(copy{l},", "not a graph input itself"),
    ],
)
def test_a_cache_that_is_not_written_in_place_is_caught(
    parts: SimpleNamespace, before: str, after: str, words: str
) -> None:
    copies = "copy{l} = Identity (past.{l}.key) " if "copy" in after else ""
    cache = copies + parts.SCATTER.replace(before, after)
    report = lint(parts, strict=True, cache=cache)
    assert any(words in f.sentence and f.rule == "cache-in-place" for f in report.errors), report.findings
    assert report.verdict.survives


def test_a_past_that_others_read_cannot_share_its_buffer(parts: SimpleNamespace) -> None:
    attention = parts.ATTENTION.replace("present.{l}.value", "past.{l}.value")
    report = lint(parts, strict=True, attention=attention)
    assert [(f.rule, f.count) for f in report.errors] == [("cache-in-place", 2)]
    assert "read by other operators" in report.errors[0].sentence


def test_a_cache_that_varies_is_a_warning_for_others_and_ours_where_no_engine_is_built(
    parts: SimpleNamespace,
) -> None:
    varying = {"past": "float[B,1,P,16]", "present": "float[B,1,P,16]"}
    found = {f.sentence for f in lint(parts, **varying).findings if f.severity == "warning"}
    assert "its sequence length is not static, which TensorRT requires" in found
    assert lint(parts, strict=True, **varying).errors == ()


def test_a_growing_cache_is_a_warning_for_others_and_an_error_for_us(parts: SimpleNamespace) -> None:
    change = {"cache": parts.GROW, "past": "float[B,1,P,16]", "present": "float[B,1,T,16]"}
    foreign = lint(parts, **change)
    assert foreign.verdict.survives
    assert foreign.errors == ()
    assert rules_of(foreign, "warning") == {"cache-in-place"}
    assert rules_of(lint(parts, strict=True, **change), "error") == {"cache-in-place"}


def test_a_report_can_be_stored(parts: SimpleNamespace) -> None:
    report = lint(parts, angles=parts.ANGLES["range"])
    assert Report.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(LintError) as caught:
        report.raise_for_errors()
    assert caught.value.hint
    assert "rope-reads-position-ids" in str(caught.value)
