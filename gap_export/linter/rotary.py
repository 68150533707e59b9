"""Find the rotary embeddings on the way from a projection to an attention, and the tensors that give their angles.

Forms: `RotaryEmbedding` of the standard and of `com.microsoft`, other operators named so, and the decomposed form

    x * cos + rotate(x) * sin        or, with the halves apart,        x1 * cos - x2 * sin,  x2 * cos + x1 * sin

where cos and sin may come from Cos and Sin, from a table, or from the caller. The decomposed form is recognised by what
it does, not by names: a sum of two products that share one activation, moved about, and whose other factors do not
depend on the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from gap_export.linter.attention import AttentionSite, carried
from gap_export.linter.dataflow import STANDARD_DOMAINS, Flow, constant, is_op, operand

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
class RotarySite:
    """One rotary embedding.

    Attributes:
        node: the operator, or the Add or Sub that ends a decomposed one.
        angles: tensors that must follow the position ids: ids themselves, or rows of cosines and sines.
        offset_only: the operator is given one offset, not an id per token.
    """

    node: ir.Node
    angles: tuple[ir.Value, ...]
    offset_only: bool = False


@dataclass
class RotaryFinder:
    """Searches one graph; remembers what it found, since layers share nodes.

    Attributes:
        flow: the graph.
        tokens: bit mask of the graph inputs that carry the tokens themselves.
    """

    flow: Flow
    tokens: int
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
            site = _operator(node) or self._decomposed(node)
            self._known[node] = self._resolved(site) if site is not None else None
        return self._known[node]

    def _resolved(self, site: RotarySite) -> RotarySite:
        """Angles that come out of an If or a Loop stand for several tensors: each of them must follow the ids."""
        angles = (d for angle in site.angles for d in self.flow.definitions(angle))
        return RotarySite(site.node, tuple(dict.fromkeys(angles)), site.offset_only)

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
        while node is not None and is_op(node, "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Neg"):
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
            if node.op_type in _MOVEMENT:
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


def _operator(node: ir.Node) -> RotarySite | None:
    """A rotary operator and the operands that its angles come from."""
    if is_op(node, "RotaryEmbedding"):
        ids = operand(node, 3)
        rows = (operand(node, 1), operand(node, 2))
        return RotarySite(node, (ids,) if ids is not None else tuple(v for v in rows if v is not None))
    if node.domain in STANDARD_DOMAINS:
        return None
    if node.domain == "com.microsoft" and node.op_type == "RotaryEmbedding":
        ids = operand(node, 1)
        return RotarySite(node, (ids,) if ids is not None else (), offset_only=_is_one_value(ids))
    if node.domain == "com.microsoft" and node.op_type == "GemmaRotaryEmbedding":
        angle = operand(node, 0)
        return RotarySite(node, (angle,) if angle is not None else ())
    lowered = node.op_type.lower()
    if "rotary" in lowered or "rope" in lowered.split("_"):
        others = tuple(v for v in node.inputs[1:] if v is not None and v.name)
        varying = tuple(v for v in others if ir.convenience.get_const_tensor(v) is None)
        return RotarySite(node, varying or others)
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
