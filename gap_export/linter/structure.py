"""Whether a graph is built as the standard says, as far as the rules rely on it: operands, attributes, bodies, constants, no circles.

Not `onnx.checker`: it wants external weights to be there, and refuses graphs with operators that ONNX Runtime adds under the standard's
name. Operators that the standard does not know are left to the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx
import onnx_ir as ir

from gap_export.errors import LintError
from gap_export.linter.dataflow import STANDARD_DOMAINS, is_op, name_of, subgraphs
from gap_export.linter.limits import (
    DEEPEST_BODIES,
    DEEPEST_CALLS,
    MOST_INPUTS,
    MOST_NODES,
    too_much,
)

_EXAMINED = 4096
"""Elements of constants that are read to see whether they can be; of larger ones their bytes are counted."""
_HINT = "the graph is invalid: check it with onnx.checker and export it again"
_LARGEST_OPSET = 2**31 - 1


def check_size(subject: str, model: ir.Model) -> None:
    """Refuse a model that would be too large to analyse with its functions expanded.

    Raises:
        LintError: more inputs, nodes, bodies or calls within each other than any decoder has, or functions that call themselves.
    """
    if len(model.graph.inputs) > MOST_INPUTS:
        raise too_much(f"has {len(model.graph.inputs)} inputs, and lint takes {MOST_INPUTS}", subject)
    functions = list(model.functions.values())
    calls = {f.identifier(): _calls(subject, f.graph, model) for f in functions}
    try:
        order = list(TopologicalSorter({f: set(called) for f, (_, called) in calls.items()}).static_order())
    except CycleError as error:
        name = ":".join(part for part in error.args[1][0] if part)
        raise LintError(
            f"has functions that cannot be expanded: {name} calls itself", subject=subject, hint=_HINT
        ) from error
    nodes: dict[Any, int] = {}
    depths: dict[Any, int] = {}
    for identifier in order:
        own, called = calls[identifier]
        nodes[identifier] = own + sum(times * nodes[f] for f, times in called.items())
        depths[identifier] = 1 + max((depths[f] for f in called), default=0)
    own, called = _calls(subject, model.graph, model)
    if max((depths[f] for f in called), default=0) > DEEPEST_CALLS:
        raise too_much(f"has functions that call functions more than {DEEPEST_CALLS} deep", subject)
    total = own + sum(times * nodes[f] for f, times in called.items())
    if total > MOST_NODES:
        expanded = " with its functions expanded" if called else ""
        raise too_much(f"has more than {MOST_NODES} nodes{expanded}", subject)


def _calls(subject: str, graph: ir.Graph, model: ir.Model) -> tuple[int, dict[Any, int]]:
    """(nodes of a graph with its bodies, function -> how often it is called)."""
    count = 0
    called: dict[Any, int] = {}
    for node, depth in nodes_within(graph):
        if depth > DEEPEST_BODIES:
            raise too_much(f"has bodies within each other, more than {DEEPEST_BODIES} deep", subject)
        count += 1
        identifier = node.op_identifier()
        if identifier in model.functions:
            called[identifier] = called.get(identifier, 0) + 1
    return count, called


def nodes_within(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """All nodes of a graph and of its bodies, and how many bodies lie around each."""
    pending: list[tuple[Iterable[ir.Node], int]] = [(graph, 0)]
    while pending:
        nodes, depth = pending.pop()
        for node in nodes:
            yield node, depth
            pending += [(body, depth + 1) for body in subgraphs(node)]


def check_structure(subject: str, model: ir.Model) -> None:
    """Refuse what the rules cannot be applied to.

    Args:
        subject: the graph, for messages.
        model: functions expanded.

    Raises:
        LintError: it names the node and what is wrong with it.
    """
    for domain, version in model.graph.opset_imports.items():
        if not 1 <= version <= _LARGEST_OPSET:
            raise _invalid(subject, f"imports version {version} of the operators of {domain or 'ai.onnx'!r}")
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    seen: set[ir.Graph] = {model.graph}
    for node, _ in nodes_within(model.graph):
        seen.update(subgraphs(node))
        if not all(isinstance(name, str) for name in (node.op_type, node.domain, node.name or "")):
            raise _invalid(subject, f"has the name {node.name!r} or {node.op_type!r}, which is not UTF-8")
        schema = _schema(node.op_type, opset) if node.domain in STANDARD_DOMAINS else None
        wrong = _wrong_attributes(node, schema)
        if schema is not None:
            wrong = wrong or _wrong_operands(node, schema) or _wrong_bodies(node)
        if wrong:
            raise _invalid(f"{subject}: {name_of(node)}", wrong)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                _check_tensor(f"{subject}: {name_of(node)}", attribute.value)
    for graph in seen:
        for value in (*graph.inputs, *graph.outputs):
            if not isinstance(value.name or "", str):
                raise _invalid(subject, f"has the name {value.name!r}, which is not UTF-8")
        for value in graph.initializers.values():
            if value.const_value is not None:
                _check_tensor(f"{subject}: {name_of(value)}", value.const_value)


def _invalid(subject: str, message: str) -> LintError:
    return LintError(message, subject=subject, hint=_HINT)


@dataclass(frozen=True)
class _Schema:
    """What the standard says of an operator.

    Attributes:
        attributes: name -> (type, whether it must be there).
        operands: (name, whether it must be there) of each.
        inputs: least and most of them.
        outputs: least and most of them.
    """

    attributes: dict[str, tuple[ir.AttributeType, bool]]
    operands: tuple[tuple[str, bool], ...]
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@cache
def _schema(op_type: str, opset: int) -> _Schema | None:
    """Of an operator in an opset or, where none is imported, in the newest; None where the standard has it not."""
    newest = onnx.defs.onnx_opset_version()
    try:
        found = onnx.defs.get_schema(op_type, min(opset or newest, newest), "")
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return _Schema(
        {
            name: (ir.AttributeType(_number(attribute.type)), attribute.required)
            for name, attribute in found.attributes.items()
        },
        tuple((formal.name, formal.option == single) for formal in found.inputs),
        (found.min_input, found.max_input),
        (found.min_output, found.max_output),
    )


def _number(attribute_type: Any) -> int:
    """Of a type in the file format, which the package's enumeration does not give by its annotations."""
    return int(attribute_type.value)


def _wrong_attributes(node: ir.Node, schema: _Schema | None) -> str | None:
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return f"its attribute {name!r} refers to one of a function, and stands in none"
    for name, (wanted, required) in schema.attributes.items() if schema is not None else ():
        given = node.attributes.get(name)
        if given is None:
            if required:
                return f"{node.op_type} lacks its attribute {name!r}"
        elif given.type != wanted:
            return f"its attribute {name!r} is of type {given.type.name}, and that of {node.op_type} is {wanted.name}"
    return None


def _wrong_operands(node: ir.Node, schema: _Schema) -> str | None:
    given = [value is not None and bool(value.name) for value in node.inputs]
    while given and not given[-1]:
        given.pop()
    if not schema.inputs[0] <= len(given) <= schema.inputs[1]:
        return f"{node.op_type} has {len(given)} inputs, and takes {_between(*schema.inputs)}"
    for place, (present, (name, needed)) in enumerate(zip(given, schema.operands, strict=False)):
        if needed and not present:
            return f"{node.op_type} lacks its input {place} ({name})"
    if not schema.outputs[0] <= len(node.outputs) <= schema.outputs[1]:
        return f"{node.op_type} has {len(node.outputs)} outputs, and gives {_between(*schema.outputs)}"
    return None


def _between(least: int, most: int) -> str:
    if least == most:
        return str(least)
    return f"at least {least}" if most >= _LARGEST_OPSET else f"{least} to {most}"


def _wrong_bodies(node: ir.Node) -> str | None:
    """Whether the bodies of If, Loop and Scan have what goes in and out of the node."""
    bodies = list(subgraphs(node))
    results, operands = len(node.outputs), len(node.inputs)
    if is_op(node, "If"):
        wrong = next((body for body in bodies if len(body.outputs) != results), None)
        if wrong is not None:
            return f"a branch gives {len(wrong.outputs)} results, and the If {results}"
    elif is_op(node, "Loop", "Scan") and len(bodies) != 1:
        return f"{node.op_type} has {len(bodies)} bodies"
    elif is_op(node, "Loop"):
        body, carried = bodies[0], operands - 2
        if operands < 2 or len(body.inputs) != 2 + carried:
            return f"the body of the Loop takes {len(body.inputs)} inputs, and is given {2 + max(carried, 0)}"
        if results < carried or len(body.outputs) != 1 + results:
            return f"the body of the Loop gives {len(body.outputs)} results, and {1 + results} are wanted"
    elif is_op(node, "Scan"):
        body, scanned = bodies[0], node.attributes["num_scan_inputs"].as_int()
        if not 1 <= scanned <= operands or len(body.inputs) != operands:
            return f"Scan goes through {scanned} of {operands} inputs, and its body takes {len(body.inputs)}"
        if len(body.outputs) != results or results < operands - scanned:
            return f"the body of the Scan gives {len(body.outputs)} results, and {results} are wanted"
    return None


def _check_tensor(subject: str, tensor: Any) -> None:
    """Refuse a constant whose data are not those of its shape."""
    dims = list(tensor.shape)
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise _invalid(subject, "is a constant without an element type")
    if any(not isinstance(dim, int) or dim < 0 for dim in dims):
        raise _invalid(subject, f"is a constant of shape {dims}")
    if isinstance(tensor, ir.ExternalTensor):
        return
    elements = math.prod(dims)
    if elements > _EXAMINED:
        proto = tensor.raw if isinstance(tensor.raw, onnx.TensorProto) else None
        if proto is None or tensor.dtype == ir.DataType.STRING:
            return
        least = tensor.nbytes if proto.HasField("raw_data") else elements // 2
        if proto.ByteSize() < least:  # which reads nothing
            raise _invalid(subject, f"has fewer bytes than its shape {dims} asks for")
        return
    try:
        tensor.numpy()
    except Exception as error:  # it is decoded in many ways, by type
        raise _invalid(subject, f"is a constant of shape {dims} that cannot be read") from error
