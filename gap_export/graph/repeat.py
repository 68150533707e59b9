"""Layers that were passed by in a trace, put back as copies of one that was traced.

Two neighbouring layers of a run are in the graph as they were traced, and must be equal as graphs: node by node the same operators, attributes,
types and shapes, and operands that correspond. These correspond: a value and itself; what is made at the same place; a parameter, an input or
an output of either layer's number; and one value, the hidden states, that each layer reads from the one before. Then the second is copied with
these replaced.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from gap_export.bundle.spec import GraphSpec
from gap_export.modeling.layers import LayerStack, Unlike, renumbered

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: names of the modules that it was traced in, from the outermost on, as a Python list."""


def repeat_layers(model: ir.Model, stack: LayerStack, spec: GraphSpec) -> None:
    """Replace the node of every layer that was passed by by a copy of a layer that was traced; in place.

    Args:
        model: traced with `modeling.layers.passed_by`, with torch's metadata.
        stack: of the module.
        spec: of the whole graph.

    Raises:
        Unlike: traced layers are not equal as graphs, or their nodes do not lie together. The model is of no use then.
    """
    nodes = list(model.graph)
    inside: dict[str, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        for path in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")):
            inside[path].append(node)
    for run in stack.repeated:
        layers = [_Layer(number, stack.name(number), inside[stack.name(number)]) for number in run]
        one, two, *passed_by = layers
        together = [node for layer in layers for node in layer.nodes]
        if not one.nodes or any([node.op_type for node in each.nodes] != ["Identity"] for each in passed_by):
            raise Unlike(f"torch does not say which nodes are those of {one.path} and of the layers after it")
        first = nodes.index(one.nodes[0])
        if nodes[first : first + len(together)] != together:
            raise Unlike(f"nodes of {one.path} and of the layers after it do not lie together")
        template = _template(one, two, passed_by[0].nodes[0])
        for layer in passed_by:
            template.put(model.graph, layer)
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        by_name = {value.name: value for value in values}
        values[:] = [by_name[tensor.name] for tensor in tensors]


class _Layer:
    """A layer as it was traced.

    Args:
        number: of the layer.
        path: of its module.
        nodes: in graph order.
    """

    def __init__(self, number: int, path: str, nodes: list[ir.Node]) -> None:
        self.number, self.path, self.nodes = number, path, nodes
        made = [value for node in nodes for value in node.outputs]
        self.places = {value: place for place, value in enumerate(made)}

    def name_for(self, value: ir.Value, other: _Layer) -> str:
        """What another layer calls its own parameter, input or output."""
        name = value.name or ""
        if name.startswith(f"{self.path}."):
            return other.path + name.removeprefix(self.path)
        return renumbered(name, self.number, other.number)


class _Comparison:
    """Of the operands of two layers, node by node.

    Attributes:
        own: parameters and inputs that the second layer reads, and no other.
        read: what the second reads from the first -> what the first reads in its place.
    """

    def __init__(self, one: _Layer, two: _Layer) -> None:
        self._one, self._two = one, two
        self.own: set[ir.Value] = set()
        self.read: dict[ir.Value, ir.Value] = {}

    def corresponds(self, mine: ir.Value | None, there: ir.Value | None) -> bool:
        """Whether an operand is to the first layer what the other is to the second."""
        one, two = self._one, self._two
        if mine is None or there is None:
            return mine is there
        if there in two.places:
            return one.places.get(mine) == two.places[there]
        if there in one.places:
            return self.read.setdefault(there, mine) is mine and mine not in one.places
        if mine is there:
            return True
        self.own.add(there)
        given = all(
            value.is_graph_input() or isinstance(value.const_value, ir.ExternalTensor)
            for value in (mine, there)
        )
        return given and self.are_named_alike(mine, there) and _type(mine) == _type(there)

    def are_named_alike(self, mine: ir.Value, there: ir.Value) -> bool:
        """But for the number of the layer."""
        return self._one.name_for(mine, self._two) == there.name


def _template(one: _Layer, two: _Layer, following: ir.Node) -> _Template:
    """The second of two layers, if it equals the first.

    Args:
        one: a layer.
        two: the one after it.
        following: the node of the next, which was passed by.

    Raises:
        Unlike: they are not equal, or further values than the hidden states go from layer to layer.
    """
    if len(one.nodes) != len(two.nodes):
        raise Unlike(f"the graphs of {one.path} and {two.path} have different numbers of nodes")
    comparison = _Comparison(one, two)
    for node, other in zip(one.nodes, two.nodes, strict=True):
        if _form(node) != _form(other) or not all(map(comparison.corresponds, node.inputs, other.inputs)):
            raise Unlike(f"{other.name} in the graph of {two.path} is not {node.name} in that of {one.path}")
    reads, gives = next(iter(comparison.read), None), following.inputs[0]
    if reads is None or gives is None or two.places.get(gives) != one.places[reads]:
        raise Unlike(f"what {two.path} gives is not what {one.path} gives")
    for layer, passed, readers in ((one, reads, set(two.nodes)), (two, gives, {following})):
        for value in layer.places:
            outside = {use.node for use in value.uses()} - set(layer.nodes)
            if outside - readers or (outside and value is not passed):
                raise Unlike(f"{value.name} of {layer.path} is read elsewhere")
    for mine, there in zip(one.places, two.places, strict=True):
        outputs = mine.is_graph_output(), there.is_graph_output()
        if any(outputs) and not (all(outputs) and comparison.are_named_alike(mine, there)):
            raise Unlike(f"outputs of {one.path} and {two.path} are not of one kind")
    return _Template(two, reads, gives, frozenset(comparison.own))


@dataclass(frozen=True)
class _Template:
    """A layer to be copied.

    Attributes:
        layer: as it was traced.
        reads: hidden states that it reads.
        gives: hidden states that it makes.
        own: parameters and inputs that are those of its number.
    """

    layer: _Layer
    reads: ir.Value
    gives: ir.Value
    own: frozenset[ir.Value]

    def put(self, graph: ir.Graph, layer: _Layer) -> None:
        """A copy in the place of the node of a layer that was passed by, and what it takes and gives besides hidden states.

        Args:
            graph: of both.
            layer: one node that takes hidden states and gives hidden states.
        """
        (node,) = layer.nodes
        assert node.inputs[0] is not None
        copies = {self.reads: node.inputs[0]}
        for value in self.own:
            copies[value] = _given(graph, value, self.layer.name_for(value, layer))
        for original in self.layer.nodes:
            graph.insert_before(node, _copy(original, copies))
        for value in self.layer.places:
            if value.is_graph_output():
                copies[value].name = self.layer.name_for(value, layer)
                graph.outputs.append(copies[value])
        node.outputs[0].replace_all_uses_with(copies[self.gives])
        graph.remove(node, safe=True)


def _copy(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    """A node again, on copies of its operands; what it makes is added to `copies`."""
    fresh = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else copies.get(value, value) for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
    )
    for value, copy in zip(node.outputs, fresh.outputs, strict=True):
        copy.type, copy.shape = value.type, None if value.shape is None else value.shape.copy()
        copies[value] = copy
    return fresh


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


def _given(graph: ir.Graph, of_another: ir.Value, name: str) -> ir.Value:
    """A parameter or an input like another, under its own name."""
    shape = None if of_another.shape is None else of_another.shape.copy()
    value = ir.Value(name=name, shape=shape, type=of_another.type)
    if of_another.is_graph_input():
        graph.inputs.append(value)
        return value
    tensor = of_another.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    value.const_value = ir.ExternalTensor(
        location=tensor.location,
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=ir.Shape(list(tensor.shape)),
        name=name,
    )
    graph.initializers.add(value)
    return value
