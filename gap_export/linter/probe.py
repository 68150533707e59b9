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
from collections.abc import Iterable, Sequence
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


class _CannotEvaluate(Exception):
    """The part between ids and angles holds something the reference evaluator does not do."""


def probe(flow: Flow, ids: ir.Value, angles: Sequence[ir.Value]) -> dict[ir.Value, Outcome]:
    """Whether each angle tensor follows the ids, token by token.

    Args:
        flow: the graph.
        ids: what carries the ids, [S], [B, S] or [R, B, S]: the graph input, or a choice from it.
        angles: tensors to examine.
    """
    outcomes: dict[ir.Value, Outcome] = {}
    for angle in dict.fromkeys(angles):
        definitions = flow.definitions(angle)
        if definitions == [ids]:
            outcomes[angle] = FOLLOWS
            continue
        outcomes[angle] = UNDECIDED
        for tokens in _TOKENS:
            try:
                outcomes[angle] = _examine(_Part(flow, ids, definitions), tokens)
                break
            except _CannotEvaluate:
                continue
    return outcomes


class _Part:
    """The nodes between the graph inputs and one angle tensor, as a model of its own."""

    def __init__(self, flow: Flow, ids: ir.Value, definitions: list[ir.Value]) -> None:
        if len(definitions) != 1:
            raise _CannotEvaluate
        self.ids = ids
        self.made_up = False
        self.output = name_of(definitions[0])
        self.inputs: list[ir.Value] = []
        nodes: dict[ir.Node, None] = {}
        initializers: list[onnx.TensorProto] = []

        def step(node: ir.Node) -> Iterable[ir.Value | None]:
            return () if ids in node.outputs else node.inputs

        for value in flow.upstream(definitions[0], step):
            node = value.producer()
            if value is ids:
                self.inputs.append(value)
            elif node is not None:
                if any(True for _ in subgraphs(node)):
                    raise _CannotEvaluate
                if any(v is not None and flow.definitions(v) != [v] for v in node.inputs):
                    raise _CannotEvaluate
                nodes[node] = None
            elif value in flow.inputs:
                self.inputs.append(value)
            else:
                initializers.append(self._initializer(value))
        order = {node: i for i, node in enumerate(flow.nodes)}
        protos = [ir.to_proto(node) for node in sorted(nodes, key=lambda n: order[n])]
        graph = onnx.helper.make_graph(
            protos,
            "angles",
            [onnx.helper.make_tensor_value_info(name_of(v), _element_type(v), None) for v in self.inputs],
            [onnx.helper.make_empty_tensor_value_info(self.output)],
            initializers,
        )
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in flow.model.graph.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=flow.model.ir_version)
        try:
            self.evaluator = ReferenceEvaluator(model)
        except Exception as error:  # an operator or opset it does not know
            raise _CannotEvaluate from error

    def _initializer(self, value: ir.Value) -> onnx.TensorProto:
        tensor = value.const_value
        if tensor is None or tensor.size > LARGEST_CONSTANT:
            raise _CannotEvaluate
        if isinstance(tensor, ir.ExternalTensor):
            if not tensor.dtype.is_floating_point():
                raise _CannotEvaluate  # an axis, an extent: nothing that could be made up
            self.made_up = True
            shape = tuple(int(n) for n in tensor.shape.numpy())
            content = (1.0 + np.arange(tensor.size) % 9973).reshape(shape).astype(tensor.dtype.numpy())
            return ir.to_proto(ir.Tensor(content, dtype=tensor.dtype, name=value.name))
        return ir.to_proto(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name))

    def run(self, row: Array) -> Array:
        """The angles for one row of ids, every other input zero, float64 where it is a float."""
        extents = _extents(self.ids, len(row))
        feeds: dict[str, Array] = {}
        for value in self.inputs:
            shape = [_extent(dim, extents) for dim in value.shape] if value.shape is not None else [1]
            feeds[name_of(value)] = np.zeros(shape, (value.dtype or ir.DataType.INT64).numpy())
        fed = feeds[name_of(self.ids)]
        feeds[name_of(self.ids)] = np.broadcast_to(row.astype(fed.dtype), fed.shape).copy()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = list(self.evaluator.run(None, feeds))
        except Exception as error:  # zeros that do not fit, ids beyond a table, an operator that is missing
            raise _CannotEvaluate from error
        result = np.asarray(results[0])
        if result.dtype.kind == "f" or result.dtype == ml_dtypes.bfloat16:
            return result.astype(np.float64)
        return result


def _examine(part: _Part, tokens: int) -> Outcome:
    fixed = part.ids.shape[-1] if part.ids.shape is not None and len(part.ids.shape) else None
    if isinstance(fixed, int):
        tokens = fixed
    if tokens > _SMALLEST_TABLE // 2 or tokens < 2:
        return UNDECIDED
    base = np.arange(tokens)
    before = part.run(base)
    axes = [axis for axis, extent in enumerate(before.shape) if extent == tokens]
    if len(axes) != 1:
        raise _CannotEvaluate
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


def _exactness(part: _Part, base: Array, axis: int) -> Outcome:
    if part.made_up:
        return FOLLOWS
    try:
        high = part.run(base + 1000)
    except _CannotEvaluate:  # a table that is shorter: nothing to say about ids it does not serve
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
        raise _CannotEvaluate
    different = np.moveaxis(a != b, axis, 0).reshape(a.shape[axis], -1).any(axis=1)
    return {int(j) for j in np.flatnonzero(different)}


def _element_type(value: ir.Value) -> int:
    return int(value.dtype if value.dtype is not None else ir.DataType.INT64)


def _extents(ids: ir.Value, tokens: int) -> dict[str, int]:
    dim = ids.shape[-1] if ids.shape is not None and len(ids.shape) else None
    return {dim.value: tokens} if isinstance(dim, ir.SymbolicDim) and dim.value is not None else {}


def _extent(dim: int | ir.SymbolicDim, extents: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else extents.get(dim.value or "", 1)
