"""Vision and splice graphs: the order of the kept indices, what the embeddings are gathered with, what ids are made of."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from gap_export.linter import Report, lint_graph
from gap_export.positions import PositionPolicy

CONSTANTS = {
    "k": np.array([3]),
    "ax1": np.array([1]),
    "ax2": np.array([2]),
    "wide_shape": np.array([1, 3, 4]),
    "axm1": np.array([-1]),
    "at0": np.array([0]),
    "at2": np.array([2]),
    "end": np.array([-9]),
    "back": np.array([-1]),
    "two": np.array([2]),
    "minus": np.array([-3]),
    "ten": np.array([10]),
    "grid": np.array([1, 4, 7]),
    "shuffled": np.array([4, 1, 7]),
    "zero_s": np.array(0),
    "three_s": np.array(3),
    "one_s": np.array(1),
    "b1": np.array([1, 1]),
    "numbers": np.array([0, 1, 2]),
    "large": np.array(1 << 16),
    "small": np.array(8),
    "merged": np.ones((2, 3, 4), np.float32),
}
SCORES = "squares = Mul (pixel_values, pixel_values) scores = ReduceSum <keepdims=0> (squares, ax2) "
PICK = "best, picked = TopK (scores, k) "


def vision(
    body: str, outputs: str = "int64[B,3] kept_indices, float[B,3,4] visual_embeds"
) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        vision (float[B,9,4] pixel_values) => ({outputs}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name in used & set(CONSTANTS):
        model.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    return model


def gathered(indices: str) -> str:
    return (
        f" places = Unsqueeze ({indices}, ax2) wide = Expand (places, wide_shape)"
        " visual_embeds = GatherElements <axis=1> (pixel_values, wide)"
    )


def check(body: str, policy: PositionPolicy = PositionPolicy.GAP) -> Report:
    return lint_graph(ir.from_proto(vision(body)), strict=True, policy=policy)


@pytest.mark.parametrize(
    "kept",
    [
        SCORES + PICK + "kept_indices, order = TopK <largest=0> (picked, k)",
        SCORES + PICK + "negative = Neg (picked) down, order = TopK (negative, k) kept_indices = Neg (down)",
        SCORES
        + PICK
        + "as_float = Cast <to=1> (picked) up, order = TopK <largest=0> (as_float, k) kept_indices = Cast <to=7> (up)",
        SCORES
        + PICK
        + "up, order = TopK <largest=0> (picked, k) kept_indices = GatherElements <axis=1> (picked, order)",
        SCORES + PICK + "up, order = TopK <largest=0> (picked, k) kept_indices = Add (up, ten)",
        "kept_indices = Expand (grid, b1)",
        "counted = Range (zero_s, three_s, one_s) kept_indices = Expand (counted, b1)",
    ],
)
def test_indices_that_are_sorted_pass(kept: str) -> None:
    report = check(kept + gathered("kept_indices"))
    assert report.verdict.survives, report.verdict.reason
    assert report.findings == ()


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (SCORES + PICK + "kept_indices = Identity (picked)", "in score order"),
        (SCORES + PICK + "kept_indices, order = TopK (picked, k)", "descending"),
        (SCORES + PICK + "kept_indices, order = TopK <largest=0, sorted=0> (picked, k)", "does not sort"),
        (SCORES + PICK + "kept_indices, order = TopK <largest=0, axis=0> (picked, k)", "last axis"),
        (SCORES + PICK + "up, order = TopK <largest=0> (picked, k) kept_indices = Neg (up)", "descending"),
        (
            SCORES + PICK + "up, order = TopK <largest=0> (picked, k) kept_indices = Add (up, picked)",
            "differ from token",
        ),
        ("kept_indices = Expand (shuffled, b1)", "constant that is not ascending"),
    ],
)
def test_indices_in_another_order_are_caught_unless_asked_for(kept: str, words: str) -> None:
    report = check(kept + gathered("kept_indices"))
    assert not report.verdict.survives
    assert words in report.verdict.reason
    assert {f.rule for f in report.errors} == {"kept-indices-ascending"}
    assert check(kept + gathered("kept_indices"), PositionPolicy.PERMUTED).verdict.survives


def test_embeddings_gathered_in_another_order_than_given_out_are_caught() -> None:
    kept = SCORES + PICK + "kept_indices, order = TopK <largest=0> (picked, k)"
    report = check(kept + gathered("picked"))
    assert not report.verdict.survives
    assert "not gathered with kept_indices" in report.verdict.reason
    constants = check("kept_indices = Expand (grid, b1) other = Expand (shuffled, b1)" + gathered("other"))
    assert "not gathered with kept_indices" in constants.verdict.reason


def check_packed(
    features: str,
    index: str,
    *,
    places: str = "numbers",
    largest: int = 0,
    before: str = "",
    data: str = "picked",
    base: str = "k",
) -> Report:
    """Indices and features sorted by one integer that holds index and place; `features` are all patches or the kept."""
    packed = f"{before} scaled = Mul ({data}, {base}) packed = Add (scaled, {places})"
    ordered = f"up, order = TopK <largest={largest}> (packed, k) place = Mod (up, {base})"
    kept = "kept_indices = GatherElements <axis=1> (picked, place)"
    read = f"at = Unsqueeze ({index}, ax2) wide = Expand (at, wide_shape)"
    embeds = f"visual_embeds = GatherElements <axis=1> ({features}, wide)"
    return check(" ".join((SCORES, PICK, packed, ordered, kept, read, embeds)))


def test_merged_tokens_are_sorted_together_with_their_indices() -> None:
    assert check_packed("merged", "place").verdict.survives
    assert not check_packed("merged", "place", places="grid").verdict.survives
    assert not check_packed("merged", "place", largest=1).verdict.survives
    assert not check_packed("merged", "order").verdict.survives


@pytest.mark.parametrize(
    ("counted", "base", "survives"),
    [
        ("Range (zero_s, total, one_s)", "extent", True),
        ("Range (one_s, total, one_s)", "extent", False),
        ("Range (zero_s, three_s, one_s)", "extent", False),
        ("Range (zero_s, total, one_s)", "two", False),
    ],
)
def test_merged_tokens_are_sorted_where_the_count_is_an_input(
    counted: str, base: str, survives: bool
) -> None:
    extent = "extent = Shape <start=0, end=1> (pixel_values) total = Squeeze (extent)"
    report = check_packed(
        "merged", "place", before=f"{extent} counted = {counted}", places="counted", base=base
    )
    assert report.verdict.survives == survives


@pytest.mark.parametrize(
    ("padded", "survives"),
    [
        ("negative = Less (picked, zero_s) sorted = Where (negative, large, picked)", True),
        ("negative = Less (picked, zero_s) sorted = Where (negative, small, picked)", False),
        ("negative = Less (picked, three_s) sorted = Where (negative, large, picked)", False),
    ],
)
def test_padding_is_sorted_behind_everything(padded: str, survives: bool) -> None:
    assert check_packed("merged", "place", before=padded, data="sorted").verdict.survives == survives


def test_patches_must_be_read_at_indices_and_not_at_places() -> None:
    assert not check_packed("pixel_values", "place").verdict.survives
    assert check_packed("pixel_values", "kept_indices").verdict.survives


def test_a_graph_that_selects_without_saying_what_is_caught() -> None:
    body = SCORES + PICK + gathered("picked")
    report = lint_graph(ir.from_proto(vision(body, "float[B,3,4] visual_embeds")))
    assert not report.verdict.survives
    assert "no kept_indices output" in report.verdict.reason
    whole = vision("visual_embeds = Identity (pixel_values)", "float[B,9,4] visual_embeds")
    assert lint_graph(ir.from_proto(whole)).verdict.survives


STEPS = {
    "negate": "{y} = Neg ({x})",
    "shift": "{y} = Add ({x}, ten)",
    "double": "{y} = Mul (two, {x})",
    "mirror": "{y} = Mul ({x}, minus)",
    "subtract": "{y} = Sub (ten, {x})",
    "ascend": "{y}, {y}_order = TopK <largest=0> ({x}, k)",
    "descend": "{y}, {y}_order = TopK ({x}, k)",
    "argsort": "{y}_sorted, {y}_at = TopK <largest=0> ({x}, k) {y} = GatherElements <axis=1> ({x}, {y}_at)",
    "order": "{y}_sorted, {y} = TopK <largest=0> ({x}, k)",
    "reverse": "{y} = Slice ({x}, back, end, ax1, back)",
    "reshape": "{y}_3 = Unsqueeze ({x}, ax1) {y} = Squeeze ({y}_3, ax1)",
    "cast": "{y}_f = Cast <to=1> ({x}) {y} = Cast <to=7> ({y}_f)",
    "square": "{y} = Mul ({x}, {x})",
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6), st.integers(0, 2**32 - 1))
def test_whatever_is_called_ascending_is_ascending(steps: list[str], seed: int) -> None:
    names = ["picked", *(f"step{i}" for i in range(len(steps)))]
    body = SCORES + PICK
    body += " ".join(STEPS[s].format(x=x, y=y) for s, x, y in zip(steps, names, names[1:], strict=False))
    body += f" kept_indices = Identity ({names[-1]})"
    model = vision(body, "int64[B,3] kept_indices")
    order_errors = [f for f in lint_graph(ir.from_proto(model)).errors if f.node == "kept_indices"]
    if not order_errors:
        pixels = np.random.default_rng(seed).normal(size=(2, 9, 4)).astype(np.float32)
        (kept,) = ReferenceEvaluator(model).run(None, {"pixel_values": pixels})
        assert (np.diff(kept, axis=1) > 0).all()
    if steps and steps[-1] in ("ascend", "argsort"):
        assert not order_errors


def splice(ids: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        splice (int64[B,T] input_ids, float[B,3,4] visual_embeds, int64[B,3] kept_indices)
            => (float[B,S,4] inputs_embeds, int64[B,S] position_ids) {{
            text = Cast <to=1> (input_ids) wide = Unsqueeze (text, axm1) tall = Concat <axis=2> (wide, wide, wide, wide)
            inputs_embeds = Concat <axis=1> (tall, visual_embeds) {ids}
        }}"""
    model = onnx.parser.parse_model(text)
    for name, content in CONSTANTS.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(content, name))
    return ir.from_proto(model)


def test_splice_ids_must_be_made_from_the_kept_indices() -> None:
    kept = "position_ids = Add (kept_indices, ten)"
    counted = """extent = Shape <start=1, end=2> (kept_indices) length = Squeeze (extent)
        counted = Range (zero_s, length, one_s) position_ids = Unsqueeze (counted, at0)"""
    good = lint_graph(splice(kept), strict=True)
    assert (good.kind, good.verdict.survives, good.findings) == ("splice", True, ())
    bad = lint_graph(splice(counted), strict=True)
    assert not bad.verdict.survives
    assert {f.rule for f in bad.errors} == {"ids-from-kept-indices"}
    assert lint_graph(splice(counted), strict=True, policy=PositionPolicy.SHIFTED).errors == ()
