"""Operators that lint does not know, where they could apply positions: no graph that holds one is said to carry ids."""

from __future__ import annotations

from gap_export.linter.attention import carried
from gap_export.linter.dataflow import STANDARD_DOMAINS, is_made_up, name_of
from gap_export.linter.decoder import INSIDE, MEASURE, Decoder, breaking
from gap_export.linter.report import Finding

_KNOWN_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "trt")
"""Their operators rotate only where `rotary` and `attention` say so."""


def check_out_of_sight(decoder: Decoder) -> list[Finding]:
    """Operators of unknown domains that might rotate: on the way of queries and keys, or given both tokens and ids."""
    flow = decoder.flow
    checked = {site.node for site in decoder.sites}
    checked |= {rotary.node for pair in decoder.rotary for side in pair for rotary in side}
    on_the_way = {
        node
        for site in decoder.sites
        for end in (site.query, site.key)
        if end is not None
        for value in flow.upstream(end, carried)
        if (node := value.producer()) is not None
    }
    findings = []
    for node in flow.nodes:
        if node in checked or (node.domain in _KNOWN_DOMAINS and not is_made_up(node)):
            continue
        facts = [flow.facts(v) for v in node.inputs if v is not None]
        reads = any(f.values & decoder.reads_ids and not f.values & decoder.tokens for f in facts)
        joins = any(f.values & decoder.tokens for f in facts)
        if node in on_the_way or (reads and joins):
            sentence = f"{node.domain}::{node.op_type} may apply positions out of sight"
            findings.append(breaking(INSIDE, name_of(node), sentence, MEASURE, certain=False))
    return findings
