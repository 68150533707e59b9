"""Attention in few bits: between quantizers, as statically quantised graphs have it, and in whole numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gap_export.linter import lint_graph

STEPS = """fine = Constant <value_float=0.1> () finer = Constant <value_float=0.004> () middle_i = Constant <value_int=128> ()
    middle = Cast <to=2> (middle_i) least_i = Constant <value_int=0> () least = Cast <to=2> (least_i)"""
BEFORE = """kt{l}_g = Concat <axis=1> (present.{l}.key, present.{l}.key) kt{l} = Transpose <perm=[0,1,3,2]> (kt{l}_g)
    both{l} = Concat <axis=1> (present.{l}.value, present.{l}.value)
    q{l}_8 = QuantizeLinear (q{l}_r, fine, middle) kt{l}_8 = QuantizeLinear (kt{l}, fine, middle)
    both{l}_8 = QuantizeLinear (both{l}, fine, middle)"""
AFTER = "scaled{l} = Mul (score{l}, scale) masked{l} = Where (mask, scaled{l}, minus) weights{l} = Softmax <axis=-1> (masked{l})"
STATIC = f"""{BEFORE} q{{l}}_d = DequantizeLinear (q{{l}}_8, fine, middle) kt{{l}}_d = DequantizeLinear (kt{{l}}_8, fine, middle)
    both{{l}}_d = DequantizeLinear (both{{l}}_8, fine, middle) score{{l}} = MatMul (q{{l}}_d, kt{{l}}_d) {AFTER}
    weights{{l}}_8 = QuantizeLinear (weights{{l}}, finer, least) weights{{l}}_d = DequantizeLinear (weights{{l}}_8, finer, least)
    a{{l}} = MatMul (weights{{l}}_d, both{{l}}_d)"""
WHOLE = f"""{BEFORE} score{{l}}_8 = QLinearMatMul (q{{l}}_8, fine, middle, kt{{l}}_8, fine, middle, fine, middle)
    score{{l}} = DequantizeLinear (score{{l}}_8, fine, middle) {AFTER} weights{{l}}_8 = QuantizeLinear (weights{{l}}, finer, least)
    a{{l}}_8 = QLinearMatMul (weights{{l}}_8, finer, least, both{{l}}_8, fine, middle, fine, middle)
    a{{l}} = DequantizeLinear (a{{l}}_8, fine, middle)"""
DYNAMIC = f"""{BEFORE} q{{l}}_int, q{{l}}_step, q{{l}}_off = DynamicQuantizeLinear (q{{l}}_r)
    kt{{l}}_int, kt{{l}}_step, kt{{l}}_off = DynamicQuantizeLinear (kt{{l}})
    score{{l}}_int = MatMulInteger (q{{l}}_int, kt{{l}}_int, q{{l}}_off, kt{{l}}_off) score{{l}}_f = Cast <to=1> (score{{l}}_int)
    score{{l}}_step = Mul (q{{l}}_step, kt{{l}}_step) score{{l}} = Mul (score{{l}}_f, score{{l}}_step) {AFTER}
    a{{l}} = MatMul (weights{{l}}, both{{l}})"""
ROTATE = """{x}_few = QuantizeLinear ({x}, fine, middle) {x}_1 = DequantizeLinear ({x}_few, fine, middle)
    {x}_2 = DequantizeLinear ({x}_few, fine, middle) {x}_a = Slice ({x}_1, at0, at8, ax3) {x}_b = Slice ({x}_1, at8, at16, ax3)
    {x}_n = Neg ({x}_b) {x}_h = Concat <axis=-1> ({x}_n, {x}_a) {x}_c = Mul ({x}_2, cos) {x}_s = Mul ({x}_h, sin)
    {x}_cf = QuantizeLinear ({x}_c, fine, middle) {x}_cd = DequantizeLinear ({x}_cf, fine, middle) {x}_r = Add ({x}_cd, {x}_s)"""
"""A pair of quantizers for each reader of a tensor."""


@pytest.mark.parametrize("attention", [STATIC, WHOLE, DYNAMIC], ids=["static", "whole", "dynamic"])
@pytest.mark.parametrize(("angles", "answer"), [("ids", "survive"), ("range", "do not survive")])
def test_attention_in_few_bits_is_recognised(
    parts: SimpleNamespace, attention: str, angles: str, answer: str
) -> None:
    small = parts.Small(attention=attention, extra=STEPS, angles=parts.ANGLES[angles])
    report = lint_graph(small.model(), prove=True)
    assert report.attention_layers == 2
    assert report.proof is not None
    assert (report.verdict.answer, report.proof.outcome) == (answer, answer), report.verdict.reason
    assert not any(finding.rule == "mask-follows-slots" for finding in report.errors)


def test_a_rotary_embedding_between_quantizers_is_recognised(parts: SimpleNamespace) -> None:
    report = lint_graph(parts.Small(attention=STATIC, extra=STEPS, rotate=ROTATE).model(), prove=True)
    assert report.verdict.answer == "survive", report.verdict.reason
    assert report.proof is not None
    assert report.proof.outcome == "survive"
    counted = parts.Small(attention=STATIC, extra=STEPS, rotate=ROTATE, angles=parts.ANGLES["range"])
    assert "counted by Range" in lint_graph(counted.model()).verdict.reason


def test_a_cache_in_few_bits_is_a_past(parts: SimpleNamespace) -> None:
    signed = "fine = Constant <value_float=0.1> () middle_i = Constant <value_int=0> () middle = Cast <to=3> (middle_i)"
    joined = """{n}{l}_new = QuantizeLinear ({new}, fine, middle) present.{l}.{kind} = Concat <axis=2> (past.{l}.{kind}, {n}{l}_new)
        {n}{l}_all = DequantizeLinear (present.{l}.{kind}, fine, middle)"""
    cache = joined.replace("{n}", "k").replace("{kind}", "key").replace("{new}", "k{l}_r")
    cache += " " + joined.replace("{n}", "v").replace("{kind}", "value").replace("{new}", "v{l}")
    mask = """past_1 = Shape <start=2, end=3> (past.0.key) past_0 = Squeeze (past_1) all = Add (past_0, length)
        keys_T = Range (zero, all, one) queries_Q = Range (past_0, all, one) rows_Q = Unsqueeze (queries_Q, ax1)
        columns_T = Unsqueeze (keys_T, ax0) mask = LessOrEqual (columns_T, rows_Q)"""
    small = parts.Small(
        extra=signed,
        cache=cache,
        mask=mask,
        attention="a{l} = Attention <is_causal=0> (q{l}_r, k{l}_all, v{l}_all, mask)",
        past="int8[B,1,P,16]",
        present="int8[B,1,T,16]",
        inputs=("inputs_embeds", "position_ids", "last_index"),
    )
    report = lint_graph(small.model(), prove=True)
    assert report.proof is not None
    assert (report.verdict.answer, report.proof.outcome) == ("survive", "survive")
    small.angles = "before = Shape <start=2, end=3> (past.0.key) all_ids = Add (position_ids, before) ids_BS = Cast <to=1> (all_ids)"
    assert "after a longer past" in lint_graph(small.model()).verdict.reason
