"""Run the part of a graph between the position ids and the rotary angles, and see whether angle j follows id j.

Data flow alone cannot tell `ids` from `ids[:, :1] + arange(S)`: both depend on the input. But the part in question is tiny
(a few nodes, one vector of frequencies or one table), so it is evaluated, with the reference evaluator of the onnx
package and without any weight. Three properties are checked:

    local         changing one id changes the angles of that token and of no other
    positionless  permuting the ids permutes the angles: an angle depends on the id and not on where the token stands
    exact         ids 1000 and 1001 give different angles (ids in bfloat16, or clamped ones, do not)

Frequencies and tables that lie in external files are replaced by made-up ones of the same shape: the first two
properties do not depend on them. What cannot be evaluated (operators of other domains, loops) is reported as undecided, not as wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from gap_export.linter.dataflow import LARGEST_CONSTANT, Flow, name_of, subgraphs

Array = NDArray[np.generic]

_TOKENS = (7, 11, 13)
"""Sequence lengths to try: one that no other axis of the angles has tells the token axis apart."""
_SMALLEST_TABLE = 32
"""Ids of the first two properties stay below this, so that small tables serve."""


@dataclass(frozen=True)
class Outcome:
    """What a probe found out.

    Attributes:
        follows: True or False where it was decided, None where the part could not be evaluated.
        sentence: what is wrong, where `follows` is False.
    """

    follows: bool | None
    sentence: str = ""


UNDECIDED = Outcome(None)
FOLLOWS = Outcome(True)


class CannotEvaluate(Exception):
    """A part of a graph holds something the reference evaluator does not do."""


def probe(flow: Flow, ids: ir.Value, angles: Sequence[ir.Value]) -> dict[ir.Value, Outcome]:
    """Whether each angle tensor follows the ids, token by token.

    Args:
        flow: the graph.
        ids: what carries the ids, [S], [B, S] or [R, B, S]: the graph input, or a choice from it.
        angles: tensors to examine.
    """
    outcomes: dict[ir.Value, Outcome] = {}
    for angle in dict.fromkeys(angles):
        if flow.definitions(angle) == [ids]:
            outcomes[angle] = FOLLOWS
            continue
        outcomes[angle] = UNDECIDED
        for tokens in _TOKENS:
            try:
                outcomes[angle] = _examine(_Angles(flow, ids, angle), tokens)
                break
            except CannotEvaluate:
                continue
    return outcomes


class Part:
    """The nodes that one value is computed with, as a model of its own.

    Args:
        flow: the graph.
        value: that is computed; what it stands for must be one value.
        given: a value to be fed, though the graph computes it.

    Attributes:
        inputs: what is to be fed: inputs of the graph, and `given`.
        made_up: whether a table that lies in an external file was replaced.

    Raises:
        CannotEvaluate: control flow, large tables, or operators that the reference evaluator does not know.
    """

    def __init__(self, flow: Flow, value: ir.Value, given: ir.Value | None = None) -> None:
        definitions = flow.definitions(value)
        if len(definitions) != 1:
            raise CannotEvaluate
        self.made_up = False
        self.inputs: list[ir.Value] = []
        nodes: dict[ir.Node, None] = {}
        initializers: list[onnx.TensorProto] = []

        def step(node: ir.Node) -> Iterable[ir.Value | None]:
            return () if given in node.outputs else node.inputs

        for found in flow.upstream(definitions[0], step):
            node = found.producer()
            if found is given:
                self.inputs.append(found)
            elif node is not None:
                if any(True for _ in subgraphs(node)):
                    raise CannotEvaluate
                if any(v is not None and flow.definitions(v) != [v] for v in node.inputs):
                    raise CannotEvaluate
                nodes[node] = None
            elif found in flow.inputs:
                self.inputs.append(found)
            else:
                initializers.append(self._initializer(found))
        order = {node: i for i, node in enumerate(flow.nodes)}
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in sorted(nodes, key=lambda n: order[n])],
            "part",
            [onnx.helper.make_tensor_value_info(name_of(v), _element_type(v), None) for v in self.inputs],
            [onnx.helper.make_empty_tensor_value_info(name_of(definitions[0]))],
            initializers,
        )
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in flow.model.graph.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=flow.model.ir_version)
        try:
            self._evaluator = ReferenceEvaluator(model)
        except Exception as error:  # an operator or opset it does not know
            raise CannotEvaluate from error

    def _initializer(self, value: ir.Value) -> onnx.TensorProto:
        tensor = value.const_value
        if tensor is None or tensor.size > LARGEST_CONSTANT:
            raise CannotEvaluate
        if isinstance(tensor, ir.ExternalTensor):
            if not tensor.dtype.is_floating_point():
                raise CannotEvaluate  # an axis, an extent: nothing that could be made up
            self.made_up = True
            shape = tuple(int(n) for n in tensor.shape.numpy())
            content = (1.0 + np.arange(tensor.size) % 9973).reshape(shape).astype(tensor.dtype.numpy())
            return ir.to_proto(ir.Tensor(content, dtype=tensor.dtype, name=value.name))
        return ir.to_proto(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name))

    def run(self, given: Mapping[str, Array], extents: dict[str, int]) -> Array:
        """The value.

        Args:
            given: name of an input -> content, broadcast to its shape; all others are zero.
            extents: of dimensions with a name; others are 1.

        Raises:
            CannotEvaluate: zeros that do not fit, ids beyond a table, an operator that is missing.
        """
        feeds: dict[str, Array] = {}
        try:
            for value in self.inputs:
                shape = [_extent(dim, extents) for dim in value.shape] if value.shape is not None else [1]
                fed = np.zeros(shape, (value.dtype or ir.DataType.INT64).numpy())
                if name_of(value) in given:
                    fed[...] = given[name_of(value)]
                feeds[name_of(value)] = fed
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return np.asarray(next(iter(self._evaluator.run(None, feeds))))
        except Exception as error:
            raise CannotEvaluate from error


class _Angles:
    """One angle tensor as a function of the ids.

    Args:
        flow: the graph.
        ids: what carries the position ids: the graph input, or a choice from it.
        angle: the tensor.
    """

    def __init__(self, flow: Flow, ids: ir.Value, angle: ir.Value) -> None:
        self.ids, self._part = ids, Part(flow, angle, given=ids)
        self.made_up = self._part.made_up

    def run(self, row: Array) -> Array:
        """The angles for one row of ids, every other input zero, float64 where it is a float."""
        result = self._part.run({name_of(self.ids): row}, _extents(self.ids, len(row)))
        if result.dtype.kind == "f" or result.dtype == ml_dtypes.bfloat16:
            return result.astype(np.float64)
        return result


def _examine(part: _Angles, tokens: int) -> Outcome:
    fixed = part.ids.shape[-1] if part.ids.shape is not None and len(part.ids.shape) else None
    if isinstance(fixed, int):
        tokens = fixed
    if tokens > _SMALLEST_TABLE // 2 or tokens < 2:
        return UNDECIDED
    base = np.arange(tokens)
    before = part.run(base)
    axes = [axis for axis, extent in enumerate(before.shape) if extent == tokens]
    if len(axes) != 1:
        raise CannotEvaluate
    for j in (0, tokens // 2, tokens - 1):
        changed_id = base.copy()
        changed_id[j] = tokens + 5
        rows = _rows_that_differ(before, part.run(changed_id), axes[0])
        if j not in rows:
            return Outcome(False, f"changing the id of token {j} of {tokens} does not change its angle")
        if rows != {j}:
            return Outcome(
                False, f"changing the id of token {j} of {tokens} changes the angles of other tokens"
            )
    gapped = base + np.cumsum(base % 3 == 2)
    order = np.roll(base[::-1], 2)
    moved = np.take(part.run(gapped), order, axis=axes[0])
    if _rows_that_differ(part.run(gapped[order]), moved, axes[0]):
        return Outcome(False, "the angle of a token depends on where it stands, not only on its id")
    return _exactness(part, base, axes[0])


def _exactness(part: _Angles, base: Array, axis: int) -> Outcome:
    if part.made_up:
        return FOLLOWS
    try:
        high = part.run(base + 1000)
    except CannotEvaluate:  # a table that is shorter: nothing to say about ids it does not serve
        return FOLLOWS
    neighbours = [
        np.array_equal(np.take(high, j, axis), np.take(high, j + 1, axis)) for j in range(len(base) - 1)
    ]
    if any(neighbours):
        j = neighbours.index(True)
        return Outcome(
            False, f"ids {1000 + j} and {1001 + j} give the same angle: ids are rounded or clamped"
        )
    return FOLLOWS


def _rows_that_differ(a: Array, b: Array, axis: int) -> set[int]:
    if a.shape != b.shape:
        raise CannotEvaluate
    different = np.moveaxis(a != b, axis, 0).reshape(a.shape[axis], -1).any(axis=1)
    return {int(j) for j in np.flatnonzero(different)}


def _element_type(value: ir.Value) -> int:
    return int(value.dtype if value.dtype is not None else ir.DataType.INT64)


def _extents(ids: ir.Value, tokens: int) -> dict[str, int]:
    dim = ids.shape[-1] if ids.shape is not None and len(ids.shape) else None
    return {dim.value: tokens} if isinstance(dim, ir.SymbolicDim) and dim.value is not None else {}


def _extent(dim: int | ir.SymbolicDim, extents: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else extents.get(dim.value or "", 1)
