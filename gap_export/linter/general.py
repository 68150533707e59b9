"""Rules of every graph: no idle inputs, standard operators only; and of splice graphs: ids made from the kept indices."""

from __future__ import annotations

import onnx

from gap_export.linter.dataflow import STANDARD_DOMAINS, Flow, name_of
from gap_export.linter.report import Finding, Rule

USED = Rule(id="every-input-used", title="every graph input reaches an output")
STANDARD = Rule(id="standard-ops-only", title="all operators are of the ai.onnx domain")
SPLICED = Rule(
    id="ids-from-kept-indices", title="the position_ids of a splice graph are computed from kept_indices"
)

_OF_ENGINES = (("trt", "TRT_FP4DynamicQuantize"),)
"""Ours to write where engines are what a precision is for."""
_FUSED_BY_RUNTIME = ("GroupQueryAttention", "MultiHeadAttention")


def check_inputs_used(flow: Flow, strict: bool, *, may_be_idle: tuple[str, ...] = ()) -> list[Finding]:
    """Inputs that reach no output, not even by their shape."""
    used = 0
    for output in flow.outputs:
        used |= flow.facts(output).reach
    return [
        Finding(
            rule=USED.id,
            severity="error" if strict else "warning",
            breaks_ids=False,
            node=name,
            sentence="this input reaches no output: whatever a caller feeds is ignored",
            hint="remove it, or find out what dropped it",
        )
        for name in flow.named(~used)
        if name not in may_be_idle
    ]


def check_standard_ops(flow: Flow, strict: bool) -> list[Finding]:
    """Operators of other domains, or written under the standard's name without being in it, one finding for each kind."""
    kinds: dict[tuple[str, str], list[str]] = {}
    opset = flow.model.graph.opset_imports.get("", 0)
    for node in flow.nodes:
        if node.domain not in STANDARD_DOMAINS:
            kinds.setdefault((node.domain, node.op_type), []).append(name_of(node))
        elif not _is_defined(node.op_type, opset):
            kinds.setdefault(("ai.onnx", node.op_type), []).append(name_of(node))
    findings = []
    for (domain, op_type), names in kinds.items():
        hint = "it needs a runtime that knows the operator"
        since = "" if domain != "ai.onnx" or not onnx.defs.has(op_type, "") else f" of opset {opset}"
        if domain == "com.microsoft" and op_type in _FUSED_BY_RUNTIME:
            hint = (
                "ONNX Runtime may fuse a RotaryEmbedding into it at load and drop the ids:"
                ' disabled_optimizers=["GroupQueryAttentionFusion"]'
            )
        findings.append(
            Finding(
                rule=STANDARD.id,
                severity="error" if strict and (domain, op_type) not in _OF_ENGINES else "warning",
                breaks_ids=False,
                node=names[0],
                count=len(names),
                sentence=f"{domain}::{op_type} is not a standard operator{since}",
                hint=hint,
            )
        )
    return findings


def _is_defined(op_type: str, opset: int) -> bool:
    """Whether the ONNX standard has an operator, in an opset or before it."""
    return onnx.defs.has(op_type, opset, "") if opset else onnx.defs.has(op_type, "")


def check_splice(flow: Flow) -> list[Finding]:
    """Whether the ids a splice graph gives out are made from the values of the kept indices."""
    kept = flow.bit(*(v for v in flow.inputs if v.name == "kept_indices"))
    ids = next((v for v in flow.outputs if v.name == "position_ids"), None)
    if ids is not None and flow.facts(ids).tokenwise & kept:
        return []
    sentence = "is not computed from the values of kept_indices" if ids is not None else "is not an output"
    return [
        Finding(
            rule=SPLICED.id,
            severity="error",
            breaks_ids=True,
            node="position_ids",
            sentence=f"position_ids {sentence}: survivors lose the ids they had before pruning",
            hint="number kept visual token k as text_before + kept_indices[k]",
        )
    ]
