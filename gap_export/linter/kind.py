"""Which kind of graph this is, by its inputs and outputs; and graphs without position ids that go by a decoder's name."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

from gap_export.errors import LintError
from gap_export.linter.attention import find_attention
from gap_export.linter.dataflow import Flow, is_float, is_op
from gap_export.linter.decoder import ROPE
from gap_export.linter.report import Finding, GraphKind, Verdict
from gap_export.linter.vision import EMBEDS, KEPT

_DECODERS_NAME = re.compile(r"(^|[^a-z])(decoder|decode|prefill)([^a-z]|$)|^model([^a-z]|$)")
"""What exporters call the file of a decoder."""
_SENTENCES = {
    "vision": "this is a vision tower",
    "splice": "this is a graph that joins tokens and image features",
    "embed": "this is an embedding",
}


def kind_of(subject: str, flow: Flow, ids_input: str) -> GraphKind:
    """Which kind of graph this is.

    Raises:
        LintError: none that lint knows.
    """
    inputs = {v.name or "" for v in flow.inputs}
    outputs = {v.name or "" for v in flow.outputs}
    if inputs & {KEPT, EMBEDS}:
        return "splice"
    if outputs & {KEPT, EMBEDS}:
        return "vision"
    if _serves_tokens(flow, ids_input):
        return "decoder"
    tokens = inputs & {"inputs_embeds", "input_ids"}
    images = any("pixel" in name or name in ("image", "images") for name in inputs)
    if find_attention(flow) and (tokens or not images):
        return "decoder"
    if images:
        return "vision"
    if any(is_op(n, "Gather") and n.inputs[0] is not None and is_float(n.inputs[0]) for n in flow.nodes):
        return "embed"
    raise LintError(
        f"is of no kind that lint knows: inputs {', '.join(sorted(inputs)) or 'none'}",
        subject=subject,
        hint="decoder, vision, splice or embed: name it with the `kind`",
    )


def taken_for_decoder(source: Path | str | ir.Model, said: str) -> bool:
    """Whether a graph is a decoder by what was said of it or, where nothing was, by its file's name."""
    by_name = not isinstance(source, ir.Model) and bool(_DECODERS_NAME.search(Path(source).stem.lower()))
    return said == "decoder" or (said == "auto" and by_name)


def kind_without_ids(subject: str, flow: Flow, ids_input: str) -> GraphKind | None:
    """The kind of a graph that has neither position ids, nor a cache, nor logits, where it is another than a decoder's."""
    if _serves_tokens(flow, ids_input):
        return None
    try:
        kind = kind_of(subject, flow, ids_input)
    except LintError:
        return None
    return None if kind == "decoder" else kind


def no_ids(kind: GraphKind) -> Verdict:
    """The verdict on a graph that goes by a decoder's name and is of another kind."""
    finding = Finding(
        rule=ROPE.id,
        severity="error",
        breaks_ids=False,
        node="(inputs)",
        sentence=f"no position ids here: {_SENTENCES[kind]}, not a decoder",
        hint=f"give the decoder graph, or say what this one is (--kind {kind})",
    )
    reason = f"{_SENTENCES[kind]}, with neither position ids nor a cache nor logits"
    return Verdict(survives=False, answer="no position ids", reason=reason, findings=(finding,))


def _serves_tokens(flow: Flow, ids_input: str) -> bool:
    """Whether there are position ids, a cache or logits."""
    inputs = {v.name or "" for v in flow.inputs}
    caches = any(word in name for name in inputs for word in ("past", "cache"))
    return caches or ids_input in inputs or any(v.name == "logits" for v in flow.outputs)
