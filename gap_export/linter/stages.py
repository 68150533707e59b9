"""Rules of decoders that drop tokens between their layers: a token's id goes where the token goes.

Such a graph (`prefill`) picks rows of its hidden states with an index that depends on the tokens themselves, and so later layers
need ids picked the same way. What is proved to be picked so is taken for position ids in its own right from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gap_export.linter.dataflow import Flow, is_float, is_op, name_of, operand
from gap_export.linter.report import Finding, Rule
from gap_export.linter.vision import order_of

FOLLOW = Rule(
    id="ids-follow-survivors",
    title="where a decoder drops tokens, ids are gathered with the index that the tokens are gathered with",
)
KEPT_INSIDE, WRITE_INSIDE = "kept_slots.", "write_index."
"""What the outputs and inputs of such graphs begin with that belong to a later stage."""
_RESHAPING = ("Unsqueeze", "Squeeze", "Expand", "Reshape", "Identity", "Cast")


@dataclass(frozen=True)
class StageIds:
    """Where ids of later stages come from.

    Attributes:
        values: int64 [B, S] tensors that hold the ids of survivors, in graph order.
        indices: what they were gathered with.
        findings: ids that were picked otherwise than the tokens.
    """

    values: tuple[ir.Value, ...] = ()
    indices: tuple[ir.Value, ...] = ()
    findings: tuple[Finding, ...] = ()


def is_staged(flow: Flow) -> bool:
    """Whether a graph is one of a decoder that drops tokens, by the names of its inputs and outputs."""
    names = [v.name or "" for v in (*flow.inputs, *flow.outputs)]
    return any(name.startswith((KEPT_INSIDE, WRITE_INSIDE)) for name in names)


def find_stage_ids(flow: Flow, ids: ir.Value, tokens: int) -> StageIds:
    """Follow the ids through every choice of tokens.

    Args:
        flow: the graph.
        ids: the position-ids input.
        tokens: bit mask of the inputs that carry the tokens.
    """
    hidden = {
        _plain(flow, node.inputs[1])
        for node in flow.nodes
        if is_op(node, "GatherElements") and _carries(flow, operand(node, 0), tokens)
    }
    known, indices, findings = [ids], [], []
    for node in flow.nodes:
        data, index = operand(node, 0), operand(node, 1)
        if not is_op(node, "GatherElements") or data is None or index is None:
            continue
        # A choice depends on what the tokens say; other gathers of ids (a row of three, a last one) do not.
        if _plain(flow, data) not in known or not flow.facts(index).values & tokens:
            continue
        if _plain(flow, index) in hidden:
            known.append(node.outputs[0])
            indices.append(index)
        else:
            findings.append(
                _finding(
                    name_of(node),
                    f"{ids.name} of survivors are gathered with another index than the tokens are",
                    "gather hidden states and ids with the very same index",
                )
            )
    return StageIds(tuple(known[1:]), tuple(indices), tuple(findings))


def check_kept_inside(flow: Flow, stages: StageIds, *, keeps_ids: bool, sorted_wanted: bool) -> list[Finding]:
    """Whether the `kept_slots.*` that are given out are those of the choices.

    Args:
        flow: the graph.
        stages: the choices that ids were seen to go through.
        keeps_ids: whether survivors keep their ids, so that every choice must have been seen.
        sorted_wanted: whether raster order is the policy.
    """
    findings = list(stages.findings)
    given = [v for v in flow.outputs if (v.name or "").startswith(KEPT_INSIDE)]
    if keeps_ids and given and not findings and len(given) != len(stages.values):
        findings.append(
            _finding(
                name_of(given[-1]),
                f"tokens are chosen {len(given)} times, and their ids {len(stages.values)} times",
                "gather ids wherever tokens are gathered",
            )
        )
    for kept in given:
        if sorted_wanted and order_of(flow, kept)[0] != 1:
            sentence = order_of(flow, kept)[1]
            findings.append(
                _finding(name_of(kept), sentence, "sort what was chosen before gathering with it")
            )
        maker = kept.producer()
        places = operand(maker, 1) if maker is not None and is_op(maker, "GatherElements") else None
        made_with = {value for index in stages.indices for value in flow.ancestors(index)}
        if stages.indices and (places is None or _plain(flow, places) not in made_with):
            findings.append(
                _finding(
                    name_of(kept),
                    "these are not the places that the tokens were gathered with",
                    "give out slots gathered with the same places",
                )
            )
    return findings


def _carries(flow: Flow, value: ir.Value | None, tokens: int) -> bool:
    return value is not None and is_float(value) is not False and bool(flow.facts(value).values & tokens)


def _plain(flow: Flow, value: ir.Value | None) -> ir.Value | None:
    """What a tensor was before it was reshaped, repeated or cast."""
    while value is not None and is_op(value.producer(), *_RESHAPING):
        flow.work.take()
        node = value.producer()
        value = operand(node, 0) if node is not None else None
    return value


def _finding(node: str, sentence: str, hint: str) -> Finding:
    return Finding(rule=FOLLOW.id, severity="error", breaks_ids=True, node=node, sentence=sentence, hint=hint)
