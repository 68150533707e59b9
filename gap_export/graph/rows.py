"""Compute rows only where they are asked for: a choice of rows moves up, past everything that treats each row by itself.

A decoder gives the logits of one row, so its last layer needs keys and values of every token, and queries, the rest of attention and
the feed-forward of one. A tower below a pruner gives the kept patches, so its last layer needs no more of it for the dropped ones. Which
of two orders is written makes no difference to the numbers; it is the projection pushdown of databases.

    GatherElements(f(x), rows)  ->  f(GatherElements(x, rows))        f: products with weights, norms, sums, activations; queries of attention

Nothing is moved where anybody else reads the rows that would no longer be computed (a pruner that compares features, say). And a mask is
chosen from only by rows that the caller names: it must follow the slots and nothing else, which `lint` holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from gap_export.graph.constants import integers

_ROWS = 1
"""Axis of the rows in [B, S, H]."""
_UNARY = frozenset(
    {"Sigmoid", "Tanh", "Gelu", "Erf", "Neg", "Sqrt", "Reciprocal", "Cast", "Softplus", "Relu"}
)
_SUMS = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
_TO_THE_END = 2**31 - 1
_Extent = int | ir.SymbolicDim


@dataclass(frozen=True)
class _Operand:
    """An operand of which the same rows are needed as of the result.

    Attributes:
        place: its number.
        axis: of its rows.
    """

    place: int
    axis: int


def select_rows_early(model: ir.Model) -> None:
    """Move every choice of rows of a [B, S, H] up as far as it goes; in place.

    Args:
        model: simplified, with shapes.
    """
    for node in list(model.graph):
        choice = _choice(node)
        if choice is not None:
            _move_up(model.graph, choice)


@dataclass(frozen=True)
class _Choice:
    """A `GatherElements` that takes whole rows.

    Attributes:
        node: itself.
        rows_BK1: int64 [B, K, 1], which ones.
        skipped: rows that a `Slice` between left out before they were counted.
        source: what they are taken from, before that `Slice`.
        by_tokens: whether the rows were found by looking at tokens, and not named by the caller.
    """

    node: ir.Node
    rows_BK1: ir.Value
    skipped: int
    source: ir.Value
    by_tokens: bool


def _choice(node: ir.Node) -> _Choice | None:
    if node.op_type != "GatherElements" or node.attributes.get_int("axis", 0) != _ROWS:
        return None
    source, spread = node.inputs[0], node.inputs[1]
    expand = spread.producer() if spread is not None else None
    if source is None or expand is None or expand.op_type != "Expand" or expand.inputs[0] is None:
        return None
    rows_BK1 = expand.inputs[0]
    if rows_BK1.shape is None or len(rows_BK1.shape) != 3 or rows_BK1.shape[2] != 1:
        return None
    skipped = 0
    above = source.producer()
    if (
        above is not None
        and above.op_type == "Slice"
        and len(source.uses()) == 1
        and not source.is_graph_output()
    ):
        starts, ends, axes, *steps = (integers(operand) for operand in above.inputs[1:])
        plain = all(step == [1] for step in steps) and axes == [_ROWS]
        if plain and starts is not None and ends is not None and starts[0] > 0 and ends[0] >= _TO_THE_END:
            skipped, source = starts[0], above.inputs[0]
    return None if source is None else _Choice(node, rows_BK1, skipped, source, _by_tokens(rows_BK1))


def _by_tokens(rows: ir.Value) -> bool:
    pending, seen = [rows], {rows}
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type in ("TopK", "MatMul", "Softmax", "Attention"):
            return True
        above = [value for value in node.inputs if value is not None and value not in seen]
        seen.update(above)
        pending += above
    return False


@dataclass
class _Moving:
    """One choice on its way up.

    Attributes:
        choice: what moves.
        row_operands: node that is to be computed for the chosen rows alone -> its operands that have these rows.
    """

    choice: _Choice
    row_operands: dict[ir.Node, list[_Operand]] = field(default_factory=dict)


def _move_up(graph: ir.Graph, choice: _Choice) -> None:
    moving = _Moving(choice)
    axes = {choice.source: _ROWS}
    extents = _row_extents(graph)
    above = [node for node in graph if node is not choice.node]
    for node in reversed(above):
        value = node.outputs[0] if node.outputs else None
        if value is None or value not in axes or not _only_for(value, moving):
            continue
        operands = _row_operands(node, axes[value], extents, choice.by_tokens)
        if operands is None:
            continue
        moving.row_operands[node] = operands
        axes.update({node.inputs[o.place]: o.axis for o in operands})  # type: ignore[misc]
    # Moving a choice up past sums alone would gather twice and save nothing.
    if any(node.op_type == "MatMul" for node in moving.row_operands):
        _rewrite(graph, moving, axes)


def _only_for(value: ir.Value, moving: _Moving) -> bool:
    """Whether all that reads a value reads the chosen rows of it."""
    if value.is_graph_output() or len(value.producer().outputs) != 1:  # type: ignore[union-attr]
        return False
    for use in value.uses():
        if use.node is moving.choice.node and use.idx == 0:
            continue
        if value is moving.choice.source and use.node is moving.choice.node.inputs[0].producer():  # type: ignore[union-attr]
            continue  # the Slice between
        if not any(use.idx == operand.place for operand in moving.row_operands.get(use.node, [])):
            return False
    return True


def _row_operands(
    node: ir.Node, axis: int, extents: dict[ir.Value, _Extent], by_tokens: bool
) -> list[_Operand] | None:
    """The operands that have the rows of the result; None where a row of the result needs other rows."""
    if node.domain not in ("", "ai.onnx"):
        return None
    kind, first = node.op_type, node.inputs[0]
    if kind in _UNARY or (kind in _NORMS and node.attributes.get_int("axis", -1) == -1):
        return [_Operand(0, axis)] if axis == _ROWS else None
    if kind == "MatMul":
        weight = node.inputs[1]
        of_rank_2 = weight is not None and _rank(weight) == 2
        return [_Operand(0, axis)] if of_rank_2 and axis == _ROWS else None
    if kind in _SUMS and axis == _ROWS:
        found = [_Operand(place, axis) for place, value in enumerate(node.inputs) if value in extents]
        others = [value for value in node.inputs if value not in extents]
        same = len({extents[node.inputs[o.place]] for o in found}) == 1  # type: ignore[index]
        return found if same and all(v is not None and _rank(v) in (0, 1) for v in others) else None
    if kind == "Reshape" and axis == _ROWS:  # heads apart or together: [B, S, heads, D] and [B, S, H]
        inner, outer = (None if v is None else v.shape for v in (first, node.outputs[0]))
        if inner is None or outer is None or {len(inner), len(outer)} != {3, 4}:
            return None
        known = all(isinstance(extent, int) for extent in outer[_ROWS + 1 :])
        return [_Operand(0, axis)] if known and inner[_ROWS] == outer[_ROWS] else None
    if kind == "Transpose":
        order = node.attributes.get_ints("perm")
        return None if order is None else [_Operand(0, order[axis])]
    if kind == "RotaryEmbedding" and axis == 2 and len(node.inputs) == 3:
        # [B, heads, S, D], and rows of cosines and sines
        return [_Operand(0, axis), _Operand(1, _ROWS), _Operand(2, _ROWS)]
    if kind == "Attention" and axis == 2 and len(node.inputs) <= 4:
        mask = node.inputs[3] if len(node.inputs) == 4 else None
        if mask is None:
            return [_Operand(0, axis)]
        query = first.shape if first is not None else None
        known = not by_tokens and query is not None and mask.shape is not None and len(mask.shape) == 4
        return [_Operand(0, axis), _Operand(3, axis)] if known and mask.shape[2] == query[2] else None  # type: ignore[index]
    return None


def _row_extents(graph: ir.Graph) -> dict[ir.Value, _Extent]:
    """Values [B, S, H] -> S, also where only an operand of theirs has a shape."""
    known: dict[ir.Value, _Extent] = {}
    for value in [*graph.inputs, *(node.outputs[0] for node in graph if node.outputs)]:
        node = value.producer()
        if value.shape is not None:
            if len(value.shape) == 3:
                known[value] = value.shape[_ROWS]
        elif node is not None and node.op_type in _UNARY | _SUMS | _NORMS | {"MatMul"}:
            extent = next((known[v] for v in node.inputs if v is not None and v in known), None)
            if extent is not None:
                known[value] = extent
    return known


def _rewrite(graph: ir.Graph, moving: _Moving, axes: dict[ir.Value, int]) -> None:
    """Compute the chosen rows anew, from gathered operands; what computed all of them is dead then."""
    choice, chosen = moving.choice, dict[ir.Value, ir.Value]()
    kept = None if choice.rows_BK1.shape is None else choice.rows_BK1.shape[1]
    rows_BK1 = choice.rows_BK1
    if choice.skipped:
        rows_BK1 = _new(graph, choice.node, "Add", [rows_BK1, _number(graph, choice.node, [choice.skipped])])
    rows = {_ROWS: rows_BK1}
    computed = {node.outputs[0] for node in moving.row_operands}
    for node in [node for node in graph if node in moving.row_operands]:
        inputs = list(node.inputs)
        for operand in moving.row_operands[node]:
            value = inputs[operand.place]
            assert value is not None
            if value not in chosen:
                assert value not in computed
                chosen[value] = _gathered(graph, choice.node, value, operand.axis, rows, kept)
            inputs[operand.place] = chosen[value]
        if node.op_type == "Reshape":
            heads = [int(extent) for extent in node.outputs[0].shape[_ROWS + 1 :]]  # type: ignore[index, arg-type]
            inputs[1] = _number(graph, choice.node, [0, -1, *heads])
        attributes = [a for a in node.attributes.values() if a.name != "allowzero"]
        fresh = ir.Node(node.domain, node.op_type, inputs, attributes, version=node.version)
        graph.insert_before(choice.node, fresh)
        old, new = node.outputs[0], fresh.outputs[0]
        new.type = old.type
        new.shape = _with_rows(old.shape, axes[old], kept)
        chosen[old] = new
    choice.node.outputs[0].replace_all_uses_with(chosen[choice.source], replace_graph_outputs=True)


def _gathered(
    graph: ir.Graph,
    before: ir.Node,
    value: ir.Value,
    axis: int,
    rows: dict[int, ir.Value],
    kept: _Extent | None,
) -> ir.Value:
    """The chosen rows of a value."""
    if axis not in rows:  # [B, K, 1] -> [B, 1, K, 1]
        rows[axis] = _new(graph, before, "Unsqueeze", [rows[_ROWS], _number(graph, before, [1])])
    if value.shape is not None:
        extents: list[int | None] = [d if isinstance(d, int) else None for d in value.shape]
    else:
        extents = [None] * 3
    extents[0] = extents[axis] = 1  # left to the index itself
    parts = [
        _number(graph, before, [extent])
        if extent is not None
        else _new(graph, before, "Shape", [value], start=place, end=place + 1)
        for place, extent in enumerate(extents)
    ]
    spread = _new(graph, before, "Concat", parts, axis=0)
    index = _new(graph, before, "Expand", [rows[axis], spread])
    found = _new(graph, before, "GatherElements", [value, index], axis=axis)
    found.type, found.shape = value.type, _with_rows(value.shape, axis, kept)
    return found


def _with_rows(shape: ir.Shape | None, axis: int, kept: _Extent | None) -> ir.Shape | None:
    if shape is None or kept is None:
        return None
    return ir.Shape([kept if place == axis else dim for place, dim in enumerate(shape)])


def _new(graph: ir.Graph, before: ir.Node, kind: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(kind, inputs, attributes)
    graph.insert_before(before, node)
    value: ir.Value = node.outputs[0]
    return value


def _number(graph: ir.Graph, before: ir.Node, numbers: list[int]) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
    graph.insert_before(before, node)
    value: ir.Value = node.outputs[0]
    return value


def _rank(value: ir.Value) -> int | None:
    """Of a value; of a transposed weight, that of the weight."""
    if value.shape is not None:
        return len(value.shape)
    content = ir.convenience.get_const_tensor(value)
    if content is not None:
        return len(content.shape)
    node = value.producer()
    if node is not None and node.op_type in ("Transpose", "Cast", "Identity") and node.inputs[0] is not None:
        return _rank(node.inputs[0])
    return None
