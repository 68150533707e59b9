"""Where the rotary angles come from: the position ids, rows that the caller computes, or a count the graph makes up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from gap_export.linter.dataflow import COUNTING, Flow, is_float, is_op
from gap_export.linter.probe import FOLLOWS, UNDECIDED, probe


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


def find_ids(flow: Flow, name: str, angles: list[ir.Value], tokens: int) -> ir.Value | None:
    """The graph input that carries position ids: the one of that name, or the integer input the angles are made of.

    Masks and lengths are never taken for ids: an integer input without a token axis, or one that reaches the
    angles only through a count, is not one.
    """
    for value in flow.inputs:
        if value.name == name:
            return value
    candidates = []
    for value in flow.inputs:
        bit = flow.bit(value)
        wanted = is_float(value) is False and not bit & tokens and "mask" not in (value.name or "").lower()
        if wanted and _has_token_axis(value) and any(flow.facts(a).tokenwise & bit for a in angles):
            candidates.append(value)
    return candidates[0] if len(candidates) == 1 else None


def _has_token_axis(value: ir.Value) -> bool:
    return value.shape is None or len(value.shape) >= 2 or (len(value.shape) == 1 and value.shape[0] != 1)


def classify(flow: Flow, ids: ir.Value | None, angles: list[ir.Value], tokens: int) -> dict[ir.Value, Angle]:
    """Where each angle tensor comes from.

    Args:
        flow: the graph.
        ids: the position-ids input, if there is one.
        angles: tensors to classify.
        tokens: bit mask of the token inputs.
    """
    reached = [a for a in angles if ids is not None and flow.facts(a).values & flow.bit(ids)]
    probed = probe(flow, ids, reached) if ids is not None else {}
    result: dict[ir.Value, Angle] = {}
    for angle in angles:
        facts = flow.facts(angle)
        if angle not in probed:
            result[angle] = _from_elsewhere(flow, ids, angle, tokens)
            continue
        outcome = probed[angle]
        if outcome == FOLLOWS:
            result[angle] = Angle(Source.IDS)
        elif outcome != UNDECIDED:
            result[angle] = Angle(Source.LOST, outcome.sentence)
        elif ids is not None and not facts.tokenwise & flow.bit(ids):
            result[angle] = Angle(
                Source.LOST,
                f"the angle reads {ids.name} only through a count or a reduction, not token by token",
            )
        elif facts.counted:
            result[angle] = Angle(
                Source.UNSURE,
                "the angle mixes position ids with a count, and the mixture could not be evaluated",
            )
        else:
            result[angle] = Angle(Source.IDS)
    return result


def _from_elsewhere(flow: Flow, ids: ir.Value | None, angle: ir.Value, tokens: int) -> Angle:
    facts = flow.facts(angle)
    rows = [v for v in flow.inputs if facts.values & ~tokens & flow.bit(v) and is_float(v)]
    if rows and not facts.counted:
        return Angle(Source.CALLER, rows[0].name or "")
    return Angle(Source.LOST, _origin(flow, ids, angle))


def _origin(flow: Flow, ids: ir.Value | None, angle: ir.Value) -> str:
    """One sentence on what an angle is made of, when it is not the ids."""
    facts = flow.facts(angle)
    missing = "there is no position-ids input" if ids is None else f"{ids.name} does not reach them"
    if flow.is_constant(angle):
        return f"the rotary angles are constants, folded at export time; {missing}"
    counters = {
        node.op_type
        for value in flow.ancestors(angle)
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
