"""Records among the reports of a bundle: they outlive a rebuild, and are used for the build alone that they were taken on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import open_bundle
from gap_export.errors import InputError
from gap_export.evaluation.bundle_reports import CURRENT, STALE, UNREADABLE, read_report, states
from gap_export.evaluation.latency.record import BenchRecord
from gap_export.evaluation.report.terminal import bundle_facts
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import Recipe


def record_on(folder: Path) -> BenchRecord:
    return BenchRecord(
        manifest_sha256=open_bundle(folder).manifest_sha256,
        device="cpu",
        versions={},
        requests=1,
        warmup=0,
        peak_rss_bytes=None,
        rows=(),
        ratios=(),
    )


def test_reports_outlive_a_rebuild_and_are_stale_from_then_on(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    bundle = build(Recipe.model_validate(tiny_options), out, golden=False).bundle
    record = record_on(out)
    record.write(bundle.reports / "bench.json")
    assert read_report(bundle, "bench.json", BenchRecord, command="bench") == record
    assert bundle_facts(bundle)["reports"] == {"bench.json": CURRENT}

    other = Recipe.model_validate({**tiny_options, "keep": 0.5})
    rebuilt = build(other, out, replace=True, golden=False).bundle
    assert BenchRecord.read(rebuilt.reports / "bench.json", hint="") == record, "it is still there"
    assert not any("reports" in name for name in rebuilt.manifest.files), "and in no manifest"
    assert rebuilt.manifest_sha256 != bundle.manifest_sha256
    assert read_report(rebuilt, "bench.json", BenchRecord, command="bench") is None
    assert bundle_facts(rebuilt)["reports"] == {"bench.json": STALE}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.fixture
def unmeasured(bundle_copy: Path) -> Path:
    """A bundle without the reports that other tests may have left in it."""
    shutil.rmtree(bundle_copy / "reports", ignore_errors=True)
    return bundle_copy


def test_what_cannot_be_read_is_said(unmeasured: Path) -> None:
    bundle = open_bundle(unmeasured)
    bundle.reports.mkdir()
    path = bundle.reports / "bench.json"
    path.write_text("{")
    assert states(bundle) == {"bench.json": UNREADABLE}
    path.write_text(json.dumps({"manifest_sha256": bundle.manifest_sha256, "requests": "many"}))
    assert states(bundle) == {"bench.json": CURRENT}
    with pytest.raises(InputError, match="run gap-export bench again"):
        read_report(bundle, "bench.json", BenchRecord, command="bench")


def test_a_bundle_without_reports(unmeasured: Path) -> None:
    bundle = open_bundle(unmeasured)
    assert states(bundle) == {}
    assert read_report(bundle, "bench.json", BenchRecord, command="bench") is None
