"""Where the rotary angles come from: the position ids, rows that the caller computes, or a count the graph makes up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from gap_export.linter.dataflow import COUNTING, NOTHING, Facts, Flow, is_float, is_op
from gap_export.linter.probe import probe
from gap_export.linter.rotary import AngleValue, Rows


class Source(Enum):
    """Where an angle comes from."""

    IDS = "ids"
    CALLER = "caller"
    UNSURE = "unsure"
    LOST = "lost"


@dataclass(frozen=True)
class Angle:
    """The verdict on one angle tensor.

    Attributes:
        source: where it comes from.
        sentence: for `LOST` and `UNSURE` what is wrong; for `CALLER` the name of the graph input.
    """

    source: Source
    sentence: str = ""


def facts_of(flow: Flow, angle: AngleValue) -> Facts:
    """What an angle tensor, or picked rows, depend on."""
    facts = NOTHING
    for value in values_of(angle):
        facts = facts.join(flow.facts(value))
    return facts


def values_of(angle: AngleValue) -> tuple[ir.Value, ...]:
    """The tensors that an angle is made of."""
    return angle.values if isinstance(angle, Rows) else (angle,)


def find_ids(flow: Flow, name: str, angles: list[AngleValue], tokens: int) -> ir.Value | None:
    """The graph input that carries position ids: the one of that name, or the integer input the angles are made of.

    Masks and lengths are never taken for ids: an integer input without a token axis, or one that reaches the
    angles only through a count, is not one.
    """
    for value in flow.inputs:
        if value.name == name:
            return value
    candidates = [
        value
        for value in flow.inputs
        if may_be_ids(flow, value, tokens)
        and any(facts_of(flow, a).tokenwise & flow.bit(value) for a in angles)
    ]
    return candidates[0] if len(candidates) == 1 else None


def may_be_ids(flow: Flow, value: ir.Value, tokens: int) -> bool:
    """Whether a graph input has the type and shape of position ids, and neither the name of a mask nor tokens in it.

    One number is an id only where there is one token: a step.
    """
    if is_float(value) is not False or flow.bit(value) & tokens or "mask" in (value.name or "").lower():
        return False
    if value.shape is None or len(value.shape) >= 2 or (len(value.shape) == 1 and value.shape[0] != 1):
        return True
    carriers = [v for v in flow.inputs if flow.bit(v) & tokens and v.shape is not None]
    return any(_is_one_token(v) for v in carriers)


def _is_one_token(value: ir.Value) -> bool:
    """Whether an input carries a single token: ids [B, 1], or a hidden state [B, 1, H]."""
    shape = value.shape or ()
    place = len(shape) - 2 if is_float(value) else len(shape) - 1
    return 0 <= place < len(shape) and shape[place] == 1


def absolute_lookups(flow: Flow, ids: ir.Value) -> list[ir.Value]:
    """Indices into tables of learned absolute positions, in graphs that have no rotary embedding."""
    found = []
    for node in flow.nodes:
        if is_op(node, "Gather") and node.inputs[0] is not None and node.inputs[1] is not None:
            table, index = node.inputs[0], node.inputs[1]
            if flow.is_constant(table) and is_float(table) and flow.facts(index).values & flow.bit(ids):
                found.append(index)
    return found


def classify(
    flow: Flow, ids: ir.Value | None, angles: list[AngleValue], tokens: int
) -> dict[AngleValue, Angle]:
    """Where each angle comes from.

    Args:
        flow: the graph.
        ids: the position-ids input, if there is one.
        angles: tensors, or picked rows, to classify.
        tokens: bit mask of the token inputs.
    """
    reached = [a for a in angles if ids is not None and facts_of(flow, a).values & flow.bit(ids)]
    probed = probe(flow, ids, reached) if ids is not None else {}
    result: dict[AngleValue, Angle] = {}
    for angle in angles:
        if angle not in probed or ids is None:
            result[angle] = _from_elsewhere(flow, ids, angle, tokens)
            continue
        outcome = probed[angle]
        if outcome.follows:
            result[angle] = Angle(Source.IDS)
        elif outcome.follows is False:
            result[angle] = Angle(Source.LOST, outcome.sentence)
        elif not facts_of(flow, angle).tokenwise & flow.bit(ids):
            sentence = f"the angle reads {ids.name} only through a count or a reduction, not token by token"
            result[angle] = Angle(Source.LOST, sentence)
        else:
            sentence = f"the angle reads {ids.name}, but how could not be evaluated: {outcome.sentence}"
            result[angle] = Angle(Source.UNSURE, sentence)
    return result


def _from_elsewhere(flow: Flow, ids: ir.Value | None, angle: AngleValue, tokens: int) -> Angle:
    facts = facts_of(flow, angle)
    rows = [v for v in flow.inputs if facts.values & ~tokens & flow.bit(v) and is_float(v)]
    if rows and not facts.counted:
        return Angle(Source.CALLER, rows[0].name or "")
    return Angle(Source.LOST, _origin(flow, ids, angle))


def _origin(flow: Flow, ids: ir.Value | None, angle: AngleValue) -> str:
    """One sentence on what an angle is made of, when it is not the ids."""
    facts = facts_of(flow, angle)
    missing = "there is no position-ids input" if ids is None else f"{ids.name} does not reach them"
    if all(flow.is_constant(value) for value in values_of(angle)):
        return f"the rotary angles are constants, folded at export time; {missing}"
    counters = {
        node.op_type
        for each in values_of(angle)
        for value in flow.ancestors(each)
        if (node := value.producer()) is not None and is_op(node, *COUNTING) and flow.facts(value).counted
    }
    sources = ", ".join(
        flow.named(facts.values) or [f"the shape of {n}" for n in flow.named(facts.reach)[:1]]
    )
    if "CumSum" in counters:
        return f"the rotary angles are counted by CumSum over {sources or 'a constant'}; {missing}"
    if "Range" in counters or facts.counted:
        return f"the rotary angles are counted by Range from {sources or 'a loop'}; {missing}"
    if ids is not None and facts.reach & flow.bit(ids) and not facts.values:
        return f"the rotary angles depend only on the shape of {ids.name}"
    return f"the rotary angles are made from {sources}; {missing}"
