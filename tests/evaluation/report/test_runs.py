"""Which evaluations a page is about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.report.runs import open_subject, provenance_facts

from .conftest import LIMIT, gap_export


def test_evaluations_in_the_order_given(evaluated: Path) -> None:
    subject = open_subject([evaluated / "torch", evaluated / "ort"], "unc")
    assert [run.backend for run in subject.runs] == ["torch", "onnxruntime"]
    assert (subject.first.name, subject.candidate.name) == ("torch", "ort")
    assert subject.candidate.positions == "gap"
    assert subject.candidate.bundle is not None
    answer = subject.candidate.answers[subject.candidate.run.ids[0]]
    assert len(answer.kept_indices) == subject.candidate.bundle.manifest.pruning.kept
    assert subject.candidate.median_seconds > 0
    facts = provenance_facts(subject.candidate)
    assert {"manifest sha256", "versions", "protocol", "annotations", "processor"} <= facts.keys()


def test_a_bundle_brings_its_evaluations(recommended: Path) -> None:
    subject = open_subject([recommended], "unc")
    kept = [run.run.record["mean_kept"] for run in subject.runs]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) == 3
    assert subject.candidate.settings is not None
    assert subject.candidate.settings.keep == 0.3, "the share that was recommended"
    assert subject.first.recommendation is not None
    assert subject.runs[0].positions == "gap"


def test_evaluations_of_other_expressions_are_named(recommended: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(recommended, bundle)
    gap_export("eval", bundle, *LIMIT[:2], "--limit", 3, "--threads", 1, "--keep", 0.8)
    broken = bundle / "reports" / "eval" / "unfinished"
    broken.mkdir()
    subject = open_subject([bundle], "unc")
    assert len(subject.runs) == 3
    assert subject.left_out["scenes-3-all-onnxruntime-keep0.8"] == "answers other expressions"
    assert "holds no finished evaluation" in subject.left_out["unfinished"]


def test_runs_that_do_not_compare(evaluated: Path, tmp_path: Path) -> None:
    gap_export("eval", evaluated / "bundle", *LIMIT[:2], "--limit", 3, "--threads", 1, "-o", tmp_path / "few")
    with pytest.raises(InputError, match="answer different expressions"):
        open_subject([evaluated / "torch", tmp_path / "few"], "unc")


def test_a_bundle_without_evaluations(evaluated: Path) -> None:
    with pytest.raises(InputError, match="has no finished evaluation under unc"):
        open_subject([evaluated / "bundle"], "unc")


def test_no_evaluation_under_that_protocol(evaluated: Path) -> None:
    with pytest.raises(InputError, match="holds no finished evaluation under lmms-eval"):
        open_subject([evaluated / "ort"], "lmms-eval")


def test_a_bundle_that_was_built_anew_is_not_taken_for_the_old_one(evaluated: Path, tmp_path: Path) -> None:
    for name in ("bundle", "ort"):
        shutil.copytree(evaluated / name, tmp_path / name)
    path = tmp_path / "ort" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bundle": str(tmp_path / "bundle")}))
    assert open_subject([tmp_path / "ort"], "unc").candidate.bundle is not None
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name"', '"name" '))
    candidate = open_subject([tmp_path / "ort"], "unc").candidate
    assert candidate.bundle is None
    assert "was built anew since" in candidate.bundle_lacks
    shutil.rmtree(tmp_path / "bundle")
    assert "is not at" in open_subject([tmp_path / "ort"], "unc").candidate.bundle_lacks


def test_damaged_provenance_is_an_error_with_advice(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "ort", tmp_path / "ort")
    (tmp_path / "ort" / "provenance.json").write_text("{")
    with pytest.raises(InputError, match="missing or damaged") as caught:
        open_subject([tmp_path / "ort"], "unc")
    assert "what is answered is kept" in caught.value.hint


def test_damaged_settings_are_an_error_with_advice(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "ort", tmp_path / "ort")
    (tmp_path / "ort" / "settings.json").write_text('{"protocol": 3}')
    with pytest.raises(InputError, match="damaged or was written by another version") as caught:
        open_subject([tmp_path / "ort"], "unc")
    assert "--replace" in caught.value.hint
