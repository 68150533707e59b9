"""Rules of decoder graphs: RoPE reads the position ids, and nothing else does.

The rules about the ids break the verdict; those about causality and the shape of the cache are errors for graphs of this
project and, where other runtimes accept them, warnings for foreign ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gap_export.linter.angles import Angle, Source, absolute_lookups, classify, facts_of, find_ids, may_be_ids
from gap_export.linter.attention import AttentionSite, cache_sources, carried, find_attention
from gap_export.linter.dataflow import Flow, is_float, name_of, operand
from gap_export.linter.mask_probe import follows_gaps
from gap_export.linter.report import Finding, Rule
from gap_export.linter.rotary import AngleValue, RotaryFinder, RotarySite, token_inputs
from gap_export.linter.stages import StageIds, find_stage_ids

ROPE = Rule(
    id="rope-reads-position-ids", title="every rotary angle is a function of that token's position id"
)
INSIDE = Rule(id="no-rotary-inside-attention", title="no attention operator applies rotary embeddings itself")
MASK = Rule(id="mask-follows-slots", title="the attention mask does not depend on the position ids")
SLOTS = Rule(id="cache-follows-slots", title="cache slots are not computed from the position ids")
CAUSAL = Rule(id="no-causal-flag-with-cache", title="no causal flag where the keys come from a cache")
EXPLICIT = Rule(
    id="explicit-mask",
    title="attention over a cache has an explicit mask, one output and no cache of its own",
)
DECODER_RULES = (ROPE, INSIDE, MASK, SLOTS, CAUSAL, EXPLICIT)

_FEED_IDS = "export with position_ids as an explicit input that the rotary embedding reads"
MEASURE = "measure it in a runtime that knows the operators: logits of gapped and of contiguous ids (--prove, where ONNX Runtime is one)"


_PLUGINS_WITH_ROWS = ("AttentionPlugin",)
"""Plugins that rotate by rows which the caller computes, and by nothing else (TensorRT-Edge-LLM)."""


@dataclass(frozen=True)
class Decoder:
    """A decoder graph with everything that the rules ask for.

    Attributes:
        flow: its data flow.
        sites: its attention operations.
        rotary: for each attention, the rotary embeddings of its queries and of its keys.
        ids: the position-ids input.
        stages: ids of later stages, where tokens are dropped between layers.
        angles: where each angle tensor comes from.
        tokens: bit mask of the inputs that carry the tokens.
        absolute: there is no rotary embedding, but learned positions are looked up with the ids.
    """

    flow: Flow
    sites: list[AttentionSite]
    rotary: list[tuple[list[RotarySite], list[RotarySite]]]
    ids: ir.Value | None
    stages: StageIds
    angles: dict[AngleValue, Angle]
    tokens: int
    absolute: bool

    @property
    def reads_ids(self) -> int:
        """Bit mask of everything that holds position ids."""
        return self.flow.bit(self.ids, *self.stages.values)

    def is_bias(self, mask: ir.Value) -> bool:
        """Whether a mask may be how this model knows positions: numbers made from the ids, and no rotary embedding."""
        by_ids = self.flow.facts(mask).values & self.reads_ids
        return bool(by_ids) and is_float(mask) is not False and not self.angles

    @property
    def has_bias(self) -> bool:
        """Whether any attention has such a bias."""
        return any(self.is_bias(mask) for site in self.sites for mask in site.masks)

    @property
    def caller_rows(self) -> str | None:
        """The graph input that hands in rows of cosines and sines, if the caller computes them."""
        return next((a.sentence for a in self.angles.values() if a.source is Source.CALLER), None)


def read_decoder(flow: Flow, ids_name: str) -> Decoder:
    """Find attention, rotary embeddings and ids of a decoder graph."""
    sites = find_attention(flow)
    tokens = token_inputs(flow, sites, ids_name)
    named = next((v for v in flow.inputs if v.name == ids_name), None)
    stages = find_stage_ids(flow, named, tokens) if named is not None else StageIds()
    if stages.values:
        flow = Flow(flow.model, regarded=stages.values, work=flow.work)
    ids_of_any_name = [v for v in flow.inputs if named is None and may_be_ids(flow, v, tokens)]
    finder = RotaryFinder(flow, tokens, flow.bit(named, *stages.values, *ids_of_any_name))
    rotary = [_rotations(finder, site) for site in sites]
    found: list[AngleValue] = [
        a for queries, keys in rotary for site in (*queries, *keys) for a in site.angles
    ]
    for site, (queries, keys) in zip(sites, rotary, strict=True):
        if site.form == "plugin" and not queries and not keys:
            found += _rows_of_plugin(flow, site, tokens)
    unique = list(dict.fromkeys(found))
    ids = find_ids(flow, ids_name, unique, tokens)
    lookups = absolute_lookups(flow, ids) if ids is not None and not unique else []
    angles = classify(flow, ids, [*unique, *lookups], tokens)
    for chosen in stages.values:
        angles |= classify(
            flow, chosen, [a for a in unique if facts_of(flow, a).values & flow.bit(chosen)], tokens
        )
    absolute = bool(lookups) and all(angles[v].source is Source.IDS for v in lookups)
    return Decoder(flow, sites, rotary, ids, stages, angles, tokens, absolute)


def _rotations(finder: RotaryFinder, site: AttentionSite) -> tuple[list[RotarySite], list[RotarySite]]:
    """The rotary embeddings of queries and keys; failing that, whatever else but tokens enters them."""
    queries, keys = finder.of(site.query), finder.of(site.key)
    inside = finder.inside(site)
    if inside is not None:
        return [*queries, inside], [*keys, inside]
    if queries or keys:
        return queries, keys
    return finder.unrecognised(site.query), finder.unrecognised(site.key)


def _rows_of_plugin(flow: Flow, site: AttentionSite, tokens: int) -> list[ir.Value]:
    """Operands of a plugin that are rows of cosines and sines handed in by the caller."""
    words = ("rope", "rotary", "cos", "sin")
    return [
        v
        for v in site.node.inputs
        if v is not None
        and not flow.facts(v).values & tokens
        and any(is_named(name, words) for name in flow.named(flow.facts(v).values))
    ]


def is_named(name: str, words: tuple[str, ...]) -> bool:
    """Whether one of some words stands in a name, as a word of its own."""
    parts = name.lower().replace(".", "_").replace("/", "_").split("_")
    return any(word in parts for word in words)


def check_decoder(decoder: Decoder, strict: bool, *, renumbers: bool = False) -> list[Finding]:
    """Apply all rules of a decoder but those of its cache outputs.

    Args:
        decoder: what was found in it.
        strict: hold it to the contract of this project's bundles too.
        renumbers: whether its later stages number their tokens by slot, because that is the policy; ids are then read in
            the first stage alone.
    """
    findings = _rope(decoder, strict, renumbers)
    for site, (queries, keys) in zip(decoder.sites, decoder.rotary, strict=True):
        findings += _inside(decoder, site, [*queries, *keys])
        findings += _mask(decoder, site)
        findings += _slots(decoder, site)
        findings += _causality(decoder.flow, site, strict)
    return findings


def breaking(rule: Rule, node: str, sentence: str, hint: str, *, certain: bool = True) -> Finding:
    """A finding because of which ids do not survive, or cannot be said to."""
    return Finding(
        rule=rule.id,
        severity="error",
        breaks_ids=True,
        certain=certain,
        node=node,
        sentence=sentence,
        hint=hint,
    )


def _note(rule: Rule, node: str, sentence: str, hint: str, *, error: bool = False) -> Finding:
    return Finding(
        rule=rule.id,
        severity="error" if error else "warning",
        breaks_ids=False,
        node=node,
        sentence=sentence,
        hint=hint,
    )


# rope-reads-position-ids


def _rope(decoder: Decoder, strict: bool, renumbers: bool) -> list[Finding]:
    findings: dict[ir.Node, Finding] = {}
    bare: list[AttentionSite] = []
    for site, (queries, keys) in zip(decoder.sites, decoder.rotary, strict=True):
        if not queries and not keys:
            bare.append(site)
            continue
        if (
            bool(queries) != bool(keys)
            and not site.rotates_inside
            and site.form != "fused"
            and site.key is not None
        ):
            side, other = ("queries", "keys") if queries else ("keys", "queries")
            hint = "compare with the model: this may be a form of rotary embedding that lint does not know"
            findings[site.node] = _note(
                ROPE,
                name_of(site.node),
                f"a rotary embedding was found on the {side} but not on the {other}",
                hint,
            )
        for rotary in (*queries, *keys):
            finding = _angle_finding(decoder, rotary)
            by_slot = not any(facts_of(decoder.flow, a).values & decoder.reads_ids for a in rotary.angles)
            if finding is not None and not (renumbers and by_slot):
                findings[rotary.node] = finding
    return [*findings.values(), *_bare(decoder, bare, strict)]


def _angle_finding(decoder: Decoder, rotary: RotarySite) -> Finding | None:
    name = name_of(rotary.node)
    if rotary.offset_only:
        return breaking(ROPE, name, "takes one offset for the whole call, not an id per token", _FEED_IDS)
    angles = [decoder.angles[a] for a in rotary.angles]
    if not angles:
        return breaking(ROPE, name, "has no operand that could carry position ids", _FEED_IDS)
    for angle in angles:
        if angle.source is Source.LOST:
            return breaking(ROPE, name, angle.sentence, _FEED_IDS)
        if angle.source is Source.UNSURE:
            return breaking(ROPE, name, angle.sentence, MEASURE, certain=False)
    if not rotary.known:
        kind = f"{rotary.node.domain}::{rotary.node.op_type}"
        return breaking(ROPE, name, f"{kind} is not an operator that lint knows", MEASURE, certain=False)
    return None


def _bare(decoder: Decoder, bare: list[AttentionSite], strict: bool) -> list[Finding]:
    """Attention whose queries and keys meet no rotary embedding that lint knows; in this project's graphs all do."""
    unexplained = [s for s in bare if not s.rotates_inside and s.form != "plugin"]
    if not unexplained:
        return []
    name = name_of(unexplained[0].node)
    everywhere = len(unexplained) == len(decoder.sites)
    if not everywhere:
        hint = "fine where the model has layers without positions; otherwise a form that lint does not know"
        sentence = (
            f"no rotary embedding found on {len(unexplained)} of {len(decoder.sites)} attention operations"
        )
        if strict:
            return [breaking(ROPE, name, sentence, _FEED_IDS)]
        return [_note(ROPE, name, sentence, hint)]
    if decoder.absolute:
        return [
            _note(
                ROPE,
                name,
                "positions are learned and absolute, not rotary",
                "nothing to do: the ids are read",
            )
        ]
    lost = next((a.sentence for a in decoder.angles.values() if a.source is Source.LOST), None)
    if lost is None and decoder.ids is None:
        lost = "no rotary embedding was recognised, and there is no position-ids input"
    reached = any(
        decoder.flow.facts(end).values & decoder.reads_ids
        for site in decoder.sites
        for end in (site.query, site.key, *site.node.inputs[:1])
        if end is not None
    )
    if lost is None and decoder.has_bias:
        sentence = (
            "no rotary embedding was recognised, and a bias on attention is made from the ids: ALiBi, perhaps"
        )
        return [breaking(ROPE, name, sentence, MEASURE, certain=False)]
    if lost is None and reached:
        sentence = (
            "no rotary embedding was recognised on any query or key, though they read the ids in some way"
        )
        return [breaking(ROPE, name, sentence, MEASURE, certain=False)]
    return [breaking(ROPE, name, lost or "no rotary embedding was recognised on any query or key", _FEED_IDS)]


# no-rotary-inside-attention


def _inside(decoder: Decoder, site: AttentionSite, rotations: list[RotarySite]) -> list[Finding]:
    name, kind = name_of(site.node), site.node.op_type
    if site.rotates_inside and any(r.node is site.node for r in rotations):
        return []  # its rows are checked as angles
    if site.rotates_inside:
        counted = "has no position_ids operand and counts positions from the sequence lengths"
        first_only = "reads only the first position id of a prompt and counts up from it"
        sentence = f"{kind} has do_rotary=1: it {first_only if site.ids is not None else counted}"
        hint = "export without the attention fusion, or with do_rotary=0 and a RotaryEmbedding that reads position_ids"
        return [breaking(INSIDE, name, sentence, hint)]
    if site.form != "plugin":
        return []
    known = kind in _PLUGINS_WITH_ROWS
    if rotations and known:
        return []
    rows = [a for v in site.node.inputs if v is not None and (a := decoder.angles.get(v)) is not None]
    if known and any(a.source is Source.CALLER for a in rows):
        return []
    return [
        breaking(
            INSIDE,
            name,
            f"{site.node.domain}::{kind} may apply positions out of sight",
            "rotate queries and keys in the graph, before an attention that is known",
            certain=False,
        )
    ]


# mask-follows-slots, cache-follows-slots


def _mask(decoder: Decoder, site: AttentionSite) -> list[Finding]:
    if decoder.ids is None:
        return []
    for mask in site.masks:
        if decoder.is_bias(mask):
            continue  # what ids do there is how positions work, and told once for all layers
        if decoder.flow.facts(mask).values & decoder.reads_ids:
            follows = follows_gaps(decoder.flow, decoder.ids, mask)
            if follows is False:
                continue  # it reads the ids, but gaps change nothing: a comparison of ids with ids
            harm = (
                "gaps would change who sees whom"
                if follows
                else "whether gaps change who sees whom could not be evaluated"
            )
            return [
                breaking(
                    MASK,
                    name_of(site.node),
                    f"the attention mask {name_of(mask)} is computed from {decoder.ids.name}: {harm}",
                    "trace with an explicit attention mask: without one transformers reads gaps as packed sequences",
                    certain=follows is True,
                )
            ]
    return []


def _slots(decoder: Decoder, site: AttentionSite) -> list[Finding]:
    if decoder.ids is None or site.key is None:
        return []
    findings = []
    for source in (site.key, site.value):
        for value in decoder.flow.upstream(source, carried) if source is not None else ():
            node = value.producer()
            if node is None:
                continue
            place = {"TensorScatter": 2, "ScatterND": 1, "ScatterElements": 1}.get(node.op_type)
            index = operand(node, place) if place is not None else None
            if index is not None and decoder.flow.facts(index).values & decoder.reads_ids:
                findings.append(
                    breaking(
                        SLOTS,
                        name_of(node),
                        f"the cache slot is computed from {decoder.ids.name}: gaps in the ids become holes in the cache",
                        "write at an index of its own (write_index), which counts slots",
                    )
                )
    return findings[:1]


# no-causal-flag-with-cache, explicit-mask


def _causality(flow: Flow, site: AttentionSite, strict: bool) -> list[Finding]:
    if site.form != "standard":
        return []
    node, name = site.node, name_of(site.node)
    causal = node.attributes.get_int("is_causal", 0) != 0
    lengths = operand(node, 6) is not None
    caches = cache_sources(flow, site)
    findings = []
    aligned = lengths or bool(site.cache_operands)  # the operator knows how many keys came before
    if causal and caches:
        harm = "TensorRT aligns it to the upper left" if aligned else "a decode step sees only the first key"
        sentence = f"is_causal=1 over a cache ({', '.join(caches)}): {harm}"
        hint = "use is_causal=0 and a boolean mask"
        findings.append(_note(CAUSAL, name, sentence, hint, error=strict or not aligned))
    if site.cache_operands or sum(1 for v in node.outputs if v.name) > 1:
        sentence = "keeps the cache inside Attention (past and present operands), which TensorRT refuses"
        findings.append(
            _note(
                EXPLICIT, name, sentence, "write the cache with TensorScatter before Attention", error=strict
            )
        )
    if lengths:
        sentence = "relies on nonpad_kv_seqlen, which TensorRT drops without an error"
        findings.append(_note(EXPLICIT, name, sentence, "use a boolean mask over the slots", error=strict))
    if caches and operand(node, 3) is None and not causal and not lengths:
        sentence = "attends to every slot of the cache: it has neither mask nor lengths"
        findings.append(
            _note(EXPLICIT, name, sentence, "give it a boolean mask: slot_k <= write_index + q", error=True)
        )
    return findings
