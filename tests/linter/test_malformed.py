"""Anybody's file: malformed graphs end in a verdict or in one line, soon, and never in a traceback."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from gap_export import linter
from gap_export.errors import GapExportError, InputError, LintError
from gap_export.linter import isolated, limits, lint_graph
from tests.linter.malformed import mutated

LOAD, STRUCTURE = (sys.modules[f"gap_export.linter.{name}"] for name in ("load", "structure"))
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def goods(parts: SimpleNamespace) -> list[bytes]:
    """Small graphs of five exporters, and of this project's tests, with an If and a Loop."""
    loop = """start = Cast <to=1> (zero) yes = Equal (zero, zero)
        last, ids_S1 = Loop (length, yes, start) <body = b (int64 i, bool go, float so_far) => (bool on, float after, float row) {
            on = Identity (go) step = Cast <to=1> (i) after = Add (so_far, step) row = Identity (step)
        }> ids_BS = Unsqueeze (ids_S1, ax0)"""
    branches = """flag = Greater (length, capacity) ids_BS = If (flag) <
        then_branch = t () => (float[B,S] ids_then) { ids_then = Cast <to=1> (position_ids) },
        else_branch = e () => (float[B,S] ids_else) { again = Identity (position_ids) ids_else = Cast <to=1> (again) }>"""
    small = [
        parts.Small(),
        parts.Small(attention=parts.DECOMPOSED),
        parts.Small(angles=loop),
        parts.Small(angles=branches),
    ]
    return [
        *(path.read_bytes() for path in sorted(DATA.glob("*.onnx"))),
        *(each.proto().SerializeToString() for each in small),
    ]


def ended(path: Path, **options: Any) -> str:
    """How lint ends with a file: an answer, or the type of the one error; anything else fails the test."""
    try:
        return lint_graph(path, **options).verdict.answer
    except GapExportError as error:
        return (
            "cannot be analysed" if error.message.startswith("cannot be analysed") else type(error).__name__
        )


def end_all(goods: list[bytes], seeds: range, path: Path, **options: Any) -> Counter[str]:
    counts = Counter[str]()
    for seed in seeds:
        what, content = mutated(goods[seed % len(goods)], seed)
        path.write_bytes(content)
        start = time.process_time()
        counts[ended(path, **options)] += 1
        assert time.process_time() - start < 10, (seed, what)
    print(len(seeds), "malformed graphs:", dict(counts))
    return counts


def test_malformed_graphs_end_in_a_verdict_or_in_one_line(goods: list[bytes], tmp_path: Path) -> None:
    counts = end_all(goods, range(40), tmp_path / "graph.onnx")
    assert counts["LintError"] + counts["InputError"] > 15
    assert (
        counts["cannot be analysed"] == 0
    )  # checks tell what is wrong; that line is for what nobody thought of


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True])
def test_thousands_of_malformed_graphs(goods: list[bytes], tmp_path: Path, strict: bool) -> None:
    counts = end_all(goods, range(1000, 3000), tmp_path / "graph.onnx", strict=strict)
    assert counts["cannot be analysed"] < 10


@pytest.mark.long
def test_malformed_graphs_are_run_by_a_process_of_their_own(goods: list[bytes], tmp_path: Path) -> None:
    end_all(goods[-4:], range(4000, 4400), tmp_path / "graph.onnx", prove=True)


# Graphs that ask for too much


def node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, **attributes)


def model(nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["S"])],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [])


def calling(length: int, times: int, last: str = "") -> onnx.ModelProto:
    """Functions that each call the next."""
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    functions = []
    for i in range(length):
        called, domain = (
            (f"f{i + 1}", "local") if i + 1 < length else (last or "Relu", "local" if last else "")
        )
        names = ["x", *(f"v{j}" for j in range(times - 1)), "y"]
        body = [node(called, [a], [b], domain=domain) for a, b in itertools.pairwise(names)]
        functions.append(helper.make_function("local", f"f{i}", ["x"], ["y"], body, opsets))
    return model([node("f0", ["x"], ["y"], domain="local")], functions)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "2^25 nodes": (lambda: calling(25, 2), "more than 100000 nodes with its functions expanded"),
    "deep calls": (lambda: calling(500, 1), "functions more than 64 deep"),
    "calls itself": (lambda: calling(1, 1, "f0"), "calls itself"),
    "calls in a circle": (lambda: calling(9, 2, "f0"), "calls itself"),
    "a circle": (lambda: model([node("Relu", ["y"], ["a"]), node("Relu", ["a"], ["y"])]), "in a circle"),
    "its own result": (lambda: model([node("Add", ["x", "y"], ["y"])]), "in a circle"),
    "no operands": (lambda: model([node("Transpose", [], ["y"])]), "has 0 inputs, and takes 1"),
    "a left-out operand": (lambda: model([node("Gather", ["", "x"], ["y"])]), "lacks its input 0"),
    "axis as text": (lambda: model([node("Softmax", ["x"], ["y"], axis="last")]), "type STRING"),
    "perm as float": (lambda: model([node("Transpose", ["x"], ["y"], perm=1.5)]), "type FLOAT"),
    "no type to cast to": (lambda: model([node("Cast", ["x"], ["y"])]), "lacks its attribute 'to'"),
    "an If without branches": (lambda: model([node("If", ["x"], ["y"])]), "lacks its attribute"),
    "a name twice": (lambda: model([node("Relu", ["x"], ["y"]), node("Abs", ["x"], ["y"])]), "redeclared"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    make, sentence = REFUSED[name]
    path = tmp_path / "graph.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises((LintError, InputError), match=sentence):
        lint_graph(path)


def test_nodes_and_inputs_are_counted(
    parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = parts.Small().proto()
    path = tmp_path / "graph.onnx"
    path.write_bytes(proto.SerializeToString())
    for name, unit in (("MOST_NODES", "nodes"), ("MOST_INPUTS", "inputs")):
        with monkeypatch.context() as patched:
            patched.setattr(LOAD, name, 5)
            patched.setattr(STRUCTURE, name, 5)
            for source in (path, ir.from_proto(proto)):
                with pytest.raises(LintError, match=unit):
                    lint_graph(source)


def body(inputs: int, outputs: int) -> onnx.GraphProto:
    return helper.make_graph(
        [node("Identity", ["x"], ["b0"])],
        "b",
        [helper.make_tensor_value_info(f"i{i}", 1, None) for i in range(inputs)],
        [helper.make_tensor_value_info("b0", 1, None) for _ in range(outputs)],
    )


@pytest.mark.parametrize("inputs", range(4))
@pytest.mark.parametrize("outputs", range(4))
def test_bodies_have_what_goes_in_and_out_of_the_node(inputs: int, outputs: int, tmp_path: Path) -> None:
    right = {"If": outputs == 1, "Loop": (inputs, outputs) == (2, 2), "Scan": (inputs, outputs) == (1, 1)}
    nodes = {
        "If": node("If", ["x"], ["y"], then_branch=body(0, outputs), else_branch=body(0, 1)),
        "Loop": node("Loop", ["x", "x"], ["y"], body=body(inputs, outputs)),
        "Scan": node("Scan", ["x"], ["y"], body=body(inputs, outputs), num_scan_inputs=1),
    }
    path = tmp_path / "graph.onnx"
    for name, made in nodes.items():
        path.write_bytes(model([made]).SerializeToString())
        with pytest.raises(LintError) as caught:
            lint_graph(path)
        assert ("of no kind" in caught.value.message) == right[name], (name, caught.value.message)


def test_control_without_checks_there_are_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOAD, "check_structure", lambda *_: None)
    path, counts = tmp_path / "graph.onnx", Counter[str]()
    for made in (
        node("Loop", ["x", "x"], ["y"], body=body(0, 0)),
        node("Loop", ["x"], ["y"]),
        node("Scan", ["x"], ["y"], body=body(1, 1)),
        node("Scan", ["x"], ["y"], body=body(1, 1), num_scan_inputs=1.5),
        node("Gather", [], ["y"]),
    ):
        path.write_bytes(model([made]).SerializeToString())
        counts[ended(path)] += 1
    assert counts["cannot be analysed"] >= 4


def test_bodies_within_bodies_are_bounded_in_memory_too() -> None:
    value = ir.Value(name="x")
    graph = ir.Graph([], [], nodes=[ir.Node("", "Relu", [value])])
    for _ in range(2000):
        graph = ir.Graph([], [], nodes=[ir.Node("", "If", [value], [ir.AttrGraph("then_branch", graph)])])
    with pytest.raises(LintError, match="bodies within each other"):
        lint_graph(ir.Model(graph, ir_version=10))


ANGLES = {
    "zeros": "big = Constant <value_ints=[%d]> () zeros = ConstantOfShape (big) none = ReduceMax (zeros)",
    "range": "far_end = Constant <value_int=%d> () many = Range (zero, far_end, one) f = Cast <to=1> (many) none = ReduceMax (f)",
    "expand": "big = Constant <value_ints=[%d]> () many = Expand (like, big) none = ReduceMax (many)",
    "tile": "big = Constant <value_ints=[1, %d]> () many = Tile (like, big) none = ReduceMax (many)",
    "pad": "big = Constant <value_ints=[0, 0, 0, %d]> () many = Pad (like, big) none = ReduceMax (many)",
}


@pytest.mark.parametrize("elements", [10**9, 10**12, 2**62])
@pytest.mark.parametrize("name", ANGLES)
def test_terabytes_between_ids_and_angles_are_not_made(
    parts: SimpleNamespace, name: str, elements: int
) -> None:
    text = f"like = Cast <to=1> (position_ids) {ANGLES[name] % elements} ids_BS = Add (like, none)"
    report = lint_graph(parts.Small(angles=text).model())
    assert report.verdict.answer == "cannot tell"
    assert "would make" in report.verdict.reason


LOOP = """trips = Constant <value_int=1000000000000> () start = Cast <to=1> (zero) yes = Equal (zero, zero)
    last = Loop (trips, yes, start) <body = b (int64 i, bool go, float so_far) => (bool on, float after) {
        on = Identity (go) after = Identity (so_far) }>"""


def test_a_loop_that_never_ends_is_not_waited_for(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = parts.Small(
        angles=f"{LOOP} like = Cast <to=1> (position_ids) ids_BS = Add (like, last)"
    ).model()
    monkeypatch.setattr(limits, "MOST_WORK", 20_000)
    with pytest.raises(LintError, match="more than 20000 steps"):
        lint_graph(endless)


def test_control_without_a_budget_the_loop_goes_on(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = parts.Small(
        angles=f"{LOOP} like = Cast <to=1> (position_ids) ids_BS = Add (like, last)"
    ).model()
    seen = 0

    def before(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen > 20_000:
            raise LintError("was still running", subject="control", hint="none")

    monkeypatch.setattr("gap_export.linter.evaluator.Budget.before", before)
    with pytest.raises(LintError, match="still running"):
        lint_graph(endless)


def test_a_proof_has_a_limit_of_time_and_of_memory(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "PROOF_SECONDS", 2.0)

    def with_added(text: str, value: str) -> Any:
        small = parts.Small(extra=text)
        proto = small.proto(
            lambda t: t.replace("h0 = Identity (inputs_embeds)", f"h0 = Add (inputs_embeds, {value})")
        )
        return lint_graph(ir.from_proto(proto), prove=True)

    endless = with_added(LOOP, "last")
    assert endless.verdict.survives
    assert endless.proof.outcome == "not run here"
    assert "more than 2 s" in endless.proof.sentence
    large = """size = Constant <value_int=1000000000> () big = Mul (length, size) big_1 = Unsqueeze (big, ax0)
        zeros = ConstantOfShape (big_1) none = ReduceMax (zeros)"""
    proof = with_added(large, "none").proof
    assert proof.outcome == "not run here"
    assert "refuses" in proof.sentence


def test_walks_through_a_graph_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("Identity", ["x"], ["v0"])]
    for i in range(300):
        nodes += [node("Add", [f"v{i}", "x"], [f"v{i + 1}"]), node("Softmax", [f"v{i}"], [f"p{i}"])]
        nodes += [node("MatMul", [f"p{i}", "x"], [f"q{i}"])]
    quadratic = ir.from_proto(model([*nodes, node("Identity", ["v300"], ["y"])]))
    monkeypatch.setattr(limits, "MOST_WORK", 50_000)
    with pytest.raises(LintError, match="more than 50000 steps"):
        lint_graph(quadratic, kind="decoder")


@pytest.mark.parametrize("field", [b"\x0a\x00", b"\x1a\x00", b"\x2a\x00"])
def test_fields_are_counted_before_a_file_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: bytes
) -> None:
    within = field * 600_000

    def wrapped(key: bytes, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return key + length + bytes([size]) + content

    path = tmp_path / "graph.onnx"
    path.write_bytes(wrapped(b"\x3a", wrapped(b"\x0a", within)))  # of a node of the graph
    monkeypatch.setattr(LOAD, "MOST_FIELDS", 100_000)
    with pytest.raises(LintError, match="more than 100000 fields"):
        lint_graph(path)


# Files


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "none.onnx", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(InputError):
            lint_graph(path)


@pytest.mark.parametrize("location", ["../outside", "/absolute/outside", "pipe", "none", "short", ""])
def test_external_data_are_read_from_regular_files_beside_the_graph(
    parts: SimpleNamespace, tmp_path: Path, location: str
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "short").write_bytes(b"abc")
    (tmp_path / "outside").write_bytes(bytes(10**6))
    proto = parts.Small(rows=parts.TABLE_ROWS).proto()
    for tensor in proto.graph.initializer:
        if tensor.name in ("cos_table", "sin_table", "split_q", "wq0"):
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location)
    path = folder / "decoder.onnx"
    path.write_bytes(proto.SerializeToString())
    try:
        report = lint_graph(path, prove=True)
    except InputError:
        return
    assert report.verdict.survives  # tables that are not there are made up
    assert report.proof is not None
    assert report.proof.outcome == "not run here"


@pytest.mark.parametrize(
    "change",
    [
        {"dims": [4, 8]},
        {"dims": [-1]},
        {"dims": [2**40]},
        {"dims": [2**62, 2**62]},
        {"raw_data": b""},
        {"raw_data": bytes(9), "dims": [100_000]},
    ],
)
def test_constants_hold_what_their_shape_says(
    parts: SimpleNamespace, tmp_path: Path, change: dict[str, Any]
) -> None:
    proto = parts.Small().proto()
    tensor = next(each for each in proto.graph.initializer if each.name == "inv_freq")
    for field, value in change.items():
        tensor.ClearField(field)
        if field == "dims":
            tensor.dims.extend(value)
        else:
            tensor.raw_data = value
    path = tmp_path / "graph.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(LintError, match="shape"):
        lint_graph(path)


@pytest.mark.parametrize("version", [-1, 0, 2**40])
def test_opsets_that_cannot_be_are_refused(parts: SimpleNamespace, version: int) -> None:
    graph = parts.Small().model()
    graph.graph.opset_imports[""] = version
    with pytest.raises(LintError, match=f"imports version {version}"):
        lint_graph(graph)


def test_sizes_of_inputs_do_not_become_memory(parts: SimpleNamespace) -> None:
    for rows, tokens in (("B", 10**12), (10**12, "S"), (2**62, 2**62), (-1, -1), (0, 0)):
        inputs = (f"float[{rows},{tokens},32] inputs_embeds", f"int64[{rows},{tokens}] position_ids")
        small = parts.Small(inputs=(*inputs, "write_index", "last_index"))
        proto = small.proto(lambda t: t.replace("[-1,-1", "[7,7").replace("[0,0", "[7,7"))
        for value in proto.graph.input:
            for dim in value.type.tensor_type.shape.dim if rows in (0, -1) else ():
                dim.dim_value = int(rows) if dim.dim_value == 7 else dim.dim_value
        lint_graph(ir.from_proto(proto), prove=rows in (-1, 10**12))


# Other graphs under a decoder's name


def graph_of(nodes: list[onnx.NodeProto], given: str, gives: str, element: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(given, element, None)],
        [helper.make_tensor_value_info(gives, 1, None)],
        [helper.make_tensor("table", 1, [9, 4], np.zeros(36))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


TOWER = [
    node("MatMul", ["pixel_values", "pixel_values"], ["scores"]),
    node("Softmax", ["scores"], ["weights"]),
    node("MatMul", ["weights", "pixel_values"], ["features"]),
]
OTHERS = {
    "vision": (graph_of(TOWER, "pixel_values", "features", 1), "a vision tower"),
    "embed": (
        graph_of([node("Gather", ["table", "input_ids"], ["embeds"])], "input_ids", "embeds", 7),
        "an embedding",
    ),
    "splice": (
        graph_of([node("Relu", ["visual_embeds"], ["out"])], "visual_embeds", "out", 1),
        "joins tokens",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_graph_without_ids_is_told_apart_from_a_decoder(tmp_path: Path, kind: str) -> None:
    made, sentence = OTHERS[kind]
    for name, said in (("decoder.onnx", "auto"), ("model_q4.onnx", "auto"), ("anything.onnx", "decoder")):
        path = tmp_path / name
        path.write_bytes(made.SerializeToString())
        report = lint_graph(path, kind=said, prove=True)  # type: ignore[arg-type]
        assert (report.kind, report.verdict.answer, report.verdict.survives) == (
            kind,
            "no position ids",
            False,
        )
        assert sentence in report.verdict.reason
        with pytest.raises(LintError, match="no position ids here"):
            report.raise_for_errors()
    for name in ("vision_model.onnx", "encoder.onnx"):
        (tmp_path / name).write_bytes(made.SerializeToString())
        assert lint_graph(tmp_path / name).verdict.answer != "no position ids"


def test_a_decoder_of_any_name_stays_one(parts: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("vision.onnx", "embed.onnx", "decoder.onnx", "model.onnx"):
        (tmp_path / name).write_bytes(parts.Small().proto().SerializeToString())
        assert lint_graph(tmp_path / name).verdict.answer == "survive"


def test_what_is_not_foreseen_is_one_line(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("nobody thought of it")

    monkeypatch.setattr(linter, "read_decoder", fail)
    with pytest.raises(LintError, match="cannot be analysed: KeyError"):
        lint_graph(parts.Small().model())
