"""A graph that also tells how large the activations get that its linear layers read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from gap_export.graph.quantize import products_of

_PREFIX = "largest."


def probed(path: Path) -> tuple[bytes, dict[str, list[str]]]:
    """Add an output to a written graph for every activation that a linear layer reads.

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
            given = product.inputs[0]
            assert given is not None
            if given not in outputs:
                real = ir.node("Cast", [given], {"to": ir.DataType.FLOAT})
                size = ir.node("Abs", [real.outputs[0]])
                largest = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
                found = largest.outputs[0]
                found.name = f"{_PREFIX}{len(outputs)}"
                found.shape, found.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
                graph.insert_before(product, [real, size, largest])
                graph.outputs.append(found)
                outputs[given] = found, []
            outputs[given][1].append(name)
    return (
        ir.to_proto(model).SerializeToString(),
        {str(found.name): parameters for found, parameters in outputs.values()},
    )
