"""Would gapped position ids survive this graph? Read from the graph alone, for ours and for other exporters' decoders.

    report = lint_graph(Path("decoder.onnx"))
    print(report.verdict.reason)
    report.raise_for_errors()

Rules are small functions over one data-flow analysis (`dataflow`): `decoder`, `mask`, `cache`, `vision`, `general`. What data flow
cannot decide, `probe` evaluates; no weight is read. `prove` runs the whole graph instead, where it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from gap_export.errors import GapExportError, InputError, LintError, first_line
from gap_export.linter.cache import CACHE, check_cache
from gap_export.linter.dataflow import Flow
from gap_export.linter.decoder import DECODER_RULES, Decoder, check_decoder, read_decoder
from gap_export.linter.general import (
    SPLICED,
    STANDARD,
    USED,
    check_inputs_used,
    check_splice,
    check_standard_ops,
)
from gap_export.linter.kind import kind_of, kind_without_ids, no_ids, taken_for_decoder
from gap_export.linter.limits import too_much
from gap_export.linter.load import load
from gap_export.linter.mask import SEES, check_mask, declared_mask
from gap_export.linter.opaque import check_out_of_sight
from gap_export.linter.prove import prove as prove_by_running
from gap_export.linter.report import Finding, GraphKind, Proof, Report, Rule, Severity, Verdict, verdict_of
from gap_export.linter.stages import FOLLOW, check_kept_inside, is_staged
from gap_export.linter.vision import ASCENDING, KEPT, check_vision
from gap_export.positions import AttentionMask, PositionPolicy

__all__ = ["RULES", "Finding", "GraphKind", "Proof", "Report", "Rule", "Severity", "Verdict", "lint_graph"]

IDS = "position_ids"
KINDS: tuple[GraphKind | Literal["auto"], ...] = ("auto", *get_args(GraphKind))
GENERAL_RULES = (USED, STANDARD)
RULES: tuple[Rule, ...] = (*DECODER_RULES, SEES, CACHE, FOLLOW, ASCENDING, SPLICED, *GENERAL_RULES)
"""Every rule there is."""


def lint_graph(
    source: Path | str | ir.Model,
    *,
    kind: GraphKind | Literal["auto"] = "auto",
    strict: bool = False,
    policy: PositionPolicy = PositionPolicy.GAP,
    mask: AttentionMask | None = None,
    ids_input: str = IDS,
    prove: bool = False,
) -> Report:
    """Check a graph against the rules without which gapped position ids do not survive.

    Args:
        source: an ONNX file, or a model in memory (not changed). External weights need not be there.
        kind: which kind of graph it is; `auto` looks at its inputs and outputs.
        strict: hold it to the contract of this project's bundles too: standard operators, a static cache in place,
            an explicit mask. For other exporters' graphs these are warnings.
        policy: how survivors are numbered; `permuted` wants score order, only `gap` wants ids from kept indices, and in all
            stages of a decoder that drops tokens.
        mask: which tokens see which, as the model's spec says; by default what the inputs stand for. Looked at where `strict`.
        ids_input: name of the input with position ids; without one of that name the integer input that the rotary
            angles are made of is taken, unless another name was asked for.
        prove: also run a decoder with gapped and with renumbered ids in ONNX Runtime, on inputs made up for it; see `report.proof`.

    Returns:
        The report. `report.verdict` answers the question in one line, `report.raise_for_errors()` refuses a bad graph.

    Raises:
        InputError: no such kind, or the file is not there, not ONNX, damaged or empty.
        LintError: the graph is invalid, asks for more than any decoder (`limits`), is of no kind that lint knows, or a decoder
            without attention; or what was measured contradicts what was read from the graph.
    """
    if kind not in KINDS:
        raise InputError(
            "is not a kind of graph", subject=repr(kind), hint=f"choose one of {', '.join(KINDS)}"
        )
    question = _Question(kind, strict, policy, mask, ids_input, prove)
    try:
        return _answer(source, question)
    except GapExportError:
        raise
    except RecursionError as error:
        raise too_much(
            "has nodes that depend on each other too deeply to be analysed", _name(source)
        ) from error
    except Exception as error:
        # What is known of invalid graphs is checked before (`structure`); the ways to build one have no end.
        raise LintError(
            f"cannot be analysed: {type(error).__name__}: {first_line(error)[:200]}",
            subject=_name(source),
            hint="check the file with onnx.checker; if it is valid, report this",
        ) from error


def _name(source: Path | str | ir.Model) -> str:
    return (source.graph.name or "graph") if isinstance(source, ir.Model) else str(source)


@dataclass(frozen=True)
class _Question:
    """What is asked of a graph; see `lint_graph`."""

    kind: GraphKind | Literal["auto"]
    strict: bool
    policy: PositionPolicy
    mask: AttentionMask | None
    ids_input: str
    prove: bool


def _answer(source: Path | str | ir.Model, question: _Question) -> Report:
    strict, policy, ids_input = question.strict, question.policy, question.ids_input
    subject, flow = load(source)
    if ids_input != IDS and ids_input not in {value.name for value in flow.inputs}:
        raise InputError(
            f"has no input {ids_input!r}",
            subject=subject,
            hint=f"its inputs: {', '.join(value.name or '' for value in flow.inputs)}",
        )
    other = None
    if taken_for_decoder(source, question.kind):
        other = kind_without_ids(subject, flow, ids_input)
    if other is not None:
        report = Report(
            subject=subject, kind=other, strict=strict, attention_layers=0, rules=(), verdict=no_ids(other)
        )
        return report.with_proof(_NOT_RUN) if question.prove else report
    kind = kind_of(subject, flow, ids_input) if question.kind == "auto" else question.kind
    if kind == "decoder":
        checked = _check_decoder(subject, flow, strict, ids_input, policy, question.mask)
    elif kind == "vision":
        checked = _check_vision(flow, policy)
    elif kind == "splice":
        checked = _check_splice(flow, policy)
    else:
        checked = _Checked([], (), "the graph embeds tokens; positions play no part")
    findings = checked.findings + check_inputs_used(flow, strict, may_be_idle=checked.may_be_idle)
    findings += check_standard_ops(flow, strict)
    report = Report(
        subject=subject,
        kind=kind,
        strict=strict,
        attention_layers=checked.layers,
        rules=(*checked.rules, *GENERAL_RULES),
        verdict=verdict_of(findings, good=checked.good),
    )
    if not question.prove:
        return report
    if kind != "decoder" or is_staged(flow):
        return report.with_proof(_NOT_RUN)
    proof = prove_by_running(source, flow, checked.ids, tokens=checked.tokens, fades=checked.fades)
    return report.with_proof(proof)


_NOT_RUN = Proof(
    outcome="not run here", sentence="only a decoder that keeps all its tokens can be run with other ids"
)


@dataclass(frozen=True)
class _Checked:
    """What the rules of one kind of graph found.

    Attributes:
        findings: of the rules of that kind.
        rules: those rules.
        good: the reason for the verdict where nothing breaks the ids.
        layers: attention operations found.
        may_be_idle: inputs that need not reach an output.
        ids: the position-ids input of a decoder; None where the caller hands in the angles.
        tokens: the inputs of a decoder that carry its tokens.
        fades: whether a decoder's attention may fall with distance, in place of a rotary embedding.
    """

    findings: list[Finding]
    rules: tuple[Rule, ...]
    good: str
    layers: int = 0
    may_be_idle: tuple[str, ...] = ()
    ids: ir.Value | None = None
    tokens: tuple[ir.Value, ...] = ()
    fades: bool = False


def _check_decoder(
    subject: str,
    flow: Flow,
    strict: bool,
    ids_input: str,
    policy: PositionPolicy,
    mask: AttentionMask | None,
) -> _Checked:
    decoder = read_decoder(flow, ids_input)
    if not decoder.sites:
        raise LintError(
            "is taken for a decoder but holds no attention that lint recognises",
            subject=subject,
            hint="give the decoder graph, or say what the graph is (--kind)",
        )
    renumbers = is_staged(flow) and policy is not PositionPolicy.GAP
    # The verdict names the first finding: ids dropped by another index are the cause of rotary embeddings not found.
    findings = check_kept_inside(
        flow,
        decoder.stages,
        keeps_ids=policy is PositionPolicy.GAP,
        sorted_wanted=policy.keeps_raster_order,
    )
    findings += check_decoder(decoder, strict, renumbers=renumbers) + check_out_of_sight(decoder)
    findings += check_cache(flow, strict)
    mask = mask or declared_mask(flow)
    if strict and mask is not None and not is_staged(flow):
        findings += check_mask(decoder, mask)
    good = f"later stages number tokens by slot, as the policy {policy} asks"
    return _Checked(
        findings,
        (*DECODER_RULES, SEES, CACHE, FOLLOW),
        good if renumbers else _good_decoder(decoder),
        len(decoder.sites),
        ids=None if decoder.caller_rows is not None else decoder.ids,
        tokens=tuple(value for value in flow.inputs if flow.bit(value) & decoder.tokens),
        fades=decoder.has_bias,
    )


def _check_vision(flow: Flow, policy: PositionPolicy) -> _Checked:
    prunes = any(v.name == KEPT for v in flow.outputs)
    good = "kept_indices say which tokens survived" if prunes else "the graph prunes nothing"
    return _Checked(check_vision(flow, sorted_wanted=policy.keeps_raster_order), (ASCENDING,), good)


def _check_splice(flow: Flow, policy: PositionPolicy) -> _Checked:
    if policy is PositionPolicy.GAP:
        return _Checked(check_splice(flow), (SPLICED,), "position_ids are computed from kept_indices")
    # Renumbered ids count the survivors; which ones survived plays no part.
    return _Checked([], (), f"ids are renumbered, as the policy {policy} asks", may_be_idle=(KEPT,))


def _good_decoder(decoder: Decoder) -> str:
    layers = f"all {len(decoder.sites)} attention layers" if len(decoder.sites) > 1 else "the attention layer"
    if decoder.caller_rows is not None:
        return (
            f"the caller computes the rotary rows ({decoder.caller_rows}): feed those of the tokens' own ids"
        )
    name = decoder.ids.name if decoder.ids is not None else "position_ids"
    if decoder.absolute:
        return f"{name} select learned absolute positions, token by token"
    rotated = sum(1 for queries, keys in decoder.rotary if queries or keys)
    if rotated < len(decoder.sites):
        layers = f"{rotated} of {len(decoder.sites)} attention layers"
    return f"{name} reach the rotary angles of {layers}, token by token"
