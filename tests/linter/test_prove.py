"""What running a decoder shows: against the verdict where both can be had, and where nothing can be measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from typer.testing import CliRunner

from gap_export.cli import app
from gap_export.errors import LintError
from gap_export.linter import Proof, Report, lint_graph

IDS = ("inputs_embeds", "position_ids", "write_index", "last_index")
MASKED = """keys_C = Range (zero, length, one) rows_Q = Unsqueeze (keys_C, ax1) columns_K = Unsqueeze (keys_C, ax0)
    causal = LessOrEqual (columns_K, rows_Q) shown = Cast <to=9> (attention_mask) shown_4 = Unsqueeze (shown, ax1)
    shown_B11K = Unsqueeze (shown_4, ax1) mask = And (causal, shown_B11K)"""


def proof_of(report: Report) -> Proof:
    assert report.proof is not None
    return report.proof


def prompt(parts: SimpleNamespace, **changes: object) -> SimpleNamespace:
    """A prompt whose mask input hides tokens."""
    baseline = {
        "mask": MASKED,
        "cache": parts.NO_CACHE,
        "present": "float[B,1,S,16]",
        "inputs": ("inputs_embeds", "position_ids", "attention_mask", "last_index"),
    }
    return parts.Small(**{**baseline, **changes})


@pytest.mark.parametrize(
    ("angles", "outcome", "words"),
    [
        ("ids", "survive", "hide no token"),
        ("range", "do not survive", "moves no logits"),
        ("first", "do not survive", "moves no logits"),
        ("clamped", "do not survive", "give the same logits"),
        ("rounded", "do not survive", "give the same logits"),
    ],
)
def test_what_is_measured_agrees_with_what_is_read(
    parts: SimpleNamespace, angles: str, outcome: str, words: str
) -> None:
    report = lint_graph(parts.Small(angles=parts.ANGLES[angles]).model(), prove=True)
    assert (report.verdict.answer, proof_of(report).outcome) == (outcome, outcome)
    assert words in proof_of(report).sentence
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("angles", "outcome"),
    [("ids", "survive"), ("summed", "do not survive"), ("range", "do not survive")],
)
def test_where_a_mask_hides_tokens_survivors_are_compared_with_the_whole_sequence(
    parts: SimpleNamespace, angles: str, outcome: str
) -> None:
    report = lint_graph(prompt(parts, angles=parts.ANGLES[angles]).model(), prove=True)
    assert (report.verdict.answer, proof_of(report).outcome) == (outcome, outcome)
    if angles != "range":
        assert proof_of(report).whole


def test_gaps_that_hide_tokens_are_seen(parts: SimpleNamespace) -> None:
    packed = parts.PACKED_MASK.replace("mask = ", "packed = ") + MASKED.replace("mask = And", "seen = And")
    report = lint_graph(prompt(parts, mask=packed + " mask = And (packed, seen)").model(), prove=True)
    assert proof_of(report).outcome == "do not survive"
    assert "see token" in proof_of(report).sentence


def test_inputs_of_a_growing_cache_are_made(parts: SimpleNamespace) -> None:
    mask = """past_1 = Shape <start=2, end=3> (past.0.key) past_0 = Squeeze (past_1) all = Add (past_0, length)
        keys_T = Range (zero, all, one) queries_Q = Range (past_0, all, one) rows_Q = Unsqueeze (queries_Q, ax1)
        columns_T = Unsqueeze (keys_T, ax0) mask = LessOrEqual (columns_T, rows_Q)"""
    changes = {"cache": parts.GROW, "past": "float[B,1,P,16]", "present": "float[B,1,T,16]", "mask": mask}
    inputs = ("inputs_embeds", "position_ids", "last_index")
    report = lint_graph(parts.Small(**changes, inputs=inputs).model(), prove=True)
    assert (report.verdict.answer, proof_of(report).outcome) == ("survive", "survive")
    # Ids counted from the least of a call lose the distance to the past alone.
    relative = parts.Small(**changes, inputs=inputs, angles=parts.ANGLES["relative"])
    assert "before token 0" in proof_of(lint_graph(relative.model(), prove=True)).sentence


def test_what_cannot_be_run_is_said_and_is_never_survival(parts: SimpleNamespace, tmp_path: Path) -> None:
    plugin = parts.Small(
        attention="a{l} = plugin.AttentionPlugin (q{l}_r, present.{l}.key, present.{l}.value, mask)"
    )
    counted = parts.Small(angles=parts.ANGLES["range"], inputs=("inputs_embeds", "write_index", "last_index"))
    for small, words in ((plugin, "AttentionPlugin"), (counted, "no position-ids input")):
        proof = proof_of(lint_graph(small.model(), prove=True))
        assert (proof.outcome, proof.moved, proof.runs) == ("not run here", None, 0)
        assert words in proof.sentence
    path = tmp_path / "decoder.onnx"
    onnx.save(
        parts.Small().proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=512
    )
    proof = proof_of(lint_graph(path, prove=True))
    assert proof.outcome == "survive", proof.sentence
    (tmp_path / "weights.bin").unlink()
    report = lint_graph(path, prove=True)
    assert (report.verdict.answer, proof_of(report).outcome) == ("survive", "not run here")


def test_a_verdict_that_is_contradicted_is_an_error(parts: SimpleNamespace) -> None:
    good = lint_graph(parts.Small().model())
    lost = Proof(outcome="do not survive", sentence="a gap moves no logits", moved=0.0, runs=1)
    with pytest.raises(LintError, match="THE VERDICT IS WRONG") as caught:
        good.with_proof(lost)
    assert "a gap moves no logits" in str(caught.value)
    bad = lint_graph(parts.Small(angles=parts.ANGLES["range"]).model())
    seen = Proof(outcome="survive", sentence="gaps move the logits", moved=1.0, whole=True, runs=1)
    with pytest.raises(LintError, match="THE VERDICT IS WRONG"):
        bad.with_proof(seen)
    assert not bad.with_proof(seen.model_copy(update={"whole": False})).verdict.survives  # it saw less


def test_what_lint_cannot_tell_is_what_was_measured(parts: SimpleNamespace) -> None:
    report = lint_graph(parts.Small(rotate="{x}_r = plugin.Turn ({x}, ids_BS)", rows="").model())
    for outcome in ("survive", "do not survive"):
        measured = report.with_proof(Proof(outcome=outcome, sentence="seen", moved=1.0, runs=1))
        assert measured.verdict.answer == outcome
        assert measured.verdict.reason.startswith("measured: seen")
        assert bool(measured.errors) == (outcome == "do not survive")
    still = report.with_proof(Proof(outcome="not run here", sentence="no such operator"))
    assert still.verdict.answer == "cannot tell"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, ("gapped ids survive", "run in ONNX Runtime")),
        ({"angles": "range"}, 1, ("gapped ids do not survive", "moves no logits")),
        ({"rotate": "{x}_r = plugin.Turn ({x}, ids_BS)", "rows": ""}, 1, ("cannot tell", "not run here")),
    ],
)
def test_the_command_says_both(
    parts: SimpleNamespace, tmp_path: Path, changes: dict[str, str], code: int, words: tuple[str, ...]
) -> None:
    changes = {k: parts.ANGLES[v] if k == "angles" else v for k, v in changes.items()}
    onnx.save(parts.Small(**changes).proto(), tmp_path / "g.onnx")
    result = CliRunner().invoke(app, ["lint", str(tmp_path / "g.onnx"), "--prove"])
    assert result.exit_code == code
    for word in words:
        assert word in result.stdout
