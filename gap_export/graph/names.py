"""Names of nodes and values by their place in the graph: nothing is left of how the graph was made."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass


def name_in_order(model: ir.Model) -> None:
    """Name nodes, and what they make, by operator and place; put initializers into the order in which they are read; in place.

    Names of inputs, outputs and initializers stay: they mean something. Notes of whoever made the graph (metadata, stack traces with their
    paths) go. Graphs that differ in these alone are equal in every byte after this.

    Args:
        model: a traced graph.
    """
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    outputs = set(graph.outputs)
    read: dict[str, None] = {}
    for place, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
        node.name = f"{node.op_type}_{place}"
        for number, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = node.name if number == 0 else f"{node.name}.{number}"
        read |= {
            value.name: None
            for value in node.inputs
            if value is not None and value.name and graph.initializers.get(value.name) is value
        }
    unread = sorted(graph.initializers.keys() - read.keys())
    values = [graph.initializers.pop(name) for name in (*read, *unread)]
    for value in values:
        graph.initializers.add(value)
    for value in (*graph.inputs, *graph.outputs, *values):
        value.metadata_props.clear()  # which that pass leaves there
