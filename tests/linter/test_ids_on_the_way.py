"""What may happen to position ids between their input and the angles, one thing after another; NumPy says what is left of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.linter import lint_graph

Ids = NDArray[np.float64]

KEPT = {
    "cast": "{y} = Cast <to=6> ({x})",
    "identity": "{y} = Identity ({x})",
    "constant added": "{y} = Add ({x}, seven)",
    "unsqueezed and back": "{y}_1 = Unsqueeze ({x}, ax0) {y}_2 = Unsqueeze ({y}_1, ax3) {y} = Squeeze ({y}_2, at0_3)",
    "expanded": "{y}_1 = Unsqueeze ({x}, ax2) {y}_2 = Expand ({y}_1, three) {y}_3 = ReduceMax <keepdims=0> ({y}_2, ax2) {y} = Identity ({y}_3)",
    "joined with constants and cut": "{y}_1 = Unsqueeze ({x}, ax2) {y}_2 = Concat <axis=2> ({y}_1, {y}_1) {y} = Gather <axis=2> ({y}_2, zero)",
    "large ones exchanged": "{y}_c = Less ({x}, zero) {y} = Where ({y}_c, zero, {x})",
    "either branch": """{y} = If (flag) <then_branch = {y}t () => (int64[B,S] {y}_t) {{ {y}_t = Identity ({x}) }},
        else_branch = {y}e () => (int64[B,S] {y}_e) {{ {y}_e = Add ({x}, one) }}>""",
    "scanned": """{y}_t = Transpose <perm=[1,0]> ({x}) {y}_s = Scan <num_scan_inputs=1, body = {y}b (int64[B] {y}_i) => (int64[B] {y}_o)
        {{ {y}_o = Add ({y}_i, one) }}> ({y}_t) {y} = Transpose <perm=[1,0]> ({y}_s)""",
    "looped": """{y}_yes = Equal (zero, zero) {y} = Loop (three_times, {y}_yes, {x}) <body = {y}b (int64 {y}_i, bool {y}_g, int64[B,S] {y}_v)
        => (bool {y}_on, int64[B,S] {y}_w) {{ {y}_on = Identity ({y}_g) {y}_w = Add ({y}_v, seven) }}>""",
    "function": "{y} = local.Same ({x})",
}
LOST = {
    "clipped": "{y} = Clip ({x}, zero, capacity)",
    "float16": "{y}_h = Cast <to=10> ({x}) {y} = Cast <to=7> ({y}_h)",
    "eight bits": "{y}_h = Cast <to=2> ({x}) {y} = Cast <to=7> ({y}_h)",
    "halved": "{y} = Div ({x}, by2)",
    "picked by Range": "{y}_s = Gather <axis=0> (slots_64, {x}) {y}_r = Range (zero, length, one) {y}_u = Unsqueeze ({y}_r, ax0) {y}_0 = Mul ({y}_s, zero) {y} = Add ({y}_0, {y}_u)",
    "first and Range": "{y}_f = Slice ({x}, at0, at1, ax1) {y}_r = Range (zero, length, one) {y} = Add ({y}_f, {y}_r)",
    "place added": "{y}_r = Range (zero, length, one) {y} = Add ({x}, {y}_r)",
    "running": "{y} = CumSum ({x}, one)",
    "turned round": "{y} = Slice ({x}, end, far, ax1, end)",
    "relative": "{y}_m = ReduceMax <keepdims=1> ({x}, ax1) {y} = Sub ({x}, {y}_m)",
    "branch that counts": """{y} = If (flag) <then_branch = {y}t () => (int64[B,S] {y}_t) {{ {y}_t = Identity ({x}) }},
        else_branch = {y}e () => (int64[B,S] {y}_e) {{ {y}_r = Range (zero, length, one) {y}_0 = Mul ({x}, zero) {y}_e = Add ({y}_0, {y}_r) }}>""",
    "function that counts": "{y} = local.Counted ({x})",
}
FUNCTIONS = """<domain: "local", opset_import: ["" : 24]> Same (given) => (same) { same = Identity (given) }
    <domain: "local", opset_import: ["" : 24]> Counted (given) => (counted) {
        one = Constant <value_int=1> () zero = Mul (given, given) nought = Sub (zero, zero) ones = Add (nought, one)
        counted = CumSum (ones, one) }"""


def decoder(parts: SimpleNamespace, steps: list[str]) -> object:
    """A decoder whose ids go through these steps."""
    text, name = ["flag = Greater (length, capacity)"], "position_ids"
    for i, step in enumerate(steps):
        text.append((KEPT | LOST)[step].format(x=name, y=f"ids_{i}"))
        name = f"ids_{i}"
    text.append(f"last_ids = Cast <to=7> ({name}) ids_BS = Cast <to=1> (last_ids)")
    # Every step gives 64-bit integers to the next.
    body = " ".join(text).replace("<to=6>", "<to=7>")

    def with_functions(source: str) -> str:
        return source.replace('"plugin" : 1', '"plugin" : 1, "local" : 1') + FUNCTIONS

    small = parts.Small(angles=body, layers=1)
    return parts.ir.from_proto(small.proto(with_functions))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from(sorted(KEPT)), max_size=2),
    lost=st.none() | st.sampled_from(sorted(LOST)),
    after=st.lists(st.sampled_from(sorted(KEPT)), max_size=2),
)
def test_ids_are_followed_through_any_of_it(
    parts: SimpleNamespace, before: list[str], lost: str | None, after: list[str]
) -> None:
    model = decoder(parts, [*before, *([lost] if lost else []), *after])
    report = lint_graph(model)  # type: ignore[arg-type]
    assert report.verdict.answer == ("do not survive" if lost else "survive"), report.verdict.reason


@pytest.mark.parametrize("step", [*KEPT, *LOST])
def test_each_step_alone(parts: SimpleNamespace, step: str) -> None:
    report = lint_graph(decoder(parts, [step]))  # type: ignore[arg-type]
    assert report.verdict.answer == ("do not survive" if step in LOST else "survive"), report.verdict.reason


CAUSAL_BY_ID = """row_ids = Unsqueeze (position_ids, ax2) column_ids = Unsqueeze (position_ids, ax1)
    seen = LessOrEqual (column_ids, row_ids) mask = Unsqueeze (seen, ax1)"""
BY_SLOT = """row_ids = Unsqueeze (position_ids, ax2) slot_S = Range (zero, length, one)
    seen = LessOrEqual (slot_S, row_ids) mask = Unsqueeze (seen, ax1)"""
CUSTOM = """row_ids = Unsqueeze (position_ids, ax2) column_ids = Unsqueeze (position_ids, ax1)
    seen = plugin.Sees (column_ids, row_ids) mask = Unsqueeze (seen, ax1)"""


@pytest.mark.parametrize(
    ("mask", "answer"), [(CAUSAL_BY_ID, "survive"), (BY_SLOT, "do not survive"), (CUSTOM, "cannot tell")]
)
def test_a_mask_that_reads_ids_is_evaluated(parts: SimpleNamespace, mask: str, answer: str) -> None:
    prompt = {
        "cache": parts.NO_CACHE,
        "present": "float[B,1,S,16]",
        "inputs": ("inputs_embeds", "position_ids", "last_index"),
    }
    report = lint_graph(parts.Small(mask=mask, **prompt).model())
    assert report.verdict.answer == answer, report.verdict.reason
    # Ids that only a mask reads are lost, whatever the mask makes of them.
    only = parts.Small(mask=mask, angles=parts.ANGLES["range"], **prompt)
    assert lint_graph(only.model()).verdict.answer == "do not survive"


ALIBI = """row_ids = Unsqueeze (position_ids, ax2) column_ids = Unsqueeze (position_ids, ax1)
    apart = Sub (column_ids, row_ids) near = Cast <to=1> (apart) seen = LessOrEqual (column_ids, row_ids)
    bias = Where (seen, near, minus) mask = Unsqueeze (bias, ax1)"""


def test_a_bias_made_from_ids_is_left_to_measuring(parts: SimpleNamespace) -> None:
    """ALiBi: attention falls with the distance between ids, and nothing is rotated."""
    small = parts.Small(
        mask=ALIBI,
        angles="",
        rows="",
        rotate=parts.ROTATE["none"],
        cache=parts.NO_CACHE,
        present="float[B,1,S,16]",
        inputs=("inputs_embeds", "position_ids", "last_index"),
    )
    report = lint_graph(small.model())
    assert report.verdict.answer == "cannot tell"
    assert "ALiBi" in report.verdict.reason
    assert lint_graph(small.model(), prove=True).verdict.answer == "survive"
    # Beside a rotary embedding it is a mask like any other.
    both = parts.Small(mask=ALIBI, cache=small.cache, present=small.present, inputs=small.inputs)
    assert lint_graph(both.model()).verdict.answer == "do not survive"


@pytest.mark.parametrize(
    "changes",
    [
        {"angles": "given = plugin.Renumber (position_ids) ids_BS = Cast <to=1> (given)"},
        {"rotate": "{x}_r = plugin.RotaryEmbedding ({x}, ids_BS)", "rows": ""},
        {"rotate": "{x}_r = plugin.Turn ({x}, ids_BS)", "rows": ""},
        {"rotate": "{x}_t = plugin.Norm ({x}) {x}_h = MatMul ({x}_t, rotation) {x}_c = Mul ({x}_t, cos) {x}_s = Mul ({x}_h, sin)"
         " {x}_r = Add ({x}_c, {x}_s)"},
        {"attention": "a{l} = plugin.FlashAttention (q{l}_r, present.{l}.key, present.{l}.value, mask)"},
        {"attention": "a{l} = plugin.FlashAttention (q{l}, present.{l}.key, present.{l}.value, position_ids)"},
        {"rotate": "{x}_r = Imagined ({x}, ids_BS)", "rows": ""},
    ],
)  # fmt: skip
def test_unknown_operators_are_never_said_to_carry_ids(
    parts: SimpleNamespace, changes: dict[str, str]
) -> None:
    report = lint_graph(parts.Small(**changes).model(), prove=True)
    assert report.verdict.answer == "cannot tell", report.verdict.reason
    assert not report.verdict.survives
    assert report.errors
    assert report.proof is not None
    assert report.proof.outcome == "not run here"


def test_unknown_operators_that_never_meet_the_ids_do_no_harm(parts: SimpleNamespace) -> None:
    attention = parts.ATTENTION.replace("a{l} =", "a{l}_x =") + " a{l} = plugin.Gate (a{l}_x)"
    assert lint_graph(parts.Small(attention=attention).model()).verdict.survives


def test_an_operator_under_the_standards_name_that_it_has_not_is_named(parts: SimpleNamespace) -> None:
    attention = (
        parts.ATTENTION.replace("a{l} =", "a{l}_x =") + " a{l} = SimplifiedLayerNormalization (a{l}_x, scale)"
    )
    own = lint_graph(parts.Small(attention=attention).model(), strict=True)
    named = [f for f in own.errors if f.rule == "standard-ops-only"]
    assert [(f.sentence, f.count) for f in named] == [
        ("ai.onnx::SimplifiedLayerNormalization is not a standard operator", 2)
    ]
    assert own.verdict.survives
    early = lint_graph(parts.Small(opset=22).model()).warnings
    assert any(f.sentence == "ai.onnx::Attention is not a standard operator of opset 22" for f in early)
