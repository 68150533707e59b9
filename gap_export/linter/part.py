"""The part of a graph that one value is computed with, as a model of its own, run by the reference evaluator of the onnx package.

Bodies of If, Loop and Scan are taken whole, with what they read from outside. Of external files only small tables are read; where one is
not there, a table of floating-point numbers is made up. No weight is read: the shape of a hidden state, where the graph declares it, is
taken as declared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from gap_export.errors import LintError
from gap_export.files.read import is_file
from gap_export.linter.call import Call, CannotFeed, Inputs, check_fed, is_token
from gap_export.linter.dataflow import (
    LARGEST_CONSTANT,
    STANDARD_DOMAINS,
    Flow,
    is_float,
    is_op,
    name_of,
    subgraphs,
)
from gap_export.linter.evaluator import Budget, TooMuch, evaluator_of

Array = NDArray[Any]


class CannotEvaluate(Exception):
    """A part of a graph holds something the reference evaluator does not do; the text says what."""


class Part:
    """The nodes that one value is computed with.

    Args:
        flow: the graph.
        value: that is computed; what it stands for must be one value.
        given: a value to be fed, though the graph computes it.
        choices: If nodes whose condition is not computed but fixed, so that each branch can be looked at.

    Attributes:
        inputs: what is to be fed: inputs of the graph, `given`, and hidden states whose shape alone is asked for.
        made_up: whether a table that lies in an external file was replaced.
        branches: If nodes whose condition varies between calls.
        tables: leading extents of the constants that rows are looked up in.

    Raises:
        CannotEvaluate: bodies within bodies, large tables, or operators that the reference evaluator does not know.
    """

    def __init__(
        self,
        flow: Flow,
        value: ir.Value,
        given: ir.Value | None = None,
        choices: Mapping[ir.Node, bool] | None = None,
    ) -> None:
        definitions = flow.alternatives(value)
        if len(definitions) != 1:
            raise CannotEvaluate("it stands for several values")
        self.made_up = False
        self.inputs: list[ir.Value] = []
        self.branches: list[ir.Node] = []
        self.tables: set[int] = set()
        self._flow, self._choices = flow, dict(choices or {})
        self._budget = Budget(flow.work)
        nodes: dict[ir.Node, list[ir.Value]] = {}
        initializers: list[onnx.TensorProto] = []
        pending, seen = [definitions[0]], {definitions[0]}
        while pending:
            found = pending.pop()
            node = found.producer()
            if found is given or found in flow.inputs:
                self.inputs.append(found)
                continue
            if node is None:
                initializers.append(self._initializer(found))
                continue
            if node in nodes:
                continue
            nodes[node] = list(self._operands(node))
            for operand in nodes[node]:
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        self._evaluator = self._model(definitions[0], nodes, initializers)

    def _operands(self, node: ir.Node) -> Iterable[ir.Value]:
        """What a node reads; notes the tables and branches among it."""
        flow = self._flow
        if node.domain not in STANDARD_DOMAINS:
            raise CannotEvaluate(f"{node.domain}::{node.op_type} is not a standard operator")
        if is_op(node, "Shape"):
            shaped = node.inputs[0]
            if shaped is not None and self._declared(shaped):
                self.inputs.append(shaped)
                return ()
        if is_op(node, "If") and node.inputs[0] is not None and not flow.is_constant(node.inputs[0]):
            self.branches.append(node)
        bodies = list(subgraphs(node))
        if bodies and any(_varying_choice(flow, inner) for body in bodies for inner in body):
            raise CannotEvaluate(f"{name_of(node)} holds an If of its own")
        if is_op(node, "Gather") and node.inputs[0] is not None and flow.is_constant(node.inputs[0]):
            shape = node.inputs[0].shape
            self.tables.update(dim for dim in list(shape or [])[:1] if isinstance(dim, int))
        read = [v for v in node.inputs if v is not None and v.name]
        return read + [v for body in bodies for v in _captured(body)]

    def _declared(self, value: ir.Value) -> bool:
        """Whether a value is a hidden state whose shape is declared."""
        tokens = self._flow.bit(*(v for v in self._flow.inputs if is_token(v)))
        computed = value.producer() is not None and value.shape is not None
        return computed and is_float(value) is True and bool(self._flow.facts(value).values & tokens)

    def _model(
        self, output: ir.Value, nodes: dict[ir.Node, list[ir.Value]], initializers: list[onnx.TensorProto]
    ) -> ReferenceEvaluator:
        flow = self._flow
        protos = []
        for node in _in_order(nodes):
            try:
                proto = ir.to_proto(node)
            except (
                Exception
            ) as error:  # attributes that cannot be written: text that is no text, tensors without content
                raise CannotEvaluate(f"{name_of(node)} cannot be written") from error
            if node in self._choices:
                fixed = f"{name_of(node)} is fixed"
                proto.input[0] = fixed
                initializers.append(onnx.numpy_helper.from_array(np.array(self._choices[node]), fixed))
            protos.append(proto)
        self.inputs = list(dict.fromkeys(self.inputs))
        graph = onnx.helper.make_graph(
            protos,
            "part",
            [onnx.helper.make_tensor_value_info(name_of(v), _element_type(v), None) for v in self.inputs],
            [onnx.helper.make_empty_tensor_value_info(name_of(output))],
            initializers,
        )
        _in_the_standard_domain(graph)
        imports = {_standard(d): v for d, v in flow.model.graph.opset_imports.items()}
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=flow.model.ir_version)
        try:
            return evaluator_of(model, self._budget)
        except LintError:
            raise
        except Exception as error:  # an operator or opset it does not know
            raise CannotEvaluate("the reference evaluator does not know its operators") from error

    def _initializer(self, value: ir.Value) -> onnx.TensorProto:
        tensor = value.const_value
        if tensor is None:
            raise CannotEvaluate(f"{name_of(value)} belongs to the body of a loop")
        if tensor.size > LARGEST_CONSTANT:
            raise CannotEvaluate(f"{name_of(value)} is too large")
        try:
            if isinstance(tensor, ir.ExternalTensor) and not is_file(Path(tensor.path)):
                raise FileNotFoundError(tensor.path)  # or a pipe, or a device
            return ir.to_proto(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name))
        except Exception as error:  # the file is missing, truncated, elsewhere
            if not isinstance(tensor, ir.ExternalTensor) or not tensor.dtype.is_floating_point():
                raise CannotEvaluate(f"{name_of(value)} lies in a file that cannot be read") from error
        self.made_up = True
        shape = tuple(int(n) for n in tensor.shape.numpy())
        content = (1.0 + np.arange(tensor.size) % 9973).reshape(shape).astype(tensor.dtype.numpy())
        return ir.to_proto(ir.Tensor(content, dtype=tensor.dtype, name=value.name))

    def run(self, given: Mapping[str, Array], extents: Mapping[str, int]) -> Array:
        """The value.

        Args:
            given: name of an input -> content, broadcast to its shape; all others are zero.
            extents: of dimensions with a name; others are 1.

        Raises:
            CannotEvaluate: zeros that do not fit, ids beyond a table, an operator that is missing.
        """
        feeds: dict[str, Array] = {}
        for value in self.inputs:
            shape = [_extent(dim, extents) for dim in value.shape] if value.shape is not None else [1]
            try:
                check_fed(value, shape)
                fed = np.zeros(shape, (value.dtype or ir.DataType.INT64).numpy())
                if name_of(value) in given:
                    fed[...] = given[name_of(value)]
            except (CannotFeed, ValueError, TypeError) as error:
                raise CannotEvaluate(f"{name_of(value)} has another shape") from error
            feeds[name_of(value)] = fed
        return self._run(feeds)

    def evaluate(
        self, inputs: Inputs, call: Call, ids: Array, given: Mapping[str, Array] | None = None
    ) -> Array:
        """The value in one call.

        Args:
            inputs: how inputs are made.
            call: extents.
            ids: int64 [B, S] or [R, B, S], the position ids.
            given: values to feed as they are.

        Raises:
            CannotEvaluate: as `run`.
        """
        feeds: dict[str, Array] = dict(given or {})
        for value in self.inputs:
            if name_of(value) in feeds:
                continue
            try:
                if value in self._flow.inputs:
                    feeds[name_of(value)] = inputs.feed(value, call, ids)
                    continue
                extents = [e for dim in value.shape or () if (e := inputs.extent(dim, call)) is not None]
                check_fed(value, extents)
            except CannotFeed as error:
                raise CannotEvaluate(str(error)) from error
            if len(extents) < len(value.shape or ()):
                raise CannotEvaluate(f"the shape of {name_of(value)} is not known")
            feeds[name_of(value)] = np.zeros(extents, np.float32)
        return self._run(feeds)

    def _run(self, feeds: dict[str, Array]) -> Array:
        self._budget.start()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return np.asarray(next(iter(self._evaluator.run(None, feeds))))
        except LintError:
            raise
        except TooMuch as error:
            raise CannotEvaluate(str(error)) from error
        except Exception as error:
            raise CannotEvaluate("the reference evaluator cannot run it") from error


def _in_order(nodes: Mapping[ir.Node, list[ir.Value]]) -> list[ir.Node]:
    """Every node after those whose results it reads; ONNX Runtime takes graphs in which they stand in another order.

    Args:
        nodes: node -> what it reads.

    Raises:
        CannotEvaluate: they depend on each other in a circle.
    """
    waits_for = {node: {v.producer() for v in read} & nodes.keys() for node, read in nodes.items()}
    try:
        return [node for node in TopologicalSorter(waits_for).static_order() if node is not None]
    except CycleError as error:
        raise CannotEvaluate("its nodes depend on each other in a circle") from error


def _standard(domain: str) -> str:
    """The evaluator knows the standard domain by one of its two names."""
    return "" if domain in STANDARD_DOMAINS else domain


def _in_the_standard_domain(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.domain = _standard(node.domain)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _in_the_standard_domain(body)


def _captured(body: ir.Graph) -> list[ir.Value]:
    """What a body reads from outside of it, its own bodies included."""
    own: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}

    def visit(graph: ir.Graph) -> None:
        own.update(graph.inputs, graph.initializers.values())
        for node in graph:
            read.update(dict.fromkeys(v for v in node.inputs if v is not None and v.name))
            for inner in subgraphs(node):
                visit(inner)
            own.update(node.outputs)
        read.update(dict.fromkeys(graph.outputs))

    visit(body)
    return [value for value in read if value not in own]


def _varying_choice(flow: Flow, node: ir.Node) -> bool:
    """Whether a node of a body, or of a body in it, is an If whose condition varies."""
    if is_op(node, "If") and node.inputs[0] is not None and not flow.is_constant(node.inputs[0]):
        return True
    return any(_varying_choice(flow, inner) for body in subgraphs(node) for inner in body)


def _element_type(value: ir.Value) -> int:
    return int(value.dtype if value.dtype is not None else ir.DataType.INT64)


def _extent(dim: int | ir.SymbolicDim, extents: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else extents.get(dim.value or "", 1)
