"""Who depends on whom: data flow through a graph, its If/Loop/Scan bodies and its (inlined) functions.

For every tensor four facts are kept, as bit masks over the graph inputs:

    reach       inputs it depends on in any way, shapes included
    values      inputs whose *values* it depends on: `Shape` and `Size` cut this
    tokenwise   inputs it depends on along a path without counting or reducing operators: `CumSum`, `Range`,
                `ReduceMax` ... cut this too, for what they return is no longer one value per token
    counted     whether a `Range` or `CumSum` that varies between calls lies upstream

The facts are the least fixed point of a monotone transfer function (Kildall 1973), which one pass over a sorted graph
reaches; only loop bodies need a second. They over-approximate: what is not in `values` certainly has no influence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import LintError
from gap_export.linter.limits import Work

STANDARD_DOMAINS = ("", "ai.onnx")
_OF_ONNX_RUNTIME = frozenset({"SimplifiedLayerNormalization"})
"""Operators that ONNX Runtime writes under the standard's name."""
_QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_QUANTIZING_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")
SHAPE_ONLY = frozenset({"Shape", "Size"})
COUNTING = frozenset({"Range", "CumSum"})
REDUCING = COUNTING | frozenset(
    {
        "ReduceMax",
        "ReduceMin",
        "ReduceSum",
        "ReduceMean",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
    }
    | {"ArgMax", "ArgMin", "NonZero", "Unique"}
)
LARGEST_CONSTANT = 1 << 24
"""Elements; a constant above this is a weight and is never looked at."""


@dataclass(frozen=True)
class Facts:
    """What one tensor depends on; see the module's text."""

    reach: int = 0
    values: int = 0
    tokenwise: int = 0
    counted: bool = False

    def join(self, other: Facts) -> Facts:
        """The facts of something that depends on both."""
        return Facts(
            self.reach | other.reach,
            self.values | other.values,
            self.tokenwise | other.tokenwise,
            self.counted or other.counted,
        )


NOTHING = Facts()


class Flow:
    """Data flow of one graph, computed once, asked by every rule.

    Attributes:
        model: the model; functions already inlined.
        inputs: graph inputs that a caller feeds (initializers listed as inputs are not).
        outputs: graph outputs.
        nodes: every node, those of If/Loop/Scan bodies before the node that holds them.
        work: what has been done so far; every walk through the graph counts its steps there.

    Args:
        model: functions already inlined, and checked (`structure`).
        regarded: values inside the graph whose facts are those of an input, for rules that have proved where they come from.
        work: that of an earlier flow of the same graph, to go on counting.

    Raises:
        CycleError: its nodes depend on each other in a circle.
    """

    def __init__(self, model: ir.Model, regarded: Iterable[ir.Value] = (), work: Work | None = None) -> None:
        self.model = model
        self.work = work if work is not None else Work(model.graph.name or "graph")
        graph = model.graph
        self.inputs = tuple(v for v in graph.inputs if v.name not in graph.initializers)
        self.outputs = tuple(graph.outputs)
        self._aliases: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._controls: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self._paces: dict[ir.Node, tuple[ir.Value, ...]] = {}
        """Scan -> what it goes through: its extent, though not its values, decides how many steps there are."""
        self._loop_counters: set[ir.Value] = set()
        self.nodes: tuple[ir.Node, ...] = tuple(self._flatten(graph))
        self._ordered = in_order(self.nodes)
        self._bits = {value: 1 << i for i, value in enumerate((*self.inputs, *regarded))}
        self._facts: dict[ir.Value, Facts] = {}
        self._solve()

    # Structure

    def _flatten(self, graph: ir.Graph) -> Iterator[ir.Node]:
        for node in graph:
            bodies = list(subgraphs(node))
            for body in bodies:
                yield from self._flatten(body)
            if bodies:
                self._connect(node, bodies)
            yield node

    def _connect(self, node: ir.Node, bodies: list[ir.Graph]) -> None:
        """Record which values of a control-flow node and of its bodies are one and the same."""
        operands = [v for v in node.inputs if v is not None]
        if is_op(node, "If"):
            self._controls[node] = tuple(operands)
            for i, output in enumerate(node.outputs):
                self._aliases[output] = tuple(b.outputs[i] for b in bodies if i < len(b.outputs))
        elif is_op(node, "Loop"):
            body, carried = bodies[0], list(node.inputs)[2:]
            self._controls[node] = tuple(v for v in node.inputs[:2] if v is not None)
            self._loop_counters.update(body.inputs[:1])
            for i, start in enumerate(carried):
                both = tuple(v for v in (start, body.outputs[1 + i]) if v is not None)
                self._aliases[body.inputs[2 + i]] = both
                self._aliases[node.outputs[i]] = both
            for i in range(len(carried), len(node.outputs)):
                self._aliases[node.outputs[i]] = (body.outputs[1 + i],)
        elif is_op(node, "Scan"):
            body, scanned = bodies[0], node.attributes["num_scan_inputs"].as_int()
            states = len(node.inputs) - scanned
            for i, (inner, outer) in enumerate(zip(body.inputs, node.inputs, strict=False)):
                again = (body.outputs[i],) if i < states else ()
                self._aliases[inner] = tuple(v for v in (outer, *again) if v is not None)
            for output, inner in zip(node.outputs, body.outputs, strict=False):
                self._aliases[output] = (inner,)
            self._paces[node] = tuple(v for v in list(node.inputs)[states:] if v is not None)
        else:  # an operator with bodies that this module does not know: everything may depend on everything
            results = tuple(v for b in bodies for v in b.outputs)
            for body in bodies:
                for inner in body.inputs:
                    self._aliases[inner] = tuple(operands)
            for output in node.outputs:
                self._aliases[output] = (*results, *operands)

    # Facts

    def _solve(self) -> None:
        for value, bit in self._bits.items():
            self._facts[value] = Facts(bit, bit, bit)
        for counter in self._loop_counters:
            self._facts[counter] = Facts(counted=True)
        changed = True
        while changed:
            changed = False
            self.work.take(len(self.nodes))
            for inner in (v for v in self._aliases if v.producer() is None):
                changed |= self._update(inner, self._joined(self._aliases[inner]))
            for node in self._ordered:
                for output in node.outputs:
                    changed |= self._update(output, self._transfer(node, output))

    def _update(self, value: ir.Value, facts: Facts) -> bool:
        if value in self._bits or facts == self._facts.get(value, NOTHING):
            return False
        self._facts[value] = facts
        return True

    def _joined(self, values: Iterable[ir.Value | None]) -> Facts:
        facts = NOTHING
        for value in values:
            if value is not None:
                facts = facts.join(self._facts.get(value, NOTHING))
        return facts

    def _transfer(self, node: ir.Node, output: ir.Value) -> Facts:
        aliases = self._aliases.get(output)
        if aliases is not None:
            pace = self._joined(self._paces.get(node, ()))
            return self._joined((*aliases, *self._controls.get(node, ()))).join(Facts(reach=pace.reach))
        facts = self._joined(node.inputs)
        if node.domain not in STANDARD_DOMAINS:
            return facts
        if node.op_type in SHAPE_ONLY:
            return Facts(reach=facts.reach, counted=False)
        if node.op_type in REDUCING:
            counted = facts.counted or (node.op_type in COUNTING and facts.reach != 0)
            return Facts(facts.reach, facts.values, 0, counted)
        return facts

    def facts(self, value: ir.Value) -> Facts:
        """What a tensor depends on."""
        return self._facts.get(value, NOTHING)

    def bit(self, *values: ir.Value | None) -> int:
        """The bit mask of some graph inputs, or of values regarded as such."""
        mask = 0
        self.work.take(len(values))
        for value in values:
            mask |= self._bits.get(value, 0) if value is not None else 0
        return mask

    def named(self, mask: int) -> list[str]:
        """Names of the graph inputs in a bit mask."""
        return [name_of(value) for value, bit in self._bits.items() if mask & bit]

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a tensor is the same in every call, whatever is fed."""
        facts = self.facts(value)
        return facts.reach == 0 and not facts.counted

    # Walking upstream

    def definitions(self, value: ir.Value) -> list[ir.Value]:
        """The values behind a value: itself, or for results and inputs of If/Loop/Scan bodies what stands for them."""
        found: dict[ir.Value, None] = {}
        seen: set[ir.Value] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            self.work.take()
            if current in seen:
                continue
            seen.add(current)
            aliases = self._aliases.get(current)
            if aliases is None:
                found[current] = None
            else:
                pending.extend(aliases)
        return list(found)

    def alternatives(self, value: ir.Value) -> list[ir.Value]:
        """The values that a value may be, by the branches that are taken: itself, unless an If gives it out."""
        found: dict[ir.Value, None] = {}
        seen: set[ir.Value] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if is_op(current.producer(), "If"):
                pending.extend(reversed(self._aliases[current]))
            else:
                found[current] = None
        return list(found)

    def upstream(
        self, start: ir.Value, step: Callable[[ir.Node], Iterable[ir.Value | None]]
    ) -> Iterator[ir.Value]:
        """Every value met on the way up from `start`, itself included.

        Args:
            start: where to begin.
            step: given the node that produces a value, the operands to go on with.
        """
        seen: set[ir.Value] = set()
        pending: list[ir.Value | None] = [start]
        while pending:
            current = pending.pop()
            if current is None:
                continue
            for value in self.definitions(current):
                if value in seen:
                    continue
                seen.add(value)
                yield value
                node = value.producer()
                if node is not None:
                    pending.extend(step(node))
                    self.work.take(len(node.inputs))

    def ancestors(self, start: ir.Value) -> Iterator[ir.Value]:
        """Every value that `start` depends on, itself included."""
        return self.upstream(start, everything)


def everything(node: ir.Node) -> Iterable[ir.Value | None]:
    """All operands, and what the bodies of the node read from outside."""
    return node.inputs


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of a control-flow node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether a node is one of some operators of the standard domain."""
    return node is not None and node.domain in STANDARD_DOMAINS and node.op_type in names


def is_quantizing(node: ir.Node | None) -> bool:
    """Whether a node writes its first operand in few bits, or reads it back: it stays the same tensor."""
    return node is not None and node.domain in _QUANTIZING_DOMAINS and node.op_type in _QUANTIZING


def is_made_up(node: ir.Node) -> bool:
    """Whether a node claims the standard domain for an operator that neither the standard nor ONNX Runtime has."""
    known = onnx.defs.has(node.op_type, "") or node.op_type in _OF_ONNX_RUNTIME
    return node.domain in STANDARD_DOMAINS and not known


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An operand, or None where it was left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name else None


def name_of(thing: ir.Value | ir.Node) -> str:
    """A name a reader can search for: nodes without one go by their first output."""
    if thing.name:
        return thing.name
    if isinstance(thing, ir.Node) and thing.outputs:
        return f"{thing.op_type} -> {thing.outputs[0].name}"
    return "(unnamed)"


def is_float(value: ir.Value) -> bool | None:
    """Whether a tensor holds floating-point numbers; None where the graph does not say."""
    return None if value.dtype is None else value.dtype.is_floating_point()


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The content of an initializer or Constant node; None for anything else, for weights and for external data."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > LARGEST_CONSTANT:
        return None
    try:
        return np.asarray(tensor.numpy())
    except Exception as error:  # it is decoded in many ways, by type; `structure` looks at the small ones
        raise LintError(
            "is a constant that cannot be read", subject=name_of(value), hint="export the graph again"
        ) from error


def integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute of a node, for operators that the standard does not check.

    Raises:
        LintError: it is of another type.
    """
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type != ir.AttributeType.INT:
        raise LintError(
            f"its attribute {name!r} is of type {attribute.type.name}, and should be INT",
            subject=name_of(node),
            hint="export the graph again",
        )
    return attribute.as_int()


def in_order(nodes: tuple[ir.Node, ...]) -> tuple[ir.Node, ...]:
    """Every node after those whose results it reads, with its bodies; ONNX Runtime takes graphs in another order.

    Args:
        nodes: those of bodies before the node that holds them.

    Raises:
        CycleError: they depend on each other in a circle.
    """
    read = {node: _read(node) for node in nodes}
    done: set[ir.Node] = set()
    for node in nodes:
        if any(maker in read and maker not in done for maker in read[node]):
            break
        done.add(node)
    else:
        return nodes
    return tuple(
        TopologicalSorter({node: makers & read.keys() for node, makers in read.items()}).static_order()
    )


def _read(node: ir.Node) -> set[ir.Node]:
    """The nodes that come before one: makers of what it reads, and all that is in its bodies."""
    makers = {maker for value in node.inputs if value is not None and (maker := value.producer()) is not None}
    for body in subgraphs(node):
        makers.update(body)
        makers.update(maker for value in body.outputs if (maker := value.producer()) is not None)
    return makers
