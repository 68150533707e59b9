"""What lies around the rules: files that are no graphs, bodies and functions, weights that are elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from gap_export.errors import GapExportError, InputError, LintError
from gap_export.linter import RULES, lint_graph


def parsed(body: str, inputs: str, outputs: str, functions: str = "") -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 24, "local" : 1]>
        g ({inputs}) => ({outputs}) {{ {body} }} {functions}"""
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("content", [b"", b"no graph at all\n" * 40, bytes(range(256)) * 8, b"\x00" * 64])
def test_a_file_that_is_no_graph_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        lint_graph(path)
    assert caught.value.subject == str(path)


def test_a_missing_file_a_folder_and_a_truncated_graph_are_input_errors(
    parts: SimpleNamespace, tmp_path: Path
) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InputError):
            lint_graph(path)
    whole = parts.Small().proto().SerializeToString()
    cut = tmp_path / "cut.onnx"
    for length in range(1, len(whole), len(whole) // 40):
        cut.write_bytes(whole[:length])
        with pytest.raises(GapExportError):
            lint_graph(cut, kind="decoder").raise_for_errors()


def test_no_attention_no_known_kind_and_invalid_graphs_are_lint_errors() -> None:
    empty = parsed("logits = Identity (inputs_embeds)", "float[B,S,4] inputs_embeds", "float[B,S,4] logits")
    with pytest.raises(LintError, match="no attention"):
        lint_graph(ir.from_proto(empty))
    unknown = parsed("y = Relu (x)", "float[N] x", "float[N] y")
    with pytest.raises(LintError, match="no kind"):
        lint_graph(ir.from_proto(unknown))
    dangling = parsed("y = Add (x, nowhere)", "float[N] x", "float[N] y")
    with pytest.raises(LintError, match="nowhere"):
        lint_graph(ir.from_proto(dangling))
    unproduced = parsed("z = Relu (x)", "float[N] x", "float[N] y")
    with pytest.raises(LintError, match="nothing produces"):
        lint_graph(ir.from_proto(unproduced))


def branches(parts: SimpleNamespace, other: str) -> ir.Model:
    """The small decoder with its ids chosen by an If: the given ones, or something else."""
    angles = f"""flag = Greater (length, capacity)
        ids_BS = If (flag) <
            then_branch = then_graph () => (float[B,S] ids_then) {{ ids_then = Cast <to=1> (position_ids) }},
            else_branch = else_graph () => (float[B,S] ids_else) {{ {other} }}
        >"""
    return parts.Small(angles=angles).model()


def test_both_branches_of_an_if_must_read_the_ids(parts: SimpleNamespace) -> None:
    same = branches(parts, "again = Identity (position_ids) ids_else = Cast <to=1> (again)")
    assert lint_graph(same).verdict.survives
    counted = """else_counted = Range (zero, length, one) else_f = Cast <to=1> (else_counted)
        ids_else = Unsqueeze (else_f, ax0)"""
    assert not lint_graph(branches(parts, counted)).verdict.survives


def test_attention_inside_a_branch_is_seen(parts: SimpleNamespace) -> None:
    attention = """a{l} = If (flag) <
        then_branch = t{l} () => (float[B,2,S,16] in{l}) {{
            in{l} = Attention <is_causal=1> (q{l}_r, present.{l}.key, present.{l}.value) }},
        else_branch = e{l} () => (float[B,2,S,16] out{l}) {{
            out{l} = Attention (q{l}_r, present.{l}.key, present.{l}.value, mask) }}
    >"""
    report = lint_graph(parts.Small(attention=attention, extra="flag = Greater (length, capacity)").model())
    assert report.attention_layers == 4
    assert report.verdict.survives
    assert {(f.rule, f.count) for f in report.errors} == {("no-causal-flag-with-cache", 2)}


def test_ids_counted_in_a_loop_are_caught(parts: SimpleNamespace) -> None:
    angles = """start = Cast <to=1> (zero) yes = Equal (zero, zero)
        last, ids_S1 = Loop (length, yes, start) <body = b (int64 i, bool go, float so_far) => (bool on, float after, float row) {
            on = Identity (go) step = Cast <to=1> (i) after = Add (so_far, step) row = Identity (step)
        }> ids_BS = Unsqueeze (ids_S1, ax0)"""
    report = lint_graph(parts.Small(angles=angles).model())
    assert not report.verdict.survives
    assert {f.rule for f in report.errors} == {"rope-reads-position-ids"}


FUNCTION = """<domain: "local", opset_import: ["" : 24]>
    Ids (given, length) => (ids) { %s }"""


@pytest.mark.parametrize(
    ("body", "survives"),
    [
        ("ids = Cast <to=1> (given)", True),
        (
            """zero = Constant <value_int=0> () one = Constant <value_int=1> () counted = Range (zero, length, one)
            f = Cast <to=1> (counted) axes = Constant <value_ints=[0]> () ids = Unsqueeze (f, axes)""",
            False,
        ),
    ],
)
def test_functions_are_expanded_and_the_given_model_is_not_touched(
    parts: SimpleNamespace, body: str, survives: bool
) -> None:
    small = parts.Small(angles="ids_BS = local.Ids (position_ids, length)")

    def with_function(text: str) -> str:
        return text.replace('"plugin" : 1', '"plugin" : 1, "local" : 1') + FUNCTION % body

    model = ir.from_proto(small.proto(with_function))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert lint_graph(model, strict=survives).verdict.survives == survives
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("angles", "survives"), [("ids", True), ("first", False), ("range", False)])
def test_weights_that_are_elsewhere_are_not_missed(
    parts: SimpleNamespace, tmp_path: Path, angles: str, survives: bool
) -> None:
    path = tmp_path / "decoder.onnx"
    proto = parts.Small(angles=parts.ANGLES[angles]).proto()
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    stored = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data}
    assert {"inv_freq", "wq0"} <= stored
    (tmp_path / "weights.bin").unlink()
    report = lint_graph(path)
    assert report.verdict.survives == survives
    assert report.subject == str(path)


def test_a_large_decoder_is_linted_whole(parts: SimpleNamespace) -> None:
    report = lint_graph(parts.Small(layers=48).model(), strict=True)
    assert (report.attention_layers, report.findings) == (48, ())


def test_rule_ids_are_stable_and_distinct() -> None:
    assert [rule.id for rule in RULES] == [
        "rope-reads-position-ids",
        "no-rotary-inside-attention",
        "mask-follows-slots",
        "cache-follows-slots",
        "no-causal-flag-with-cache",
        "explicit-mask",
        "mask-is-as-declared",
        "cache-in-place",
        "ids-follow-survivors",
        "kept-indices-ascending",
        "ids-from-kept-indices",
        "every-input-used",
        "standard-ops-only",
    ]


def test_a_token_table_alone_is_an_embedding() -> None:
    model = parsed(
        "inputs_embeds = Gather (table, input_ids)", "int64[B,T] input_ids", "float[B,T,4] inputs_embeds"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((9, 4), np.float32), "table"))
    report = lint_graph(ir.from_proto(model), strict=True)
    assert (report.kind, report.verdict.survives, report.findings) == ("embed", True, ())
