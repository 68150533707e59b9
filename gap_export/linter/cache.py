"""Rules of the cache: written in place, at one slot counter, each present bound to its own past."""

from __future__ import annotations

import re

import onnx_ir as ir

from gap_export.linter.dataflow import SHAPE_ONLY, Flow, is_op, name_of, operand
from gap_export.linter.report import Finding, Rule

CACHE = Rule(id="cache-in-place", title="every present is a TensorScatter into its own past")

SEQUENCE_AXIS = 2
"""Of a cache [B, Hkv, C, D]."""


def check_cache(flow: Flow, strict: bool) -> list[Finding]:
    """Whether past and present may share one buffer."""
    presents = [v for v in flow.outputs if _is_cache(v)]
    findings = [f for present in presents for f in _present(flow, present, strict)]
    if strict and not presents:
        findings.append(
            _finding(
                "(outputs)", "there are no present.* outputs", "export the decoder with its cache", strict
            )
        )
    return findings


def _is_cache(output: ir.Value) -> bool:
    return re.match(r"present", output.name or "") is not None or is_op(output.producer(), "TensorScatter")


def _present(flow: Flow, present: ir.Value, strict: bool) -> list[Finding]:
    name = name_of(present)
    node = present.producer()
    if not is_op(node, "TensorScatter") or node is None:
        kind = f"{node.domain}::{node.op_type}".removeprefix("::") if node is not None else "nothing"
        sentence = f"the cache comes from {kind}, not from TensorScatter"
        if kind == "Concat":
            sentence = "the cache comes from Concat: it grows with every token and is copied"
        return [_finding(name, sentence, "write it with TensorScatter into a past of static length", strict)]
    found: list[tuple[str, str]] = []
    past, index = operand(node, 0), operand(node, 2)
    if past is None or past not in flow.inputs:
        found.append(
            ("the past that is written into is not a graph input itself", "scatter into past.* directly")
        )
    else:
        found += _pair(flow, node, past, present, strict)
    if node.attributes.get_string("mode", "linear") != "linear":
        found.append(("TensorScatter is circular", "use mode=linear: TensorRT knows no other"))
    if index is None:
        found.append(
            ("TensorScatter has no write index: every call writes at slot 0", "feed write_index [B]")
        )
    return [_finding(name, sentence, hint, strict) for sentence, hint in found]


def _pair(
    flow: Flow, node: ir.Node, past: ir.Value, present: ir.Value, strict: bool
) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if strict and name_of(present).replace("present", "past", 1) != name_of(past):
        found.append(
            (f"it is written into {name_of(past)}, a cache of another name", "pair past and present by name")
        )
    # Asking for the shape is no reading: the content may change under it.
    readers = {use.node for use in past.uses() if not is_op(use.node, *SHAPE_ONLY)}
    if readers != {node} or past in flow.outputs:
        found.append(
            (
                "its past is read by other operators too, which would see the new content",
                "read the present instead",
            )
        )
    if past.dtype is not None and present.dtype is not None and past.dtype != present.dtype:
        found.append((f"past is {past.dtype} and present is {present.dtype}", "keep one element type"))
    before, after = past.shape, present.shape
    if before is None:
        return [*found, ("its past has no shape", "declare [batch, kv_heads, capacity, head_dim]")]
    if after is not None and list(before) != list(after):
        found.append((f"past is {before} and present is {after}", "keep one shape"))
    axis = node.attributes.get_int("axis", -2) % max(len(before), 1)
    if len(before) != 4 or axis != SEQUENCE_AXIS:
        found.append((f"it is written along axis {axis} of {len(before)}", "use [B, Hkv, C, D] and axis 2"))
    elif (
        not isinstance(before[axis], int) and not strict
    ):  # ours varies where no engine was asked for, and builders of engines look
        found.append(
            ("its sequence length is not static, which TensorRT requires", "export with a fixed capacity")
        )
    return found


def _finding(name: str, sentence: str, hint: str, strict: bool) -> Finding:
    return Finding(
        rule=CACHE.id,
        severity="error" if strict else "warning",
        breaks_ids=False,
        node=name,
        sentence=sentence,
        hint=hint,
    )
