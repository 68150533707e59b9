"""Damage to ONNX models: what no exporter writes, and what some do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.texts import Damage


def graph_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Damage to an ONNX model: what no exporter writes, and what some do."""
    for number in range(amount):
        name, change = rng.choice(list(_GRAPH_CHANGES.items()))
        damaged = _changed_graph(content, lambda model, change=change: change(model, rng))
        yield f"{name}, {number}", damaged, ""
    for name, change in _GRAPH_CHANGES.items():
        yield name, _changed_graph(content, lambda model, change=change: change(model, rng)), ""


def _changed_graph(content: bytes, change: Callable[[Any], None]) -> bytes:
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(content)
    change(model)
    return model.SerializeToString()


def _node(model: Any, rng: random.Random) -> Any:
    return rng.choice(model.graph.node)


def _drop_inputs(model: Any, rng: random.Random) -> None:
    del _node(model, rng).input[:]


def _drop_outputs(model: Any, rng: random.Random) -> None:
    del _node(model, rng).output[:]


def _blank_inputs(model: Any, rng: random.Random) -> None:
    node = _node(model, rng)
    for place in range(len(node.input)):
        node.input[place] = ""


def _more_inputs(model: Any, rng: random.Random) -> None:
    node = _node(model, rng)
    node.input.extend(list(node.input) * 5 + ["unknown"])


def _retype(model: Any, rng: random.Random) -> None:
    node = _node(model, rng)
    node.op_type = rng.choice(
        ("", "Unknown", "[/red]", "If", "Loop", "Scan", "Split", "Constant", "Cast", "Gather")
    )


def _attributes(model: Any, rng: random.Random) -> None:
    """Of another type under the same names, or none."""
    import onnx

    nodes = [node for node in model.graph.node if node.attribute]
    node = rng.choice(nodes or list(model.graph.node))
    names = [each.name for each in node.attribute] or ["axis"]
    del node.attribute[:]
    for name in names:
        value = rng.choice((-99, 2**62, 1.5, float("nan"), "x", [], [1, 2**40], ["a", "b"]))
        if value != []:
            node.attribute.append(onnx.helper.make_attribute(name, value))


def _drop_attributes(model: Any, rng: random.Random) -> None:
    del _node(model, rng).attribute[:]


def _circle(model: Any, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.input and node.output:
        node.input[0] = node.output[0]


def _same_output(model: Any, rng: random.Random) -> None:
    one, other = _node(model, rng), _node(model, rng)
    if one.output and other.output:
        one.output[0] = other.output[0]


def _shuffle(model: Any, rng: random.Random) -> None:
    nodes = [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _drop_nodes(model: Any, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node)) :]


def _drop_node(model: Any, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def _no_graph(model: Any, _: random.Random) -> None:
    model.ClearField("graph")


def _no_graph_inputs(model: Any, _: random.Random) -> None:
    del model.graph.input[:]


def _no_graph_outputs(model: Any, _: random.Random) -> None:
    del model.graph.output[:]


def _rename(model: Any, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    value.name = rng.choice(("", "[/red]", "a\x1b[31mb", "../x", "x" * 3000))


def _no_types(model: Any, rng: random.Random) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if rng.random() < 0.5:
            value.ClearField("type")


def _shapes(model: Any, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    dims = value.type.tensor_type.shape.dim
    for dim in dims:
        dim.dim_value = rng.choice((-1, 0, 2**62, 7))
    if rng.random() < 0.3:
        del dims[:]


def _element_types(model: Any, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = rng.choice((0, 8, 16, 99, -1))


def _external(model: Any, rng: random.Random) -> None:
    """Weights elsewhere: outside the folder, absent, or behind the end."""
    stored = [each for each in model.graph.initializer if each.external_data]
    if not stored:
        return
    tensor = rng.choice(stored)
    key = rng.choice(("location", "offset", "length"))
    values = {
        "location": ("../x", "/absolute/x", "", "absent", "a\0b", "[/red]", "."),
        "offset": ("-1", "x", str(2**62), "1.5"),
        "length": ("-1", "x", str(2**62), "0"),
    }
    kept = {each.key: each.value for each in tensor.external_data}
    del tensor.external_data[:]
    for name, value in {**kept, key: rng.choice(values[key])}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = name, value


def _initializers(model: Any, rng: random.Random) -> None:
    """Sizes that are not those of the data."""
    stored = list(model.graph.initializer)
    if not stored:
        return
    tensor = rng.choice(stored)
    choice = rng.randrange(5)
    if choice == 0:
        del tensor.dims[:]
        tensor.dims.extend([2**31, 2**31])
    elif choice == 1:
        del tensor.dims[:]
        tensor.dims.append(-5)
    elif choice == 2:
        tensor.data_type = rng.choice((0, 8, 77))
    elif choice == 3:
        tensor.raw_data = b"abc"
    else:
        tensor.name = ""


def _no_initializers(model: Any, _: random.Random) -> None:
    del model.graph.initializer[:]


def _opsets(model: Any, rng: random.Random) -> None:
    del model.opset_import[:]
    for domain, version in rng.choice(
        ([], [("", 0)], [("", -1)], [("", 999)], [("x", 1)], [("", 18), ("", 24)])
    ):
        entry = model.opset_import.add()
        entry.domain, entry.version = domain, version


def _versions(model: Any, rng: random.Random) -> None:
    model.ir_version = rng.choice((0, -1, 1, 999, 2**62))


def _bodies(model: Any, rng: random.Random) -> None:
    """A node with bodies that lack outputs, or hold each other."""
    import onnx

    kind = rng.choice(("If", "Loop", "Scan"))
    body = onnx.helper.make_graph([], "[/red]", [], [])
    names = {"If": ["then_branch", "else_branch"], "Loop": ["body"], "Scan": ["body"]}[kind]
    node = onnx.helper.make_node(kind, [model.graph.input[0].name], [model.graph.output[0].name])
    for name in names[: rng.randrange(len(names) + 1)]:
        node.attribute.append(onnx.helper.make_attribute(name, body))
    model.graph.node.insert(rng.randrange(len(model.graph.node)), node)


def _functions(model: Any, rng: random.Random) -> None:
    """Functions that call the one before twice, or themselves: 2^25 nodes when they are written out."""
    import onnx

    opset = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("f", 1)]
    itself = rng.random() < 0.3
    for level in range(26):
        called = f"f{level if itself else level - 1}"
        nodes = (
            [onnx.helper.make_node("Identity", ["x"], ["y"])]
            if level == 0 and not itself
            else [
                onnx.helper.make_node(called, ["x"], ["m"], domain="f"),
                onnx.helper.make_node(called, ["m"], ["y"], domain="f"),
            ]
        )
        model.functions.append(onnx.helper.make_function("f", f"f{level}", ["x"], ["y"], nodes, opset))
    model.opset_import.append(onnx.helper.make_opsetid("f", 1))
    node = _node(model, rng)
    node.op_type, node.domain = "f25", "f"


def _names_of_nodes(model: Any, rng: random.Random) -> None:
    for node in model.graph.node:
        node.name = rng.choice(("", "same", "[/red]", "\x1b[2J", "x" * 100))


def _deep_types(model: Any, rng: random.Random) -> None:
    """A sequence of sequences as an input."""
    held = rng.choice(model.graph.input).type
    held.Clear()
    for _ in range(50):
        held = held.sequence_type.elem_type


def _many_nodes(model: Any, _: random.Random) -> None:
    import onnx

    name = model.graph.input[0].name
    for number in range(5_000):
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [f"x{number}"]))
        name = f"x{number}"


_GRAPH_CHANGES: dict[str, Callable[[Any, random.Random], None]] = {
    "a node without inputs": _drop_inputs,
    "a node without outputs": _drop_outputs,
    "a node with blank inputs": _blank_inputs,
    "a node with inputs too many": _more_inputs,
    "a node of another operator": _retype,
    "attributes of other types": _attributes,
    "a node without attributes": _drop_attributes,
    "a node that reads itself": _circle,
    "two nodes with one output": _same_output,
    "nodes in another order": _shuffle,
    "without its last nodes": _drop_nodes,
    "without a node": _drop_node,
    "without a graph": _no_graph,
    "without inputs": _no_graph_inputs,
    "without outputs": _no_graph_outputs,
    "odd names of inputs": _rename,
    "inputs without types": _no_types,
    "odd shapes": _shapes,
    "odd element types": _element_types,
    "weights elsewhere": _external,
    "weights of other sizes": _initializers,
    "without weights": _no_initializers,
    "odd operator sets": _opsets,
    "odd versions": _versions,
    "bodies without outputs": _bodies,
    "functions that grow": _functions,
    "odd names of nodes": _names_of_nodes,
    "sequences of sequences": _deep_types,
    "5,000 nodes more": _many_nodes,
}
