"""Clean-up folds what is constant, leaves weights alone, and loses no input or output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gap_export.bundle.spec import GraphSpec, TensorSpec
from gap_export.errors import TraceError
from gap_export.graph.passes import simplify, write_graph

SPEC = GraphSpec(
    name="embed",
    inputs=(TensorSpec(name="x", dtype="float32", shape=(2, 3)),),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=(2, 4)),
        TensorSpec(name="z", dtype="float32", shape=(2, 4)),
    ),
)


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    """y = z = (x + (1 + 1)) @ transpose(weight), with the weight in a file, and a node nobody uses."""
    (tmp_path / "weights.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    weight = ir.Value(
        name="weight",
        shape=ir.Shape((4, 3)),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.ExternalTensor(
            "weights.bin",
            0,
            48,
            ir.DataType.FLOAT,
            shape=ir.Shape((4, 3)),
            name="weight",
            base_dir=str(tmp_path),
        ),
    )
    x = ir.Value(name="x", shape=ir.Shape((2, 3)), type=ir.TensorType(ir.DataType.FLOAT))
    one = ir.node("Constant", [], {"value": ir.tensor(np.float32(1), name="one")})
    two = ir.node("Add", [one.outputs[0], one.outputs[0]])
    moved = ir.node("Add", [x, two.outputs[0]])
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
    y = ir.node("MatMul", [moved.outputs[0], turned.outputs[0]])
    z = ir.node("MatMul", [moved.outputs[0], turned.outputs[0]])
    idle = ir.node("Neg", [x])
    for node, name in ((y, "y"), (z, "z")):
        node.outputs[0].name = name
        node.outputs[0].shape, node.outputs[0].type = ir.Shape((2, 4)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [y.outputs[0], z.outputs[0]],
        nodes=[one, two, moved, turned, y, z, idle],
        initializers=[weight],
        opset_imports={"": 24},
        name="g",
    )
    return ir.Model(graph, ir_version=11)


def test_constants_are_folded_and_weights_are_not(model: ir.Model, tmp_path: Path) -> None:
    simplify(model)
    write_graph(model, SPEC, tmp_path / "g.onnx")
    written = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    operators = [node.op_type for node in written.graph.node]
    assert operators.count("Add") == 1, "1 + 1 is folded"
    assert operators.count("Transpose") == 1, "a folded transpose would be a second copy of the weight"
    assert "Neg" not in operators, "nobody uses it"
    external = [tensor for tensor in written.graph.initializer if tensor.external_data]
    assert [tensor.name for tensor in external] == ["weight"]
    assert {entry.key: entry.value for entry in external[0].external_data}["location"] == "weights.bin"
    assert (tmp_path / "g.onnx").stat().st_size < 1000


def test_equal_outputs_stay_two_outputs(model: ir.Model, tmp_path: Path) -> None:
    import onnxruntime as ort

    simplify(model)
    write_graph(model, SPEC, tmp_path / "g.onnx")
    session = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["y", "z"]
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    y, z = session.run(None, {"x": x})
    expected = (x + 2) @ np.arange(12, dtype=np.float32).reshape(4, 3).T
    assert np.allclose(y, expected, atol=1e-5)
    assert np.array_equal(y, z)


@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_a_lost_input_or_output_is_refused(which: str, model: ir.Model, tmp_path: Path) -> None:
    simplify(model)
    tensors = getattr(SPEC, which)
    extra = tensors[0].model_copy(update={"name": "more"})
    with pytest.raises(TraceError, match="lost an input or an output"):
        write_graph(model, SPEC.model_copy(update={which: (*tensors, extra)}), tmp_path / "g.onnx")
    assert not (tmp_path / "g.onnx").exists()


def test_the_producer_is_named_and_nothing_else_of_the_builder(model: ir.Model, tmp_path: Path) -> None:
    model.metadata_props["path"] = "/home/somebody"
    simplify(model)
    write_graph(model, SPEC, tmp_path / "g.onnx")
    written = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    assert written.producer_name == "gap-export"
    assert not written.metadata_props
