"""A probed graph: the same answers, and what it says of activations against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gap_export.graph.quantize.linear_layers import probed


def written(folder: Path) -> tuple[Path, np.ndarray]:
    """x -> linear -> Relu -> two linears, one of them a Gemm."""
    rng = np.random.default_rng(0)
    first, second, third = (rng.standard_normal((6, 6)).astype(np.float32) for _ in range(3))
    nodes = [
        helper.make_node("Transpose", ["a.weight"], ["at"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "at"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Transpose", ["b.weight"], ["bt"], perm=[1, 0]),
        helper.make_node("MatMul", ["r", "bt"], ["y"]),
        helper.make_node("Gemm", ["r", "c.weight"], ["z"], transB=1),
    ]
    named = {"a.weight": first, "b.weight": second, "c.weight": third}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 6]) for name in ("y", "z")],
        [numpy_helper.from_array(value, name) for name, value in named.items()],
    )
    path = folder / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path, first


def test_it_tells_the_largest_magnitude_of_what_linear_layers_read(tmp_path: Path) -> None:
    path, first = written(tmp_path)
    before = path.read_bytes()
    model, outputs = probed(path)
    assert path.read_bytes() == before
    assert sorted(map(sorted, outputs.values())) == [["a.weight"], ["b.weight", "c.weight"]]
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    x[3, 2] = -9
    names = ["y", "z", *outputs]
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    y, z, *largest = session.run(names, {"x": x})
    found = {name: float(number) for name, number in zip(outputs, largest, strict=True)}
    expected = {"a.weight": 9.0, "b.weight": float(np.maximum(x @ first.T, 0).max())}
    for output, parameters in outputs.items():
        assert found[output] == np.float32(expected[parameters[0]]) or np.isclose(
            found[output], expected[parameters[0]], rtol=1e-5
        )
    whole = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y", "z"], {"x": x})
    np.testing.assert_allclose([y, z], whole, rtol=1e-5, atol=1e-5)
