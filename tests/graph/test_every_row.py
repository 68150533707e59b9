"""A decoder that gives the logits of every row: the same numbers as the bundle's own, and nothing that it was not written for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from gap_export.bundle.folder import Bundle
from gap_export.errors import TraceError
from gap_export.graph.every_row import with_every_row
from gap_export.precision import PRECISIONS
from tests.graph.read_tokens import Reader, off, off_prefixes

IDS = np.random.default_rng(2).integers(5, 40, (2, 11))
LASTS = [[10, 10], [0, 10], [3, 7]]

ROUNDING = {
    "fp32": 1e-5,
    "fp16": 1e-2,
    "int8": 5e-2,
    "int8-blocks": 5e-2,
    "int4": 5e-2,
    "int4-fp16": 5e-2,
    "fp8": 1e-1,
}
"""Logits are up to 5 in size. Kernels for many rows may add up floats in another order than those for one: the last bit of a float, which
can be rounded to the next number of eight bits after that. Other rows are off by 1 and more.
"""


@pytest.mark.parametrize("precision", [row.name for row in PRECISIONS.values() if row.cpu])
def test_rows_are_those_of_the_bundles_own_decoder(low: Callable[[str], Bundle], precision: str) -> None:
    """Whichever is asked for, beside another; and a row knows nothing of what comes after it."""
    bundle, bound = low(precision), ROUNDING[precision]
    assert off(bundle, IDS, LASTS) <= bound
    assert off_prefixes(bundle, IDS[:1]) <= bound


def test_other_rows_are_other_numbers(low: Callable[[str], Bundle]) -> None:
    rows_BSV = Reader(low("int8"), every_row=True).read(IDS, [10, 10])
    assert rows_BSV.shape == (2, 11, 64)
    assert np.isfinite(rows_BSV).all()
    assert np.abs(rows_BSV[:, 1:] - rows_BSV[:, :-1]).max(axis=2).min() > 0.5
    # Whatever is named as the last row: all are given.
    np.testing.assert_array_equal(rows_BSV, Reader(low("int8"), every_row=True).read(IDS, [0, 4]))


def test_the_written_graph_stays_as_it_is(low: Callable[[str], Bundle]) -> None:
    path = low("int8").graph_path("decoder")
    before = path.read_bytes()
    changed = onnx.load_from_string(with_every_row(path))
    assert path.read_bytes() == before
    weights = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert {tensor.name for tensor in changed.graph.initializer} <= weights
    large = [tensor for tensor in changed.graph.initializer if tensor.name.endswith(".int8")]
    assert large
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in large)


# Graphs that were written otherwise


def renamed_input(graph: GraphProto) -> None:
    (value,) = (each for each in graph.input if each.name == "last_index")
    value.name = "last"
    for node in graph.node:
        node.input[:] = ["last" if name == "last_index" else name for name in node.input]


def no_logits(graph: GraphProto) -> None:
    (value,) = (each for each in graph.output if each.name == "logits")
    graph.output.remove(value)


def logits_of_unknown_shape(graph: GraphProto) -> None:
    (value,) = (each for each in graph.output if each.name == "logits")
    value.type.tensor_type.ClearField("shape")


def last_index_unread(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "first"))
    for node in graph.node:
        node.input[:] = ["first" if name == "last_index" else name for name in node.input]


def counted_from_one(graph: GraphProto) -> None:
    """Found by arithmetic, and so perhaps not the row that is meant."""
    graph.initializer.append(numpy_helper.from_array(np.ones(1, np.int64), "one"))
    for node in graph.node:
        node.input[:] = ["before" if name == "last_index" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Sub", ["last_index", "one"], ["before"]))


def no_end_of_the_row(graph: GraphProto) -> None:
    *_, node = (each for each in graph.node if each.op_type == "Gather")
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 32]), "flat"))
    node.CopyFrom(helper.make_node("Reshape", [node.input[0], "flat"], list(node.output)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed_input, "has no input last_index"),
        (no_logits, "has no output logits of one row"),
        (logits_of_unknown_shape, "has no output logits of one row"),
        (last_index_unread, "chooses no row by last_index"),
        (counted_from_one, "reads last_index in Sub"),
        (no_end_of_the_row, "has no end of a chosen row"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_graphs_written_otherwise_are_refused_in_one_line(
    low: Callable[[str], Bundle], tmp_path: Path, change: Callable[[GraphProto], None], message: str
) -> None:
    model: ModelProto = onnx.load(low("fp32").graph_path("decoder"), load_external_data=False)
    change(model.graph)
    path = tmp_path / "decoder.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TraceError, match=message) as caught:
        with_every_row(path)
    assert caught.value.subject == str(path)
    assert "build the bundle again" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("graph", ["vision", "splice", "embed"])
def test_other_graphs_are_refused(low: Callable[[str], Bundle], graph: str) -> None:
    with pytest.raises(TraceError, match="has no input last_index"):
        with_every_row(low("fp32").graph_path(graph))
