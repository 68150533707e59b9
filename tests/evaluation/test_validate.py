"""Validation of bundles that are not the usual ones, baselines really built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.bundle.hashes import record_of
from gap_export.errors import InputError
from gap_export.evaluation import validate
from gap_export.evaluation.parity import ParityReport
from gap_export.pipeline.build import BuildResult, build
from gap_export.recipe.recipe import Recipe
from tests.recorded import Recorded

pytestmark = pytest.mark.slow

BuildBundle = Callable[..., Bundle]


def report_of(folder: Path, **options: Any) -> tuple[ParityReport, Recorded]:
    told = Recorded()
    report = validate.validate(folder, threads=1, progress=told, **options)
    assert report == ParityReport.model_validate_json((folder / "reports" / "parity.json").read_text())
    return report, told


def test_a_bundle_with_no_slot_to_spare_is_validated(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    """Its baseline that keeps every token needs more slots than were asked for."""
    tight = Recipe.model_validate({**tiny_options, "capacity": 24 - 1 + 9 + 5 + 1})
    folder = build(tight, tmp_path / "tight", golden=False).bundle.folder
    report, told = report_of(folder, limit=3, batch=2)
    assert report.ok, report
    assert [sum(told.counts)] == told.totals == [validate.validation_work(3)]
    report.raise_for_gates()
    assert report.manifest_sha256 == record_of(folder / "manifest.json").sha256
    assert len(report.controls) == 5
    assert report.grounding.kept == 9
    assert [path.name for path in tmp_path.iterdir()] == ["tight"], "baselines are gone"


@pytest.fixture
def no_baselines(monkeypatch: pytest.MonkeyPatch, tiny_bundle: BuildBundle) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(validate, "_baseline", lambda *_: nullcontext(tiny_bundle()))


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize(
    ("changes", "controls"),
    [
        ({"pruner": "none", "keep": 1.0}, {"ids permuted", "two ids swapped", "write index off by one"}),
        ({"positions": "shifted"}, {"ids permuted", "two ids swapped", "write index off by one"}),
        ({"keep": 0.02}, {"ids shifted", "decoding continues at kept length", "write index off by one"}),
    ],
    ids=["nothing pruned", "shifted", "one token"],
)
def test_controls_that_would_change_nothing_are_not_held_against_a_bundle(
    changes: dict[str, Any], controls: set[str], tiny_bundle: BuildBundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle(**changes).folder, tmp_path / "bundle"))
    report, _ = report_of(folder, limit=4)
    assert {control.name for control in report.controls} == controls
    assert len(report.controls) + len(report.inapplicable_controls) == 5
    assert report.ok, report


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("pruner", ["fastv", "pyramiddrop", "sparsevlm"])
def test_decoders_that_drop_tokens_are_validated(
    pruner: str, deep_bundle: BuildBundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(deep_bundle(pruner=pruner, positions="gap").folder, tmp_path / "bundle"))
    report, _ = report_of(folder, limit=6, batch=3)
    assert report.ok, report
    assert report.inapplicable_controls == ["ids shifted"]
    assert {"last stage's write index off by one", "one slot counter for all stages"} < {
        control.name for control in report.controls
    }
    assert report.measurement.kept_sets_equal == report.measurement.position_ids_equal == 1.0
    assert report.grounding.kept == 9


def test_baselines_leave_out_what_only_the_pruner_knows(
    deep_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole decoder has no layer to prune before."""
    bundle = deep_bundle(pruner="fastv", prune_layers=(3,), keep=0.1)
    asked: list[Recipe] = []

    def build(recipe: Recipe, out: Path, **_: Any) -> Any:
        asked.append(recipe)
        return BuildResult(bundle, 0, ())

    monkeypatch.setattr(validate, "build", build)
    report_of(Path(shutil.copytree(bundle.folder, tmp_path / "bundle")), limit=2)
    assert [(r.pruner, str(r.positions), r.prune_layers) for r in asked] == [
        ("none", "gap", ()), ("fastv", "shifted", (3,)), ("fastv", "permuted", (3,))
    ]  # fmt: skip


@pytest.mark.usefixtures("no_baselines")
def test_batches_that_do_not_divide_the_control_cases(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "CONTROL_CASES", 5)
    report, _ = report_of(bundle_copy, limit=8, batch=4)
    assert report.ok, report
    monkeypatch.setattr(validate, "CONTROL_CASES", 2)
    assert report_of(bundle_copy, limit=5, batch=4)[0].ok


def test_baselines_take_the_ranges_that_the_bundle_brings(
    tiny_options: dict[str, Any],
    tiny_bundle: BuildBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file that it was built with may be gone by then."""
    from contextlib import nullcontext

    from gap_export.evaluation.calibrate import calibrate
    from gap_export.recipe.ranges import read_ranges

    file = tmp_path / "ranges.json"
    file.write_text(calibrate(tiny_bundle().folder, limit=1, threads=1).model_dump_json())
    recipe = Recipe.model_validate({**tiny_options, "precision": "fp8", "ranges": str(file)})
    bundle = build(recipe, tmp_path / "bundle", golden=False).bundle
    asked: list[Recipe] = []

    def baseline(_bundle: Bundle, changed: Recipe, *_: Any) -> Any:
        asked.append(changed)
        return nullcontext(bundle)

    monkeypatch.setattr(validate, "_baseline", baseline)
    expected = read_ranges(file)
    file.unlink()
    report_of(bundle.folder, limit=2)
    assert len(asked) == 3
    assert all(read_ranges(Path(str(each.ranges))) == expected for each in asked)


def test_a_text_tower_that_nothing_reads_is_refused(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="and this one has"):
        validate.validate(tiny_bundle(), limit=1, text_tower=tmp_path / "tower")
