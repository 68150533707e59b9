"""Malformed graphs: good small ones, changed at random in the ways that exporters, editors and disks change them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx

Change = Callable[[onnx.ModelProto, random.Random], None]


def mutated(good: bytes, seed: int) -> tuple[str, bytes]:
    """One malformed graph.

    Args:
        good: a serialized model.
        seed: which one; the same seed makes the same.

    Returns:
        (what was changed, the serialized model).
    """
    draw = random.Random(seed)
    if draw.random() < 0.15:
        change = draw.choice(BYTES)
        return change.__name__, change(good, draw)
    model = onnx.ModelProto.FromString(good)
    names = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(CHANGES)
        names.append(change.__name__)
        change(model, draw)
    return " + ".join(names), model.SerializeToString()


def _graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [model.graph]
    for graph in found:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found.append(attribute.g)
                found.extend(attribute.graphs)
    return found


def _node(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    nodes = [node for graph in _graphs(model) for node in graph.node]
    return draw.choice(nodes) if nodes else model.graph.node.add(op_type="Identity")


def _with_attribute(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    nodes = [node for graph in _graphs(model) for node in graph.node if node.attribute]
    return draw.choice(nodes) if nodes else _node(model, draw)


def _names(model: onnx.ModelProto) -> list[str]:
    found = [name for graph in _graphs(model) for node in graph.node for name in node.output]
    return [*found, *(value.name for value in model.graph.input), "", "nowhere", "\n", "x" * 5000]


def drop_operand(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.input:
        del node.input[draw.randrange(len(node.input))]


def drop_all_operands(model: onnx.ModelProto, draw: random.Random) -> None:
    del _node(model, draw).input[:]


def rewire(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(_names(model))


def more_operands(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    node.input.extend(draw.choices(_names(model), k=draw.randrange(1, 4)))


def drop_result(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.output:
        del node.output[draw.randrange(len(node.output))]


def rename_result(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _node(model, draw)
    if node.output:
        node.output[draw.randrange(len(node.output))] = draw.choice(_names(model))


def rename_everywhere(model: onnx.ModelProto, draw: random.Random) -> None:
    old, new = draw.choice(_names(model)), draw.choice(_names(model))
    for graph in _graphs(model):
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]


def other_operator(model: onnx.ModelProto, draw: random.Random) -> None:
    operators = (
        "If Loop Scan SequenceMap Attention RotaryEmbedding Softmax MatMul Gather Range ConstantOfShape Expand TopK Slice "
        "Split TensorScatter GatherElements Mod Where Constant Identity Concat Einsum GroupQueryAttention Resize Optional"
    )
    _node(model, draw).op_type = draw.choice([*operators.split(), "", "NoSuch", "x" * 3000])


def other_domain(model: onnx.ModelProto, draw: random.Random) -> None:
    _node(model, draw).domain = draw.choice(
        ["com.microsoft", "ai.onnx.ml", "nowhere", "", "ai.onnx", "trt", "\n"]
    )


def other_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    """Of another type than the operator's, or another value."""
    node = _with_attribute(model, draw)
    names = [attribute.name for attribute in node.attribute]
    names += [
        "axis",
        "perm",
        "to",
        "value",
        "num_scan_inputs",
        "do_rotary",
        "num_heads",
        "mode",
        "body",
        "sorted",
    ]
    name = draw.choice(names)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    made = onnx.AttributeProto(name=name)
    draw.choice(_CONTENTS)(made, draw)
    del node.attribute[:]
    node.attribute.extend([*kept, made])


def _an_int(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type, made.i = onnx.AttributeProto.INT, draw.choice([-1, 0, 1, 7, -(2**63), 2**63 - 1])


def _ints(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type = onnx.AttributeProto.INTS
    made.ints.extend(draw.choices([-5, 0, 1, 9, 2**40], k=draw.randrange(5)))


def _a_float(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type, made.f = onnx.AttributeProto.FLOAT, draw.choice([0.0, -1.5, float("nan"), float("inf")])


def _text(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type, made.s = onnx.AttributeProto.STRING, draw.choice([b"", b"linear", b"\xff\xfe", b"x" * 9000])


def _a_tensor(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type = onnx.AttributeProto.TENSOR
    _break_tensor(made.t, draw)


def _a_graph(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type = draw.choice([onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS])
    graph = made.g if made.type == onnx.AttributeProto.GRAPH else made.graphs.add()
    graph.node.add(op_type="Identity", input=["a"], output=["b"])
    for name in draw.choices(["a", "b", ""], k=draw.randrange(3)):
        graph.input.add(name=name)
        graph.output.add(name=name)


def _a_reference(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type, made.ref_attr_name = draw.choice([1, 2, 5]), "other"


def _without_type(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.i = draw.randrange(9)


def _unknown_type(made: onnx.AttributeProto, draw: random.Random) -> None:
    made.type = draw.choice([0, 11, 12, 13, 14])


_CONTENTS: tuple[Callable[[onnx.AttributeProto, random.Random], None], ...] = (
    _an_int,
    _ints,
    _a_float,
    _text,
    _a_tensor,
    _a_graph,
    _a_reference,
    _without_type,
    _unknown_type,
)


def drop_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = _with_attribute(model, draw)
    if node.attribute:
        del node.attribute[draw.randrange(len(node.attribute))]


def _break_tensor(tensor: onnx.TensorProto, draw: random.Random) -> None:
    how = draw.randrange(7)
    if how == 0:
        tensor.dims[:] = draw.choices([-1, 0, 1, 3, 2**20, 2**40, 2**62], k=draw.randrange(4))
    elif how == 1:
        tensor.data_type = draw.randrange(30)
    elif how == 2:
        tensor.raw_data = draw.randbytes(draw.randrange(20))
    elif how == 3:
        tensor.ClearField("raw_data")
    elif how == 4:
        tensor.data_type = onnx.TensorProto.STRING
        tensor.ClearField("raw_data")
        tensor.string_data.extend([b"a", b"\xff"])
    elif how == 5:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        key, value = draw.choice(
            [
                ("location", "../../weights"),
                ("location", "none.bin"),
                ("offset", "-4"),
                ("length", "x"),
                ("", ""),
            ]
        )
        tensor.external_data.add(key=key, value=value)
    else:
        tensor.name = draw.choice(["", "logits", "position_ids"])


def break_constant(model: onnx.ModelProto, draw: random.Random) -> None:
    graph = draw.choice(_graphs(model))
    tensors = list(graph.initializer)
    tensors += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    _break_tensor(draw.choice(tensors) if tensors else graph.initializer.add(), draw)


def drop_constant(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[draw.randrange(len(model.graph.initializer))]


def sparse_constant(model: onnx.ModelProto, draw: random.Random) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = draw.choice(["", "sparse", "logits"])
    sparse.dims.extend(draw.choices([-1, 0, 2, 2**60], k=2))


def other_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    """Of an input, an output or a value inside."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    value = draw.choice(values) if values else model.graph.input.add(name="x")
    how = draw.randrange(6)
    if how == 0:
        value.type.tensor_type.elem_type = draw.randrange(30)
    elif how == 1:
        value.type.tensor_type.ClearField("shape")
    elif how == 2:
        value.ClearField("type")
    elif how == 3:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for extent in draw.choices(
            [-7, 0, 1, 3, 16, 2**31, 2**50, "S", "B", "9" * 30, "", "²"], k=draw.randrange(7)
        ):
            dim = shape.dim.add()
            if isinstance(extent, int):
                dim.dim_value = extent
            else:
                dim.dim_param = extent


def other_inputs(model: onnx.ModelProto, draw: random.Random) -> None:
    values: Any = draw.choice([model.graph.input, model.graph.output])
    how = draw.randrange(4)
    if how == 0 and values:
        del values[draw.randrange(len(values))]
    elif how == 1 and values:
        values.add().CopyFrom(draw.choice(values))
    elif how == 2 and values:
        draw.choice(values).name = draw.choice(_names(model))
    else:
        del values[:]


def shuffle_nodes(model: onnx.ModelProto, draw: random.Random) -> None:
    graph = draw.choice(_graphs(model))
    nodes = list(graph.node)
    draw.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def repeat_node(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.add().CopyFrom(_node(model, draw))


def drop_node(model: onnx.ModelProto, draw: random.Random) -> None:
    graph = draw.choice(_graphs(model))
    if graph.node:
        del graph.node[draw.randrange(len(graph.node))]


def other_versions(model: onnx.ModelProto, draw: random.Random) -> None:
    versions = [-1, 0, 1, 7, 99, 10**9, 2**62]
    if draw.random() < 0.3:
        model.ir_version = draw.choice(versions)
    elif draw.random() < 0.5:
        del model.opset_import[:]
    else:
        for imported in model.opset_import:
            imported.version = draw.choice(versions)


def call_functions(model: onnx.ModelProto, draw: random.Random) -> None:
    """Functions that call each other, twice each: as deep as 2^25 nodes, or in a circle."""
    length = draw.choice([2, 26, 300])
    for i in range(length):
        function = model.functions.add(name=f"f{i}", domain="local", input=["x"], output=["y"])
        function.opset_import.add(domain="", version=draw.choice([24, 13]))
        function.opset_import.add(domain="local", version=1)
        called = f"f{i + 1}" if i + 1 < length else draw.choice(["f0", "none", f"f{i}"])
        is_last = i + 1 == length and draw.random() < 0.6
        domain, called = ("", "Identity") if is_last else ("local", called)
        function.node.add(op_type=called, domain=domain, input=["x"], output=["z"])
        function.node.add(op_type=called, domain=domain, input=["z"], output=["y"])
    if not any(imported.domain == "local" for imported in model.opset_import):
        model.opset_import.add(domain="local", version=1)
    node = _node(model, draw)
    node.op_type, node.domain = "f0", "local"


def truncate(good: bytes, draw: random.Random) -> bytes:
    return good[: draw.randrange(len(good))]


def flip(good: bytes, draw: random.Random) -> bytes:
    content = bytearray(good)
    for _ in range(draw.choice((1, 4, 60))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def splice_bytes(good: bytes, draw: random.Random) -> bytes:
    start, end = sorted((draw.randrange(len(good)), draw.randrange(len(good))))
    return draw.choice(
        [good[:start] + good[end:], good[:end] + good[start:], draw.randbytes(300), good + good]
    )


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncate, flip, splice_bytes)
CHANGES: tuple[Change, ...] = (
    drop_operand,
    drop_all_operands,
    rewire,
    more_operands,
    drop_result,
    rename_result,
    rename_everywhere,
    other_operator,
    other_domain,
    other_attribute,
    drop_attribute,
    break_constant,
    drop_constant,
    sparse_constant,
    other_shape,
    other_inputs,
    shuffle_nodes,
    repeat_node,
    drop_node,
    other_versions,
    call_functions,
)
