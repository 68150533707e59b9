"""Layers that were passed by in a trace, put back as copies of one that was traced.

Two neighbouring layers of a run are in the graph as they were traced, and must be equal as graphs: node by node the same operators, attributes,
types and shapes, and operands that correspond. These correspond: a value and itself; what is made at the same place; a parameter, an input or
an output of either layer's number; and one value, the hidden states, that each layer reads from the one before. Then the second is copied with
these replaced.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable

import onnx_ir as ir

from gap_export.modeling.layers import DOMAIN, OPERATOR, LayerStack, Unlike, renumbered

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: names of the modules that it was traced in, from the outermost on, as a Python list."""


def repeat_layers(model: ir.Model, stack: LayerStack) -> None:
    """Replace every node that stands for a layer by a copy of a layer; in place.

    Args:
        model: traced with `modeling.layers.passed_by`, with torch's metadata.
        stack: of the module.

    Raises:
        Unlike: traced layers are not equal as graphs, or their nodes do not lie together. The model is of no use then.
    """
    nodes = list(model.graph)
    scopes = [ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")) for node in nodes]
    for run in stack.repeated:
        one, two = (
            _Layer(number, path, [node for node, inside in zip(nodes, scopes, strict=True) if path in inside])
            for number, path in ((number, stack.name(number)) for number in run[:2])
        )
        stand_ins = [node for node in nodes if _stands_for(node) in run]
        if [_stands_for(node) for node in stand_ins] != list(run[2:]) or not one.nodes:
            raise Unlike(f"torch does not say which nodes are those of {one.path} and the layers after it")
        first, together = nodes.index(one.nodes[0]), [*one.nodes, *two.nodes, *stand_ins]
        if nodes[first : first + len(together)] != together:
            raise Unlike(f"nodes of {one.path} and of the layers after it do not lie together")
        template = _Template(one, two, stand_ins[0])
        for number, node in zip(run[2:], stand_ins, strict=True):
            template.put(model.graph, node, number, stack.name(number))
    model.opset_imports.pop(DOMAIN, None)


def _stands_for(node: ir.Node) -> int | None:
    """Number of a layer; None for any other node."""
    is_layer = (node.domain, node.op_type) == (DOMAIN, OPERATOR)
    return node.attributes["number"].as_int() if is_layer else None


class _Layer:
    """A layer as it was traced.

    Args:
        number: of the layer.
        path: of its module.
        nodes: in graph order.
    """

    def __init__(self, number: int, path: str, nodes: list[ir.Node]) -> None:
        self.number, self.path, self.nodes = number, path, nodes
        self.places = {
            value: place for place, value in enumerate(value for node in nodes for value in node.outputs)
        }

    def name_for(self, name: str, other: int, path: str) -> str:
        """What another layer calls its own parameter, input or output of that name."""
        if name.startswith(f"{self.path}."):
            return path + name.removeprefix(self.path)
        return renumbered(name, self.number, other)


class _Template:
    """A traced layer that equals the one before it, to be copied.

    Args:
        one: the layer before.
        two: itself.
        following: the node that stands for the layer after it.

    Raises:
        Unlike: they are not equal, or further values than the hidden states go from layer to layer.
    """

    def __init__(self, one: _Layer, two: _Layer, following: ir.Node) -> None:
        self._one, self._two = one, two
        self._own: set[ir.Value] = set()  # parameters and inputs of this layer alone
        self._read: tuple[ir.Value, ir.Value] | None = None  # hidden states: of the second layer, of the first
        if len(one.nodes) != len(two.nodes):
            raise Unlike(f"the graphs of {one.path} and {two.path} have different numbers of nodes")
        for mine, there in zip(one.nodes, two.nodes, strict=True):
            if _form(mine) != _form(there) or not all(map(self._correspond, mine.inputs, there.inputs)):
                raise Unlike(f"{there.name} in the graph of {two.path} is not {mine.name} in that of {one.path}")
        given = following.inputs[0]
        if self._read is None or given is None or two.places.get(given) != one.places[self._read[0]]:
            raise Unlike(f"what {two.path} gives is not what {one.path} gives")
        self._given = given
        self._check_what_leaves(following)

    def put(self, graph: ir.Graph, node: ir.Node, number: int, path: str) -> None:
        """A copy in the place of a node that stands for a layer.

        Args:
            graph: of the node.
            node: takes hidden states and the layer's cache, gives both.
            number: of the layer.
            path: of its module.
        """
        two, read = self._two, self._read
        assert read is not None
        inputs = {value.name: value for value in graph.inputs}
        copies: dict[ir.Value, ir.Value] = {read[0]: node.inputs[0]}  # type: ignore[dict-item]
        for value in sorted(self._own, key=lambda value: value.name or ""):
            name = two.name_for(value.name or "", number, path)
            copies[value] = inputs[name] if value.is_graph_input() else _parameter(graph, value, name)
        if not set(node.inputs[1:]) <= set(copies.values()):
            raise Unlike(f"{path} is given another cache than the one of its number")
        for original in two.nodes:
            operands = [value if value is None else copies.get(value, value) for value in original.inputs]
            fresh = ir.Node(
                original.domain,
                original.op_type,
                operands,
                list(original.attributes.values()),
                overload=original.overload,
                num_outputs=len(original.outputs),
                version=original.version,
            )
            graph.insert_before(node, fresh)
            for value, copy in zip(original.outputs, fresh.outputs, strict=True):
                copy.type, copy.shape = value.type, None if value.shape is None else value.shape.copy()
                copies[value] = copy
        given = {value.name: copies[value] for value in two.places if value.is_graph_output()}
        for place, output in enumerate(node.outputs):
            name = output.name or ""
            there = self._given if place == 0 else None
            copy = copies[there] if there is not None else given.get(renumbered(name, number, two.number))
            if copy is None:
                raise Unlike(f"{two.path} has no output for {name}")
            output.replace_all_uses_with(copy, replace_graph_outputs=True)
            copy.name = name
        graph.remove(node, safe=True)

    def _correspond(self, mine: ir.Value | None, there: ir.Value | None) -> bool:
        """Whether an operand is to the first layer what the other is to the second."""
        one, two = self._one, self._two
        if mine is None or there is None:
            return mine is there
        if there in two.places:
            return one.places.get(mine) == two.places[there]
        if there in one.places:
            self._read = self._read or (there, mine)
            return self._read == (there, mine) and mine not in one.places
        if mine is there:
            return True
        self._own.add(there)
        named = all(
            value.is_graph_input() or isinstance(value.const_value, ir.ExternalTensor)
            for value in (mine, there)
        )
        return named and one.name_for(mine.name or "", two.number, two.path) == there.name and _type(mine) == _type(there)

    def _check_what_leaves(self, following: ir.Node) -> None:
        """Hidden states go to the next layer, outputs of the graph are outputs of both, and that is all."""
        one, two, read = self._one, self._two, self._read
        assert read is not None
        for layer, passed, readers in ((one, read[0], set(two.nodes)), (two, self._given, {following})):
            inside = set(layer.nodes)
            for value in layer.places:
                outside = {use.node for use in value.uses()} - inside
                if outside - readers or (outside and value is not passed):
                    raise Unlike(f"{value.name} of {layer.path} is read elsewhere")
        for mine, there in zip(one.places, two.places, strict=True):
            outputs = mine.is_graph_output(), there.is_graph_output()
            if any(outputs) and not (
                all(outputs) and one.name_for(mine.name or "", two.number, two.path) == there.name
            ):
                raise Unlike(f"outputs of {one.path} and {two.path} are not of one kind")


def _form(node: ir.Node) -> Hashable:
    """All of a node but for its operands."""
    attributes = tuple((name, _content(attribute)) for name, attribute in sorted(node.attributes.items()))
    outputs = tuple(_type(value) for value in node.outputs)
    return node.domain, node.op_type, node.overload, node.version, len(node.inputs), attributes, outputs


def _content(attribute: ir.Attr) -> Hashable:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return tensor.dtype, str(tensor.shape), tensor.tobytes()
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return object()  # equal to no other
    return attribute.type, repr(attribute.value)


def _type(value: ir.Value) -> tuple[str, str]:
    return str(value.type), str(value.shape)


def _parameter(graph: ir.Graph, of_another: ir.Value, name: str) -> ir.Value:
    """A parameter like another, under its own name."""
    tensor = of_another.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    if name not in graph.initializers:
        fresh = ir.ExternalTensor(
            location=tensor.location,
            offset=tensor.offset,
            length=tensor.length,
            dtype=tensor.dtype,
            shape=ir.Shape(list(tensor.shape)),
            name=name,
        )
        shape = None if of_another.shape is None else of_another.shape.copy()
        graph.initializers.add(ir.Value(name=name, shape=shape, type=of_another.type, const_value=fresh))
    return graph.initializers[name]
