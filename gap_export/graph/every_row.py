"""A decoder that gives the logits of every token, and not of one row: what a text is scored with.

A decoder of a bundle computes its last layer for the row that is asked for alone (`rows.py`). Here that choice is taken out of the written
graph again, in memory. Weights stay where they are, so nothing but rows is added: the row that was chosen comes out as before, but for the
order in which kernels for many rows add up floats.

Shape letters: B batch, S tokens, H width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from gap_export.errors import TraceError
from gap_export.graph.constants import integers

_CHOSEN = "last_index"
_LOGITS = "logits"
_ROWS = 1
_COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})


def with_every_row(path: Path) -> bytes:
    """The graph of a decoder, with logits [B * S, V] of every token, row after row, in the place of [B, V].

    Args:
        path: of the written graph; it stays as it is.

    Raises:
        TraceError: rows are chosen in another way than this package writes it.
    """
    model = ir.load(path)
    graph = model.graph
    chosen = next((value for value in graph.inputs if value.name == _CHOSEN), None)
    logits = next((value for value in graph.outputs if value.name == _LOGITS), None)
    if chosen is None:
        raise _unknown(path, f"has no input {_CHOSEN}")
    if logits is None or logits.shape is None or len(logits.shape) != 2:
        raise _unknown(path, f"has no output {_LOGITS} of one row")
    choices = _choices(chosen, path)
    if not choices:
        raise _unknown(path, f"chooses no row by {_CHOSEN}")
    for node in choices:
        _skip(node)
    end = _end_of_row(logits, path)
    together = ir.node("Flatten", [end.inputs[0]], {"axis": _ROWS + 1})
    graph.insert_before(end, together)
    end.outputs[0].replace_all_uses_with(together.outputs[0])
    graph.remove(end, safe=True)
    for node in graph:  # extents of what is computed for more rows now
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    logits.shape = ir.Shape([None, logits.shape[1]])
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _choices(chosen: ir.Value, path: Path) -> list[ir.Node]:
    """Every `GatherElements` of floats or of a mask by that row; which ids come before it, which some rotations follow, is left."""
    pending, seen, found = [chosen], {chosen}, []
    while pending:
        for use in pending.pop().uses():
            node = use.node
            if node.op_type == "GatherElements":
                if use.idx == 1 and node.inputs[0] is not None and node.inputs[0].dtype != ir.DataType.INT64:
                    found.append(node)
            elif node.op_type in ("Unsqueeze", "Reshape", "Expand") and use.idx == 0:
                pending += [value for value in node.outputs if value not in seen]
                seen.update(node.outputs)
            elif node.op_type not in _COMPARISONS:
                raise _unknown(path, f"reads {_CHOSEN} in {node.op_type}")
    return found


def _end_of_row(logits: ir.Value, path: Path) -> ir.Node:
    """The node that makes [B, H] of [B, 1, H]; without the choice, it would have [B, S, H]."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("Squeeze", "Gather") and _of_one_row(node):
            return node
        value = node.inputs[0]
    raise _unknown(path, "has no end of a chosen row")


def _of_one_row(node: ir.Node) -> bool:
    operand = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Squeeze":
        return operand == [_ROWS]
    return operand == [0] and node.attributes.get_int("axis", 0) == _ROWS


def _skip(node: ir.Node) -> None:
    """What read the node's result reads its first operand."""
    source = node.inputs[0]
    assert source is not None
    node.outputs[0].replace_all_uses_with(source)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _unknown(path: Path, message: str) -> TraceError:
    return TraceError(
        message,
        subject=str(path),
        hint="it was not written by this version: build the bundle again",
    )
