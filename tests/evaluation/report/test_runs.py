"""Which evaluations a page is about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.report.runs import open_runs, provenance_facts

from .conftest import LIMIT, gap_export

pytestmark = pytest.mark.slow


def test_evaluations_in_the_order_given(evaluated: Path) -> None:
    reported = open_runs([evaluated / "torch", evaluated / "ort"], "unc")
    assert [run.backend for run in reported.runs] == ["torch", "onnxruntime"]
    assert (reported.reference.name, reported.subject.name) == ("torch", "ort")
    assert reported.subject.positions == "gap"
    assert reported.subject.bundle is not None
    answer = reported.subject.answers[reported.subject.run.ids[0]]
    assert len(answer.kept_indices) == reported.subject.bundle.manifest.pruning.kept
    assert reported.subject.median_seconds > 0
    facts = provenance_facts(reported.subject)
    assert {"manifest sha256", "versions", "protocol", "annotations", "processor"} <= facts.keys()


def test_a_bundle_brings_its_evaluations(recommended: Path) -> None:
    reported = open_runs([recommended], "unc")
    kept = [run.run.record.mean_kept for run in reported.runs]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) == 3
    assert reported.subject.settings is not None
    assert reported.subject.settings.keep == 0.3, "the share that was recommended"
    assert reported.reference.recommendation is not None
    assert reported.runs[0].positions == "gap"


def test_evaluations_of_other_expressions_are_named(recommended: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(recommended, bundle)
    shutil.copytree(recommended.with_name("bundle.runs"), tmp_path / "bundle.runs")
    gap_export("eval", bundle, *LIMIT[:2], "--limit", 3, "--threads", 1, "--keep", 0.8)
    broken = tmp_path / "bundle.runs" / "unfinished"
    broken.mkdir()
    reported = open_runs([bundle], "unc")
    assert len(reported.runs) == 3
    assert reported.left_out["scenes-3-all-gap-onnxruntime-keep0.8"] == "answers other expressions"
    assert "holds no finished evaluation" in reported.left_out["unfinished"]


def test_what_was_taken_on_another_build_is_stale(recommended: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(recommended, bundle)
    shutil.copytree(recommended.with_name("bundle.runs"), tmp_path / "bundle.runs")
    assert open_runs([bundle], "unc").left_out == {}
    # What a rebuild leaves: another manifest, the same reports and runs.
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="has no finished evaluation under unc"):
        open_runs([bundle], "unc")
    gap_export("eval", bundle, *LIMIT, "--keep", 0.3, "--replace")
    reported = open_runs([bundle], "unc")
    assert [run.name for run in reported.runs] == ["scenes-3-all-gap-onnxruntime-keep0.3"]
    assert len(reported.left_out) == 2
    assert all("is stale" in why for why in reported.left_out.values())
    assert reported.subject.recommendation is None
    assert reported.subject.stale_reports == ["recommend.json"]
    gap_export("report", bundle, "-o", tmp_path / "page.html", "--no-pruners")
    assert (
        "Taken on another build of this bundle, and not shown: recommend.json"
        in (tmp_path / "page.html").read_text()
    )


def test_a_recommendation_of_several_pruners_is_not_that_of_the_bundle(
    recommended: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(recommended, bundle)
    shutil.copytree(recommended.with_name("bundle.runs"), tmp_path / "bundle.runs")
    path = bundle / "reports" / "recommend.json"
    record = json.loads(path.read_text())
    record["points"] = record["points"][:2]
    for point, pruner, time in zip(record["points"], ("none", "dart"), (8.0, 4.0), strict=True):
        point |= {"pruner": pruner, "front": pruner == "dart", "manifest_sha256": "m"}
        point |= {"ttft_ms": time, "speedup": 8.0 / time}
    path.unlink()
    path.write_text(json.dumps(record | {"chosen": 0.5, "chosen_pruner": "dart", "left_out": []}))
    with pytest.raises(InputError, match="is of several pruners"):
        open_runs([bundle], "unc")


def test_runs_that_do_not_compare(evaluated: Path, tmp_path: Path) -> None:
    gap_export("eval", evaluated / "bundle", *LIMIT[:2], "--limit", 3, "--threads", 1, "-o", tmp_path / "few")
    with pytest.raises(InputError, match="answer different expressions"):
        open_runs([evaluated / "torch", tmp_path / "few"], "unc")


def test_a_bundle_without_evaluations(evaluated: Path) -> None:
    with pytest.raises(InputError, match="has no finished evaluation under unc"):
        open_runs([evaluated / "bundle"], "unc")


def test_no_evaluation_under_that_protocol(evaluated: Path) -> None:
    with pytest.raises(InputError, match="holds no finished evaluation under lmms-eval"):
        open_runs([evaluated / "ort"], "lmms-eval")


def test_a_bundle_that_was_built_anew_is_not_taken_for_the_old_one(evaluated: Path, tmp_path: Path) -> None:
    for name in ("bundle", "ort"):
        shutil.copytree(evaluated / name, tmp_path / name)
    path = tmp_path / "ort" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bundle": str(tmp_path / "bundle")}))
    assert open_runs([tmp_path / "ort"], "unc").subject.bundle is not None
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name"', '"name" '))
    subject = open_runs([tmp_path / "ort"], "unc").subject
    assert subject.bundle is None
    assert "was built anew since" in subject.bundle_lacks
    shutil.rmtree(tmp_path / "bundle")
    assert "is not at" in open_runs([tmp_path / "ort"], "unc").subject.bundle_lacks


def test_damaged_provenance_is_an_error_with_advice(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "ort", tmp_path / "ort")
    (tmp_path / "ort" / "provenance.json").write_text("{")
    with pytest.raises(InputError, match="missing or damaged") as caught:
        open_runs([tmp_path / "ort"], "unc")
    assert "what is answered is kept" in caught.value.hint


def test_damaged_settings_are_an_error_with_advice(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "ort", tmp_path / "ort")
    (tmp_path / "ort" / "settings.json").write_text('{"protocol": 3}')
    with pytest.raises(InputError, match="damaged or was written by another version") as caught:
        open_runs([tmp_path / "ort"], "unc")
    assert "--replace" in caught.value.hint
