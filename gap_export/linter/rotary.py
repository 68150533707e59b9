"""Find the rotary embeddings on the way from a projection to an attention, and the tensors that give their angles.

Forms: `RotaryEmbedding` of the standard and of `com.microsoft`, other operators named so, and the decomposed form

    x * cos + rotate(x) * sin        or, with the halves apart,        x1 * cos - x2 * sin,  x2 * cos + x1 * sin

where cos and sin may come from Cos and Sin, from a table, or from the caller. The decomposed form is recognised by what
it does, not by names: a sum of two products that share one activation, moved about, and whose other factors do not
depend on the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.linter.attention import AttentionSite, carried
from gap_export.linter.call import Call
from gap_export.linter.dataflow import (
    STANDARD_DOMAINS,
    Flow,
    constant,
    is_float,
    is_op,
    is_quantizing,
    operand,
)

Array = NDArray[Any]

_MOVEMENT = frozenset(
    {
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Cast",
        "Identity",
        "Slice",
        "Split",
        "Neg",
        "Expand",
        "Flatten",
    }
    | {"Gather", "GatherND", "GatherElements", "SplitToSequence", "SequenceAt", "Tile"}
)
"""Operators that move, copy or negate the elements of their first operand."""
_LARGEST_ROTATION = 512
"""Side of the largest constant matrix taken for a rotation written as a MatMul (a head dimension)."""


@dataclass(frozen=True)
class Rows:
    """Rows that an operator picks from a table which is itself computed from position ids.

    How ONNX Runtime picks them: `RotaryEmbedding` reads an index per token, or counts up from one offset. `GroupQueryAttention`
    counts up from its first index (or 0) in a prompt, in every row of the batch; after a past it reads an index per token, or
    counts up from `seqlens_k` (onnxruntime/contrib_ops/cpu/bert/group_query_attention.cc).

    Attributes:
        table: [N, D/2], cosines or sines.
        index: [B, S] or [1]; None where the operator counts.
        lengths: [B], of each row all tokens but one; None but for GroupQueryAttention.
    """

    table: ir.Value
    index: ir.Value | None = None
    lengths: ir.Value | None = None

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The tensors that decide which rows are picked."""
        return tuple(v for v in (self.table, self.index, self.lengths) if v is not None)

    def pick(self, found: Mapping[ir.Value, Array], call: Call) -> Array | None:
        """The rows [B, S, D/2], or None where there are no such rows.

        Args:
            found: what `values` hold.
            call: extents.
        """
        counted = np.arange(call.tokens)[None].repeat(call.rows, axis=0)
        index = found[self.index] if self.index is not None else None
        if self.lengths is None:
            places = (
                counted if index is None else counted + index.reshape(-1)[:1] if index.size == 1 else index
            )
        elif call.past == 0:
            places = counted if index is None else counted + index.reshape(-1)[:1]
        elif index is None:
            places = counted + found[self.lengths].reshape(-1, 1) + 1 - call.tokens
        else:
            places = index
        table = found[self.table]
        fits = (
            places.size == counted.size and table.ndim == 2 and 0 <= places.min() <= places.max() < len(table)
        )
        return table[places.reshape(counted.shape)] if fits else None


AngleValue = ir.Value | Rows


@dataclass(frozen=True)
class RotarySite:
    """One rotary embedding.

    Attributes:
        node: the operator, or the Add or Sub that ends a decomposed one.
        angles: what must follow the position ids: ids themselves, or rows of cosines and sines.
        offset_only: the operator is given one offset, not an id per token.
        known: whether it is an operator whose arithmetic is known; what others do with ids cannot be told.
    """

    node: ir.Node
    angles: tuple[AngleValue, ...]
    offset_only: bool = False
    known: bool = True


@dataclass
class RotaryFinder:
    """Searches one graph; remembers what it found, since layers share nodes.

    Attributes:
        flow: the graph.
        tokens: bit mask of the graph inputs that carry the tokens themselves.
        ids: bit mask of what carries position ids.
    """

    flow: Flow
    tokens: int
    ids: int
    _known: dict[ir.Node, RotarySite | None] = field(default_factory=dict)

    def of(self, operand_: ir.Value | None) -> list[RotarySite]:
        """The rotary embeddings that the queries or keys of one attention went through."""
        if operand_ is None:
            return []
        found: dict[ir.Node, RotarySite] = {}

        def step(node: ir.Node) -> Iterable[ir.Value | None]:
            site = self._site(node)
            if site is not None:
                found[node] = site
                return ()
            return carried(node)

        for _ in self.flow.upstream(operand_, step):
            pass
        return list(found.values())

    def unrecognised(self, operand_: ir.Value | None) -> list[RotarySite]:
        """Sums and products on the way of a query or key with something that is neither token, weight nor cache.

        A rotary embedding written in a form that is not known here must show up like this.
        """
        if operand_ is None:
            return []
        found: dict[ir.Node, RotarySite] = {}
        for value in self.flow.upstream(operand_, carried):
            node = value.producer()
            if not is_op(node, "Add", "Sub", "Mul", "Div") or node is None:
                continue
            foreign = [v for v in node.inputs if v is not None and self._is_foreign(v)]
            if foreign and len(foreign) < len(node.inputs):
                found[node] = self._resolved(RotarySite(node, tuple(foreign)))
        return list(found.values())

    def _is_foreign(self, value: ir.Value) -> bool:
        facts = self.flow.facts(value)
        return (
            not self.flow.is_constant(value)
            and not facts.values & self.tokens
            and value not in self.flow.inputs
        )

    def _site(self, node: ir.Node) -> RotarySite | None:
        if node not in self._known:
            site = self._operator(node) or self._decomposed(node)
            self._known[node] = self._resolved(site) if site is not None else None
        return self._known[node]

    def inside(self, site: AttentionSite) -> RotarySite | None:
        """The rotary embedding that an attention operator applies itself, where its tables are computed from the ids.

        None where they are not: which rows are read is then decided by counting alone.
        """
        if not site.rotates_inside or site.node.op_type != "GroupQueryAttention":
            return None
        node, lengths = site.node, operand(site.node, 5)
        tables = [v for v in (operand(node, 7), operand(node, 8)) if v is not None]
        if len(tables) != 2 or lengths is None or not all(self._computed(table) for table in tables):
            return None
        return RotarySite(node, tuple(Rows(table, site.ids, lengths) for table in tables))

    def _operator(self, node: ir.Node) -> RotarySite | None:
        """A rotary operator and what its angles come from."""
        places = _INDEXED.get((node.domain, node.op_type))
        if places is None:
            return _other_operator(node)
        index, *tables = (operand(node, place) for place in places)
        rows = [v for v in tables if v is not None]
        standard = node.domain in STANDARD_DOMAINS
        if standard and index is None:
            return RotarySite(node, tuple(rows))
        if rows and all(self._computed(table) for table in rows):
            return RotarySite(node, tuple(Rows(table, index) for table in rows))
        if rows and all(self._fed(table) for table in rows) and not (index and self._computed(index)):
            return RotarySite(node, tuple(rows))
        # The angles are in the tables, one row for each id: whatever picks the row is the id.
        angles = (index,) if index is not None else ()
        return RotarySite(node, angles, offset_only=not standard and _is_one_value(index))

    def _computed(self, value: ir.Value) -> bool:
        """Whether a tensor, a table of cosines or an index, is made from the values of the position ids."""
        return bool(self.flow.facts(value).values & self.ids)

    def _fed(self, table: ir.Value) -> bool:
        """Whether a table comes from the caller."""
        own = self.flow.facts(table).values & ~self.tokens
        return any(own & self.flow.bit(value) and is_float(value) for value in self.flow.inputs)

    def _resolved(self, site: RotarySite) -> RotarySite:
        """Angles that come out of an If stand for several tensors: each of them must follow the ids."""
        angles: dict[AngleValue, None] = {}
        for angle in site.angles:
            if isinstance(angle, Rows):
                tables = self.flow.alternatives(angle.table)
                angles.update(dict.fromkeys(Rows(t, angle.index, angle.lengths) for t in tables))
            else:
                angles.update(dict.fromkeys(self.flow.alternatives(angle)))
        return replace(site, angles=tuple(angles))

    def _decomposed(self, node: ir.Node) -> RotarySite | None:
        if not is_op(node, "Add", "Sub"):
            return None
        products = [self._product(v) for v in node.inputs]
        if len(products) != 2 or products[0] is None or products[1] is None:
            return None
        (x, cosine), (moved, sine) = products[0], products[1]
        if not self._roots(x) & self._roots(moved):
            return None
        return RotarySite(node, tuple(dict.fromkeys((cosine, sine))))

    def _product(self, value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
        """(activation, factor that does not depend on the tokens) of a product, seen through Cast and Reshape."""
        node = value.producer() if value is not None else None
        while node is not None and (
            is_op(node, "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Neg") or is_quantizing(node)
        ):
            inner = operand(node, 0)
            node = inner.producer() if inner is not None else None
        if node is None or not is_op(node, "Mul"):
            return None
        a, b = node.inputs
        if a is None or b is None:
            return None
        a_varies, b_varies = (bool(self.flow.facts(v).values & self.tokens) for v in (a, b))
        if a_varies == b_varies:
            return None
        return (a, b) if a_varies else (b, a)

    def _roots(self, value: ir.Value) -> set[ir.Value]:
        """Where the elements of a tensor come from before they were moved about, and every stage on the way."""

        def step(node: ir.Node) -> Iterable[ir.Value | None]:
            if node.op_type in _MOVEMENT or is_quantizing(node):
                return node.inputs[:1]
            if is_op(node, "Concat", "ScatterND", "ScatterElements"):
                return node.inputs
            if is_op(node, "Mul") and any(v is not None and self.flow.is_constant(v) for v in node.inputs):
                return node.inputs  # signs written as a constant factor
            if is_op(node, "MatMul") and _is_rotation(node.inputs[1]):
                return node.inputs[:1]
            return ()

        varying = self.flow.upstream(value, step)
        return {v for v in varying if self.flow.facts(v).values & self.tokens}


def _is_rotation(matrix: ir.Value | None) -> bool:
    content = constant(matrix)
    if content is None or content.ndim < 2 or content.shape[-1] != content.shape[-2]:
        return False
    return content.shape[-1] <= _LARGEST_ROTATION and bool(((content == 0) | (abs(content) == 1)).all())


_INDEXED = {
    ("", "RotaryEmbedding"): (3, 1, 2),
    ("ai.onnx", "RotaryEmbedding"): (3, 1, 2),
    ("com.microsoft", "RotaryEmbedding"): (1, 2, 3),
}
"""Operand numbers of (what picks rows, cosines, sines)."""


def _other_operator(node: ir.Node) -> RotarySite | None:
    """Operators that are given angles, and those that only their name tells."""
    if node.domain in STANDARD_DOMAINS:
        return None
    if node.domain == "com.microsoft" and node.op_type == "GemmaRotaryEmbedding":
        angle = operand(node, 0)
        return RotarySite(node, (angle,) if angle is not None else ())
    lowered = node.op_type.lower()
    if "rotary" in lowered or "rope" in lowered.split("_"):
        others = tuple(v for v in node.inputs[1:] if v is not None and v.name)
        varying = tuple(v for v in others if ir.convenience.get_const_tensor(v) is None)
        return RotarySite(node, varying or others, known=False)
    return None


def _is_one_value(value: ir.Value | None) -> bool:
    """Whether a tensor is known to hold a single value, if need be by what it was copied from."""
    while value is not None:
        if value.shape is not None:
            return len(value.shape) == 0 or (len(value.shape) == 1 and value.shape[0] == 1)
        node = value.producer()
        value = operand(node, 0) if node is not None and is_op(node, "Identity", "Cast") else None
    return False


def token_inputs(flow: Flow, sites: list[AttentionSite], ids_name: str) -> int:
    """Bit mask of the graph inputs that carry the tokens: what the first attention's values are computed from.

    Rotary embeddings never touch the values, so neither ids nor tables of cosines are among them.
    """
    named = [
        v for v in flow.inputs if v.name in ("inputs_embeds", "input_embeds", "input_ids", "hidden_states")
    ]
    if named:
        return flow.bit(*named)
    for site in sites:
        source = site.value if site.value is not None else (site.query or operand(site.node, 0))
        if source is None:
            continue
        mask = 0
        for value in flow.upstream(source, _not_through_cache):
            mask |= flow.bit(value)
        ids = flow.bit(*(v for v in flow.inputs if v.name == ids_name))
        if mask & ~ids:
            return mask & ~ids
    return 0


def _not_through_cache(node: ir.Node) -> Iterable[ir.Value | None]:
    """All operands but the cache that new values are written into or joined to, and shapes."""
    if node.op_type in ("Shape", "Size"):
        return ()
    if is_op(node, "TensorScatter", "ScatterND", "ScatterElements"):
        return [node.inputs[-1] if node.op_type != "TensorScatter" else node.inputs[1]]
    if is_op(node, "Concat"):
        computed = [v for v in node.inputs if v is not None and v.producer() is not None]
        return computed or node.inputs
    return node.inputs
