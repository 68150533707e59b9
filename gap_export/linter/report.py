"""What a lint says: findings, a verdict on the position ids, and a report that can be stored as JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gap_export.errors import LintError
from gap_export.records import Record

Severity = Literal["error", "warning"]
GraphKind = Literal["decoder", "vision", "splice", "embed"]
Outcome = Literal["survive", "do not survive", "not run here"]
Answer = Literal["survive", "do not survive", "cannot tell", "no position ids"]


class Finding(Record):
    """One thing that is wrong with a graph, said once however many nodes share it.

    Attributes:
        rule: the stable id of the rule.
        severity: `error` stops a build; `warning` is worth knowing.
        breaks_ids: gapped position ids do not survive because of this, or cannot be said to.
        certain: False where lint cannot tell, because something reads the ids out of its sight.
        node: name of the first node (or graph input or output) that shows it.
        count: how many nodes show it.
        sentence: what is wrong.
        hint: what to do about it.
    """

    rule: str
    severity: Severity
    breaks_ids: bool
    certain: bool = True
    node: str
    count: int = 1
    sentence: str
    hint: str

    def __str__(self) -> str:
        others = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{self.severity} {self.rule}: {self.node}{others}: {self.sentence} ({self.hint})"


class Rule(Record):
    """A rule that was checked.

    Attributes:
        id: stable identifier.
        title: the rule as one sentence.
    """

    id: str
    title: str


class Verdict(Record):
    """Whether gapped position ids survive this graph.

    Attributes:
        survives: the ids that a caller feeds are the ids that RoPE uses, token by token. False where lint cannot tell.
        answer: `cannot tell` where an operator that lint does not know reads the ids or turns queries and keys; `no position ids`
            where a graph goes by a decoder's name and is a vision tower or an embedding.
        reason: one line.
        findings: everything the rules found, errors first.
    """

    survives: bool
    answer: Answer
    reason: str
    findings: tuple[Finding, ...]


class Proof(Record):
    """What running the graph showed.

    Attributes:
        outcome: `survive` only where it was measured.
        sentence: what was measured, or why nothing was.
        moved: the largest change of a logit by gaps, as a share of the largest logit; None where nothing was measured.
        whole: whether survivors were compared with the whole sequence, the others hidden by a mask. Where no input hides tokens, an
            angle that follows the id and the place in the sequence at once is not noticed.
        runs: of the graph.
    """

    outcome: Outcome
    sentence: str
    moved: Annotated[float, Field(allow_inf_nan=True)] | None = None
    whole: bool = False
    runs: int = 0


class Report(Record):
    """The result of linting one graph.

    Attributes:
        subject: file name, or the name of a graph in memory.
        kind: which kind of graph it was taken for.
        strict: whether it was held to the contract of this project's bundles.
        attention_layers: number of attention operations found (decoder only, otherwise 0).
        rules: what was checked.
        verdict: the answer.
        proof: what running it showed, where that was asked for.
    """

    subject: str
    kind: GraphKind
    strict: bool
    attention_layers: int
    rules: tuple[Rule, ...]
    verdict: Verdict
    proof: Proof | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything the rules found, errors first."""
        return self.verdict.findings

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop an export."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are worth knowing."""
        return tuple(f for f in self.findings if f.severity == "warning")

    def with_proof(self, proof: Proof) -> Report:
        """This report, and what running the graph showed; what lint could not tell is then what was measured.

        Raises:
            LintError: the measurement contradicts the verdict.
        """
        said = self.verdict.answer
        if proof.outcome == "not run here" or proof.outcome == said:
            return self.model_copy(update={"proof": proof})
        if said == "do not survive" and not proof.whole:
            return self.model_copy(update={"proof": proof})  # the measurement sees less than was read
        if said != "cannot tell":
            raise LintError(
                f"THE VERDICT IS WRONG: read from the graph, gapped ids {said} ({self.verdict.reason}); run in ONNX Runtime, "
                f"they {proof.outcome}: {proof.sentence}",
                subject=self.subject,
                hint="trust the measurement, and report the graph: one of the two has a fault",
            )
        survives = proof.outcome == "survive"
        findings = self.findings
        if survives:  # what could not be told has been measured
            findings = tuple(
                f if f.certain else f.model_copy(update={"severity": "warning", "breaks_ids": False})
                for f in findings
            )
        reason = f"measured: {proof.sentence}; read from the graph: {self.verdict.reason}"
        verdict = Verdict(survives=survives, answer=proof.outcome, reason=reason, findings=findings)
        return self.model_copy(update={"verdict": verdict, "proof": proof})

    def raise_for_errors(self) -> None:
        """Accept the graph or refuse it.

        Raises:
            LintError: there is at least one error.
        """
        if self.errors:
            first = self.errors[0]
            others = f"; and {len(self.errors) - 1} more" if len(self.errors) > 1 else ""
            raise LintError(
                f"[{first.rule}] {first.node}: {first.sentence}{others}",
                subject=self.subject,
                hint=first.hint,
            )


def merge(findings: list[Finding]) -> tuple[Finding, ...]:
    """Say each thing once: equal rule and sentence become one finding with a count; breaking ones and errors first."""
    merged: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.rule, finding.severity, finding.sentence)
        seen = merged.get(key)
        merged[key] = (
            finding if seen is None else seen.model_copy(update={"count": seen.count + finding.count})
        )
    order = {key: (not f.breaks_ids, not f.certain, f.severity != "error") for key, f in merged.items()}
    return tuple(merged[key] for key in sorted(merged, key=lambda key: order[key]))


def verdict_of(findings: list[Finding], *, good: str) -> Verdict:
    """The verdict that follows from the findings.

    Args:
        findings: of all rules.
        good: the reason to give when nothing breaks the ids.
    """
    ordered = merge(findings)
    breaking = [f for f in ordered if f.breaks_ids]
    if breaking:
        first = breaking[0]
        others = f"; and {len(breaking) - 1} other reasons" if len(breaking) > 1 else ""
        reason = f"{first.node}: {first.sentence}{others}"
        answer: Answer = "do not survive" if first.certain else "cannot tell"
        return Verdict(survives=False, answer=answer, reason=reason, findings=ordered)
    errors = [f for f in ordered if f.severity == "error"]
    aside = f"; apart from the ids: {errors[0].sentence}" if errors else ""
    return Verdict(survives=True, answer="survive", reason=good + aside, findings=ordered)
