"""One form for graphs that are equal: nothing is left of how a graph was made, or of what torch happened to choose.

Whatever a graph was put together from, this is the last step: two that compute the same in the same order are then equal in every byte.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass


def canonicalise(model: ir.Model) -> None:
    """Read extents from one place, name everything by its own, forget the rest; in place.

    - An extent that several inputs have is read from the first of them: torch reads it from any.
    - Nodes, and what they make, are named by operator and place. Names of inputs, outputs and initializers stay: they mean something.
    - Initializers stand in the order in which they are read.
    - Notes of whoever made the graph (metadata, stack traces with their paths) go.

    Args:
        model: a traced graph, with the spec's symbols in the shapes of its inputs.
    """
    _read_extents_from_the_first(model.graph)
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


def _read_extents_from_the_first(graph: ir.Graph) -> None:
    """Whoever reads an extent that has a name reads it from the first input that has it, at the beginning, once."""
    first: dict[str, tuple[int, int]] = {}
    for place, value in enumerate(graph.inputs):
        for axis, extent in enumerate(value.shape or ()):
            if isinstance(extent, ir.SymbolicDim) and extent.value is not None:
                first.setdefault(str(extent), (place, axis))
    readers: dict[tuple[int, int], ir.Node] = {}
    for node in list(graph):
        symbol = _extent_read(node)
        if symbol not in first:
            continue
        place, axis = first[symbol]
        reader = readers.setdefault((place, axis), node)
        if reader is not node:
            node.outputs[0].replace_all_uses_with(reader.outputs[0])
            graph.remove(node, safe=True)
            continue
        node.replace_input_with(0, graph.inputs[place])
        node.attributes["start"], node.attributes["end"] = (
            ir.AttrInt64("start", axis),
            ir.AttrInt64("end", axis + 1),
        )
    moved = [node for key in sorted(readers) for node in (readers[key], *_as_scalar(readers[key]))]
    graph.remove(moved)
    if moved:
        graph.insert_before(graph[0], moved)


def _extent_read(node: ir.Node) -> str | None:
    """Name of the only extent that a node reads of an input of the graph; None for any other node."""
    given = node.inputs[0] if node.op_type == "Shape" else None
    if given is None or not given.is_graph_input() or given.shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(given.shape))
    return str(given.shape[start]) if end == start + 1 else None


def _as_scalar(node: ir.Node) -> list[ir.Node]:
    """Nodes that make a scalar of an extent."""
    return [
        use.node
        for use in node.outputs[0].uses()
        if use.node.op_type == "Squeeze" and len(use.node.inputs) == 1
    ]
