"""Graphs that compute the same in the same order, written in two ways: one form."""

from __future__ import annotations

import onnx_ir as ir

from gap_export.graph.canonical import canonicalise


def graph(*, reads: tuple[str, ...], prefix: str, weights: str = "first second") -> ir.Model:
    """Two caches with a common extent, which is read from some of them; two weights."""
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", extent, 4]))
        for name, extent in (("a", "slots"), ("b", "slots"), ("c", None))
    }
    named = {
        name: ir.Value(name=name, const_value=ir.tensor([float(len(name))], name=name))
        for name in weights.split()
    }
    nodes = []
    for number, name in enumerate(reads):
        nodes.append(ir.node("Shape", [inputs[name]], {"start": 1, "end": 2}, name=f"{prefix}{number}"))
        nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0]]))
    sums = [inputs["a"]]
    for name in ("second", "first"):
        nodes.append(ir.node("Add", [sums[-1], named[name]]))
        sums.append(nodes[-1].outputs[0])
    nodes.append(ir.node("Expand", [sums[-1], nodes[0].outputs[0]], doc_string=prefix))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], nodes[2 * len(reads) - 2].outputs[0]]))
    for node in nodes:
        node.metadata_props["from"] = prefix
    result = nodes[-1].outputs[0]
    result.name = "result"
    made = ir.Graph(
        list(inputs.values()),
        [result],
        nodes=nodes,
        initializers=list(named.values()),
        opset_imports={"": 24},
        name="graph",
    )
    result.metadata_props["from"] = prefix
    return ir.Model(made, ir_version=11)


def canonical(model: ir.Model) -> bytes:
    canonicalise(model)
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def test_names_notes_and_orders_of_makers_are_forgotten() -> None:
    one = canonical(graph(reads=("a",), prefix="x"))
    assert one == canonical(graph(reads=("a",), prefix="other", weights="second first"))


def test_an_extent_is_read_from_the_first_input_that_has_it_once() -> None:
    one = canonical(graph(reads=("a",), prefix="x"))
    assert one == canonical(graph(reads=("b",), prefix="x"))
    model = graph(reads=("b", "a"), prefix="x")
    canonicalise(model)
    (shape,) = (node for node in model.graph if node.op_type == "Shape")
    assert shape is model.graph[0]
    assert shape.inputs[0] is model.graph.inputs[0]
    assert {node.inputs[1] for node in model.graph if node.op_type in ("Expand", "Reshape")} == set(
        shape.outputs
    )


def test_an_extent_without_a_name_is_its_input_s_own() -> None:
    model = graph(reads=("b", "c"), prefix="x")
    canonicalise(model)
    read = [node.inputs[0].name for node in model.graph if node.op_type == "Shape" and node.inputs[0]]
    assert read == ["a", "c"]
    assert model.graph.outputs[0].name == "result"
    assert model.graph[-1].name == f"Reshape_{len(model.graph) - 1}"
