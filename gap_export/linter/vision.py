"""Rules of vision graphs: survivors come in raster order, and the indices that are given out are those that were used."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from gap_export.linter.dataflow import Flow, constant, is_op, name_of, operand
from gap_export.linter.report import Finding, Rule

ASCENDING = Rule(
    id="kept-indices-ascending",
    title="kept_indices are sorted ascending and visual_embeds are gathered with them",
)

KEPT, EMBEDS = "kept_indices", "visual_embeds"
_SELECTING = ("TopK", "NonZero", "Compress", "NonMaxSuppression", "ArgMax", "Multinomial")
_ORDER_KEEPING = (
    "Cast",
    "Identity",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Flatten",
    "Expand",
    "Floor",
    "Ceil",
    "Round",
    "Clip",
)
_INDEX_MOVEMENT = (*_ORDER_KEEPING, "Concat", "Where", "Transpose", "Tile", "Add", "Mul", "Slice")
_ABOVE_ALL_INDICES = 1 << 16
_GATHERS = ("Gather", "GatherElements", "GatherND")


def check_vision(flow: Flow, *, sorted_wanted: bool) -> list[Finding]:
    """Check order and use of the kept indices.

    Args:
        flow: the graph.
        sorted_wanted: False where score order is the policy; then only their use is checked.
    """
    outputs = {v.name: v for v in flow.outputs}
    kept = outputs.get(KEPT)
    if kept is None:
        if not any(is_op(node, *_SELECTING) for node in flow.nodes):
            return []
        return [
            _finding(
                "(outputs)",
                "tokens seem to be selected, but there is no kept_indices output: their position ids cannot be known",
                "give out the indices that the embeddings were gathered with",
            )
        ]
    findings = []
    if sorted_wanted:
        direction, why = _Order(flow).of(kept)
        if direction != 1:
            findings.append(_finding(KEPT, why, "sort the kept indices ascending before gathering with them"))
    embeds = outputs.get(EMBEDS)
    if embeds is None:
        findings.append(
            _finding("(outputs)", "there is no visual_embeds output", "name the embeddings visual_embeds")
        )
    elif not _gathered_with(flow, embeds, kept):
        findings.append(
            _finding(
                EMBEDS,
                "the embeddings are not gathered with kept_indices: ids and tokens would not belong together",
                "gather with the very tensor that is given out",
            )
        )
    return findings


def _finding(node: str, sentence: str, hint: str) -> Finding:
    return Finding(
        rule=ASCENDING.id, severity="error", breaks_ids=True, node=node, sentence=sentence, hint=hint
    )


def order_of(flow: Flow, indices: ir.Value) -> tuple[int, str]:
    """Whether the last axis of a tensor of indices is sorted, proved by structure.

    Returns:
        (1 ascending, -1 descending, 0 neither shown; why not ascending).
    """
    return _Order(flow).of(indices)


class _Order:
    """Proves by structure that the last axis of a tensor of indices is sorted."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._known: dict[ir.Value, tuple[int, str]] = {}

    def of(self, value: ir.Value) -> tuple[int, str]:
        """(1 ascending, -1 descending, 0 neither shown; why not ascending)."""
        if value not in self._known:
            self._known[value] = self._of(value)
        return self._known[value]

    def _of(self, value: ir.Value) -> tuple[int, str]:
        sign = 1
        current = value
        for _ in range(len(self.flow.nodes) + 1):
            self.flow.work.take()
            definitions = self.flow.definitions(current)
            if len(definitions) > 1:
                results = [self.of(v) for v in definitions]
                return next((r for r in results if r[0] != sign), (1, ""))
            current = definitions[0]
            content = constant(current)
            if content is not None:
                return self._of_constant(content, sign)
            node = current.producer()
            if node is None:
                return 0, f"the order of {name_of(current)} is not known"
            step = self._step(node, current)
            if isinstance(step, str):
                return 0, step
            factor, following = step
            sign *= factor
            if following is None:
                return sign, "" if sign == 1 else f"the indices come from {name_of(node)} in descending order"
            current = following
        return 0, "the graph runs in circles"

    @staticmethod
    def _of_constant(
        content: np.ndarray[tuple[int, ...], np.dtype[np.generic]], sign: int
    ) -> tuple[int, str]:
        steps = np.diff(content.astype(np.float64), axis=-1) if content.ndim else np.zeros(1)
        if bool((steps * sign > 0).all()):
            return 1, ""
        return 0, "the indices are a constant that is not ascending"

    def _step(self, node: ir.Node, value: ir.Value) -> tuple[int, ir.Value | None] | str:
        """(factor of the direction, operand to go on with or None where the order is proved), or why not."""
        first = operand(node, 0)
        name = name_of(node)
        if is_op(node, *_ORDER_KEEPING):
            return 1, first
        if is_op(node, "Neg"):
            return -1, first
        if is_op(node, "Slice") and first is not None:
            steps = constant(operand(node, 4))
            if operand(node, 4) is None:
                return 1, first
            forward = steps is not None and bool((steps.astype(np.int64) > 0).all())
            return (1, first) if forward else f"{name} reverses or reorders the indices"
        if is_op(node, "Add", "Sub", "Mul", "Div"):
            return self._arithmetic(node)
        if is_op(node, "Range"):
            delta = constant(operand(node, 2))
            if delta is None or float(delta) == 0:
                return f"the step of {name} is not known"
            return (1 if float(delta) > 0 else -1), None
        if is_op(node, "TopK"):
            return self._top_k(node, value)
        if is_op(node, "GatherElements", "Gather"):
            return self._reordered(node)
        if is_op(node, "NonZero"):
            return 1, None
        return f"the order of the indices that {node.op_type} {name} gives is not known"

    def _arithmetic(self, node: ir.Node) -> tuple[int, ir.Value | None] | str:
        a, b = node.inputs
        if a is None or b is None:
            return f"{name_of(node)} lacks an operand"
        scalar_a, scalar_b = self._scalar(a), self._scalar(b)
        if scalar_a is None and scalar_b is None:
            return f"{name_of(node)} combines the indices with values that differ from token to token"
        if node.op_type == "Add":
            return 1, (a if scalar_b is not None else b)
        if node.op_type == "Sub":
            return (1, a) if scalar_b is not None else (-1, b)
        factor = scalar_b if scalar_b is not None else scalar_a
        if factor is None or factor == 0 or (node.op_type == "Div" and scalar_b is None):
            return f"{name_of(node)} does not keep the order of the indices"
        return (1 if factor > 0 else -1), (a if scalar_b is not None else b)

    @staticmethod
    def _scalar(value: ir.Value) -> float | None:
        content = constant(value)
        return float(content.reshape(-1)[0]) if content is not None and content.size == 1 else None

    @staticmethod
    def _top_k(node: ir.Node, value: ir.Value) -> tuple[int, ir.Value | None] | str:
        name = name_of(node)
        if value is node.outputs[1]:
            return f"the indices come from TopK {name} in score order"
        if not node.attributes.get_int("sorted", 1):
            return f"TopK {name} does not sort"
        source = operand(node, 0)
        axis, rank = (
            node.attributes.get_int("axis", -1),
            len(source.shape) if source is not None and source.shape is not None else None,
        )
        if axis != -1 and axis + 1 != rank:
            return f"TopK {name} does not sort along the last axis"
        return (-1 if node.attributes.get_int("largest", 1) else 1), None

    def _reordered(self, node: ir.Node) -> tuple[int, ir.Value | None] | str:
        """x[argsort(x)], and an ascending table read at ascending indices."""
        data, index = operand(node, 0), operand(node, 1)
        sorter = self._producer(index)
        if data is None or index is None:
            return f"{name_of(node)} lacks an operand"
        if is_op(sorter, "TopK") and sorter is not None and operand(sorter, 0) is not None:
            same = self._behind(operand(sorter, 0)) is self._behind(data)
            if same and sorter.attributes.get_int("sorted", 1) != 0:
                return (-1 if sorter.attributes.get_int("largest", 1) else 1), None
        table = constant(data)
        if table is not None and table.ndim and self._of_constant(table, 1)[0] == 1:
            return 1, index
        if self._sorts_with_places(data, index):
            return 1, None
        if self.of(data)[0] == 1:  # ascending, read at what may be ascending
            return 1, index
        return f"{name_of(node)} reorders the indices in a way that is not known"

    def _sorts_with_places(self, data: ir.Value, index: ir.Value) -> bool:
        """x[sorted(x * c + 0..c-1) % c]: a stable sort. Equal indices, which merged tokens may have, stay in their order."""
        modulo = self._producer(index)
        if not is_op(modulo, "Mod") or modulo is None:
            return False
        count, sorter = operand(modulo, 1), self._producer(operand(modulo, 0))
        if count is None or not is_op(sorter, "TopK") or sorter is None:
            return False
        option = sorter.attributes.get_int
        ascending = option("largest", 1) == 0 and option("sorted", 1) != 0
        packed = self._producer(operand(sorter, 0))
        if not ascending or not is_op(packed, "Add") or packed is None:
            return False
        for scaled, places in (packed.inputs, reversed(packed.inputs)):
            product = self._producer(scaled)
            if not is_op(product, "Mul") or product is None or not self._counts_to(places, count):
                continue
            by_count = any(self._same_number(value, count) for value in product.inputs)
            of_data = any(
                self._behind(self._padding_last(value)) is self._behind(data) for value in product.inputs
            )
            if by_count and of_data:
                return True
        return False

    def _counts_to(self, places: ir.Value | None, count: ir.Value) -> bool:
        """Whether it is 0 .. count - 1, as a constant or, where the count is an input, as a Range."""
        content, total, maker = constant(places), constant(count), self._producer(places)
        if content is not None and total is not None and total.size == 1:
            return np.array_equal(content.reshape(-1), np.arange(total.item()))
        if not is_op(maker, "Range") or maker is None:
            return False
        start, step = (constant(operand(maker, place)) for place in (0, 2))
        from_zero = start is not None and start.size == 1 and start.item() == 0
        in_ones = step is not None and step.size == 1 and step.item() == 1
        return from_zero and in_ones and self._same_number(operand(maker, 1), count)

    def _same_number(self, value: ir.Value | None, other: ir.Value) -> bool:
        mine, its = constant(value), constant(other)
        if mine is not None and its is not None:
            return mine.size == its.size == 1 and bool(mine.item() == its.item())
        return self._behind(value) is self._behind(other)

    @staticmethod
    def _padding_last(value: ir.Value | None) -> ir.Value | None:
        """What is sorted by `Where(x < 0, large, x)`, which puts padding behind all indices."""
        node = value.producer() if value is not None else None
        if node is None or not is_op(node, "Where"):
            return value
        test, large, data = (operand(node, place) for place in range(3))
        less, behind = test.producer() if test is not None else None, constant(large)
        if less is None or not is_op(less, "Less") or operand(less, 0) is not data or behind is None:
            return value
        bound = constant(operand(less, 1))
        is_padding = bound is not None and bound.size == 1 and bound.item() == 0
        return data if is_padding and bool((behind.astype(np.int64) >= _ABOVE_ALL_INDICES).all()) else value

    def _behind(self, value: ir.Value | None) -> ir.Value | None:
        while value is not None and is_op(value.producer(), *_ORDER_KEEPING):
            self.flow.work.take()
            node = value.producer()
            value = operand(node, 0) if node is not None else None
        return value

    def _producer(self, value: ir.Value | None) -> ir.Node | None:
        behind = self._behind(value)
        return behind.producer() if behind is not None else None


def _gathered_with(flow: Flow, embeds: ir.Value, kept: ir.Value) -> bool:
    """Whether some gather above the embeddings reads at the kept indices, however they were reshaped."""

    def movement(node: ir.Node) -> Iterable[ir.Value | None]:
        return node.inputs if is_op(node, *_INDEX_MOVEMENT) else ()

    def reshaping(node: ir.Node) -> Iterable[ir.Value | None]:
        return node.inputs[:1] if is_op(node, *_ORDER_KEEPING) else ()

    def joining(node: ir.Node) -> Iterable[ir.Value | None]:
        if is_op(node, "Where"):
            return node.inputs[1:]
        if is_op(node, "Gather") and node.inputs[0] in flow.inputs:  # places that came with the image
            return node.inputs[1:]
        return node.inputs if is_op(node, "Concat") else reshaping(node)

    # Chosen in groups and left in the order of the choice, indices are joined; each group was read at its own.
    joins = ("Concat", "Where", *_ORDER_KEEPING)
    origins = {v for v in flow.upstream(kept, joining) if not is_op(v.producer(), *joins)}
    fixed = [c for v in origins if (c := constant(v)) is not None]
    for value in flow.ancestors(embeds):
        node = value.producer()
        if node is None or not is_op(node, *_GATHERS) or node.inputs[1] is None:
            continue
        if _read_at_the_same_places(node, kept, lambda value: flow.upstream(value, reshaping)):
            return True
        for source in flow.upstream(node.inputs[1], movement):
            content = constant(source)
            if source in origins or (content is not None and any(_same(content, c) for c in fixed)):
                return True
    return False


def _read_at_the_same_places(
    gather: ir.Node, kept: ir.Value, origins_of: Callable[[ir.Value], Iterable[ir.Value]]
) -> bool:
    """Merged tokens have features of their strict, listed in the order of their indices: both lists are sorted alike.

    The list of features is as long as that of the indices; longer, it would be the patches, to be read at the indices.
    """
    maker = kept.producer()
    if not is_op(maker, "GatherElements") or maker is None or maker.inputs[1] is None:
        return False
    features, index, count = gather.inputs[0], gather.inputs[1], kept.shape
    if (
        features is None
        or index is None
        or features.shape is None
        or count is None
        or len(features.shape) < 2
    ):
        return False
    places = {v for v in origins_of(maker.inputs[1]) if is_op(v.producer(), "Mod")}
    return features.shape[1] == count[-1] and not places.isdisjoint(origins_of(index))


def _same(
    a: np.ndarray[tuple[int, ...], np.dtype[np.generic]], b: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> bool:
    """Whether two constants hold the same indices, whatever their shape."""
    return a.size == b.size and bool((a.reshape(-1) == b.reshape(-1)).all())
