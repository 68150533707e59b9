"""The fastest runtime: chosen from a record of this build on this processor, and from nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gap_export as gap
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.cli.app import app
from gap_export.environment import cpu_name
from gap_export.errors import InputError
from gap_export.evaluation.bundle_reports import BENCH
from gap_export.evaluation.latency.record import BenchRecord, Percentiles, Row

ZERO = Percentiles(p50=0.0, p90=0.0, p99=0.0)


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    folder = shutil.copytree(
        tiny_bundle().folder, tmp_path / "a bundle", ignore=shutil.ignore_patterns("reports")
    )
    return open_bundle(folder)


def row(bundle: Bundle, backend: str, total_ms: float, **changes: Any) -> Row:
    given = {
        "name": backend,
        "manifest_sha256": bundle.manifest_sha256,
        "backend": backend,
        "precision": "fp32",
        "positions": "gap",
        "pruner": "random",
        "keep": 0.25,
        "kept": 9,
        "visual_tokens": 36,
        "batch": 1,
        "prompt_slots": 20,
        "capacity": 48,
        "cache_bytes": 1,
        "new_tokens": 5,
        **dict.fromkeys(("encode_ms", "splice_ms", "prefill_ms", "ttft_ms", "tpot_ms"), ZERO),
        "total_ms": Percentiles(p50=total_ms, p90=total_ms, p99=total_ms),
    }
    return Row.model_validate({**given, **changes})


def measured(bundle: Bundle, *rows: Row, **changes: Any) -> None:
    record = BenchRecord(
        manifest_sha256=bundle.manifest_sha256,
        device=cpu_name(),
        versions={},
        requests=30,
        warmup=1,
        peak_rss_bytes=None,
        rows=rows,
        ratios=(),
    )
    record.model_copy(update=changes).write(bundle.reports / BENCH)


def test_the_smallest_median_of_a_whole_request(bundle: Bundle) -> None:
    measured(
        bundle,
        row(bundle, "onnxruntime", 9.0),
        row(bundle, "openvino:bf16", 4.0),
        row(bundle, "openvino", 6.0),
    )
    chosen = gap.fastest_backend(bundle)
    assert chosen.backend == "openvino:bf16"
    assert chosen.reason == (
        "a request took 4 ms, and 6 ms in openvino (30 requests each, 9 of 36 visual tokens)"
    )


@pytest.mark.parametrize(
    ("others", "changes", "reason"),
    [
        ([], {}, "one runtime is no choice"),
        ([{"backend": "torch"}], {}, "one runtime is no choice"),
        ([{"backend": "a runtime of somebody"}], {}, "one runtime is no choice"),
        ([{"manifest_sha256": "of another bundle"}], {}, "one runtime is no choice"),
        ([{"manifest_sha256": None}], {}, "one runtime is no choice"),
        ([{"keep": 1.0}], {}, "one runtime is no choice"),
        ([{"batch": 8}], {}, "one runtime is no choice"),
        ([{}], {"device": "another [/red]\n processor"}, r"it was measured on another [/red]\n processor, not here"),
        ([{}], {"manifest_sha256": "another build"}, "this build was not measured"),
    ],
)  # fmt: skip
def test_what_was_not_measured_here_decides_nothing(
    bundle: Bundle, others: list[dict[str, Any]], changes: dict[str, Any], reason: str
) -> None:
    faster = [row(bundle, **{"backend": "openvino", "total_ms": 1.0, **other}) for other in others]
    measured(bundle, row(bundle, "onnxruntime", 9.0), *faster, **changes)
    chosen = gap.fastest_backend(bundle.folder)
    assert chosen.backend == "onnxruntime"
    assert reason in chosen.reason
    assert f"gap-export bench '{bundle.folder}' --backend onnxruntime,openvino" in chosen.reason


def test_a_bundle_that_was_never_measured(bundle: Bundle) -> None:
    assert gap.fastest_backend(bundle).backend == "onnxruntime"
    bundle.reports.mkdir()
    (bundle.reports / BENCH).write_text(json.dumps({"manifest_sha256": bundle.manifest_sha256}))
    with pytest.raises(InputError, match=r"bench\.json"):
        gap.fastest_backend(bundle)


def test_commands_say_what_was_chosen(bundle: Bundle, image_file: Path) -> None:
    measured(bundle, row(bundle, "onnxruntime", 4.0), row(bundle, "openvino", 6.0))
    asked = [
        "run",
        str(bundle.folder),
        "--image",
        str(image_file),
        "--refer",
        "the red mug",
        "--backend",
        "auto",
    ]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    assert "backend onnxruntime: a request took 4 ms, and 6 ms in openvino" in ran.stderr


@pytest.mark.parametrize("arguments", [
    ["run", "{bundle}", "--image", "{image}", "--refer", "x", "--device", "cpu"],
    ["run", "{bundle}", "--image", "{image}", "--refer", "x", "--precision-hint", "f32"],
    ["sweep", "--model", "shapes"],
    ["bench", "{bundle}"],
], ids=lambda arguments: " ".join(arguments[::len(arguments) - 1]))  # fmt: skip
def test_where_there_is_nothing_to_choose(bundle: Bundle, image_file: Path, arguments: list[str]) -> None:
    named = [each.format(bundle=bundle.folder, image=image_file) for each in arguments]
    ran = CliRunner().invoke(app, [*named, "--backend", "auto"])
    assert isinstance(ran.exception, gap.errors.SessionError)
    assert "--backend auto" in str(ran.exception)
