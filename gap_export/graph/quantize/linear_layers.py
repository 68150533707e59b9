"""Linear layers of a graph: where their weights are multiplied, and how large the activations get that they read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from gap_export.errors import TraceError

_PREFIX = "largest."


def products_of(weight: ir.Value, name: str) -> list[tuple[ir.Node, ir.Node | None]]:
    """(product, the Transpose of the weight before it) of every linear layer that has this weight; a Gemm has no Transpose.

    Raises:
        TraceError: it is used in another way.
    """
    found: list[tuple[ir.Node, ir.Node | None]] = []
    for node in weight.consumers():
        if node.op_type == "Gemm" and node.attributes["transB"].as_int() and node.inputs[1] is weight:
            found.append((node, None))
        elif node.op_type == "Transpose" and all(
            product.op_type == "MatMul" for product in node.outputs[0].consumers()
        ):
            found += [(product, node) for product in node.outputs[0].consumers()]
        else:
            raise TraceError(
                "is used in another way than a linear layer uses it",
                subject=name,
                hint="build with --precision fp32, and please report this",
            )
    return found


def probed(path: Path) -> tuple[bytes, dict[str, list[str]]]:
    """Add an output to a written graph for every activation that a linear layer reads: its largest magnitude.

    Args:
        path: of the graph; it stays as it is. Weights stay where they are.

    Returns:
        (the graph with more outputs, output -> parameters of the layers that read that activation). An output is a float32 scalar,
        the largest magnitude in one call.

    Raises:
        TraceError: a weight is used in another way than a linear layer uses it.
    """
    model = ir.load(path)
    graph = model.graph
    outputs: dict[ir.Value, tuple[ir.Value, list[str]]] = {}
    for name, weight in list(graph.initializers.items()):
        if not name.endswith(".weight") or weight.shape is None or len(weight.shape) != 2:
            continue
        for product, _ in products_of(weight, name):
            activations = product.inputs[0]
            assert activations is not None
            if activations not in outputs:
                floats = ir.node("Cast", [activations], {"to": ir.DataType.FLOAT})
                magnitudes = ir.node("Abs", [floats.outputs[0]])
                largest = ir.node("ReduceMax", [magnitudes.outputs[0]], {"keepdims": 0})
                found = largest.outputs[0]
                found.name = f"{_PREFIX}{len(outputs)}"
                found.shape, found.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
                graph.insert_before(product, [floats, magnitudes, largest])
                graph.outputs.append(found)
                outputs[activations] = found, []
            outputs[activations][1].append(name)
    return (
        ir.to_proto(model).SerializeToString(),
        {str(found.name): parameters for found, parameters in outputs.values()},
    )
