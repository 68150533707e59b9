"""Pruners and shares together: every number is that of an ordinary bundle, and a run can be interrupted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, GapExportError, InputError, MissingRequirementError, SessionError
from gap_export.evaluation.recommend import run
from gap_export.evaluation.recommend.bundle import recommend
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.recommend.times import WARMUP
from gap_export.evaluation.refer import run as answering
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.evaluate import evaluate
from gap_export.evaluation.refer.results import open_run
from tests.evaluation.recommend.conftest import LIMIT, REQUESTS, Made, RequestOf
from tests.recorded import Recorded

pytestmark = pytest.mark.slow

POINTS = ["none-keep1.0", "random-keep0.5", "random-keep0.25", "divprune-keep0.5", "divprune-keep0.25"]


def answers(folder: Path) -> list[str]:
    return [row.answer for row in open_run(folder).rows]


# Before the long part


def test_what_is_checked_before_the_long_part(
    request_of: RequestOf, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GapExportError, match="is not a folder"):
        run.prepare(request_of({"checkpoint": "/not/there"}), scenes, out)
    with pytest.raises(InputError, match="protocol"):
        run.prepare(request_of(protocol="other"), scenes, out)
    without_images = Dataset("words", "x", scenes.expressions, None)
    with pytest.raises(InputError, match="brings no images"):
        run.prepare(request_of(), without_images, out)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match=r"not installed.*--no-plot"):
        run.prepare(request_of(), scenes, out)
    assert not list(tmp_path.iterdir())
    assert run.prepare(request_of(), scenes, out, plot=False).points


def test_a_folder_belongs_to_one_set_of_settings(
    request_of: RequestOf, scenes: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run.prepare(request_of(), scenes, out)
    run.prepare(request_of(pruners=("dart",), keeps=(0.4,)), scenes, out)  # other points of the same settings
    with pytest.raises(BundleError, match="holds another recommendation: limit 6 there, 7 here"):
        run.prepare(request_of(limit=7), scenes, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("work of three years")
    with pytest.raises(BundleError, match="holds no recommendation"):
        run.prepare(request_of(), scenes, tmp_path / "other", replace=True)


# Numbers


def test_every_point_is_that_of_an_ordinary_bundle(
    made: Made, scenes: Dataset, tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Evaluated apart; and the record of one bundle says of its shares what the record of many says of them."""
    bundle = tmp_path / "bundle"
    source = tiny_bundle(pruner="divprune", keep="0.25:0.5").folder
    shutil.copytree(source, bundle, ignore=shutil.ignore_patterns("reports"))
    alone = recommend(bundle, scenes, keeps=(0.5, 0.25), limit=LIMIT, requests=REQUESTS, threads=1)
    assert type(alone) is type(made.record)
    together = {(point.pruner, point.keep): point for point in made.record.points}
    for point in alone.points:
        same = together["divprune", point.keep]
        assert (point.accuracy, point.mean_kept) == (same.accuracy, same.mean_kept)
        folder = bundle.with_name("bundle.runs") / f"scenes-3-all-gap-onnxruntime-keep{point.keep:g}"
        assert answers(folder) == answers(made.folder / "evaluations" / f"divprune-keep{point.keep}")
    assert (alone.expressions, alone.protocol) == (made.record.expressions, made.record.protocol)
    whole = evaluate(tiny_bundle(pruner="none", keep=1.0), scenes, out=tmp_path / "whole", limit=LIMIT)
    assert answers(whole.folder) == answers(made.folder / "evaluations" / "none-keep1.0")


def test_what_the_record_says(made: Made) -> None:
    assert [f"{point.pruner}-keep{point.keep}" for point in made.record.points] == POINTS
    assert [point.mean_kept for point in made.record.points] == [36, 18, 9, 18, 9]
    assert made.record.expressions == LIMIT
    assert len({point.manifest_sha256 for point in made.record.points}) == 3, "one bundle per pruner"
    assert all(point.ttft_ms and point.speedup for point in made.record.points)
    first = made.record.points[0]
    assert (first.speedup, first.difference, first.inside) == (1.0, 0.0, True)
    for point in made.record.points:
        assert point.speedup == pytest.approx(first.time_ms / point.time_ms)


def test_what_lies_in_the_folder(made: Made) -> None:
    names = sorted(
        path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()
    )
    evaluation = (
        "answers.jsonl", "files.json", "provenance.json", "settings.json", "unc-eval.json", "unc-results.parquet",
    )  # fmt: skip
    assert names == sorted(
        [
            *("files.json", "recommend.json", "recommend.png", "settings.json"),
            *(f"points/{name}.json" for name in POINTS),
            *(f"evaluations/{name}/{file}" for name in POINTS for file in evaluation),
        ]
    )
    assert Recommendation.read(made.folder / "recommend.json", hint="") == made.record
    assert [path.name for path in made.folder.parent.iterdir()] == ["undisturbed"], "bundles are gone"


def test_progress_counts_every_answer_and_every_round(made: Made) -> None:
    total = len(POINTS) * LIMIT + 3 * (WARMUP + REQUESTS)
    assert made.progress.totals == [total]
    assert sum(made.progress.counts) == total
    assert "divprune, keep 0.25:0.5: measuring" in made.progress.messages


# Interrupted and resumed


class Stopped(Exception):
    """Somebody stopped it."""


def stopping_in(stage: str) -> Recorded:
    """Stops at the second report of progress of a stage."""
    counts: list[int] = []

    def stop(recorded: Recorded) -> None:
        if recorded.messages[-1] == stage:
            counts.append(len(recorded.counts))
            if counts[-1] == counts[0] + 2:
                raise Stopped

    return Recorded(then=stop)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Expressions that were answered now, image by image."""
    counts: list[int] = []
    answer_rows = answering.answer_rows

    def counted(*args: Any) -> Any:
        rows = answer_rows(*args)
        counts.append(len(rows))
        return rows

    monkeypatch.setattr(answering, "answer_rows", counted)
    return counts


def test_an_interrupted_run_resumes_and_asks_nothing_twice(
    made: Made, request_of: RequestOf, scenes: Dataset, tmp_path: Path, asked: list[int]
) -> None:
    """Interrupted while a second bundle is asked, and while that is measured."""
    out = tmp_path / "out"
    for stage in ("random, keep 0.25: answering", "random, keep 0.25:0.5: measuring"):
        with pytest.raises(Stopped):
            run.run(run.prepare(request_of(), scenes, out), progress=stopping_in(stage))
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "no bundle is left behind"
        assert [path.stem for path in (out / "points").iterdir()] == ["none-keep1.0"]
        assert not (out / "recommend.json").exists()
    record = run.run(run.prepare(request_of(), scenes, out))
    assert sum(asked) == len(POINTS) * LIMIT
    for one, other in zip(record.points, made.record.points, strict=True):
        assert one.manifest_sha256 == other.manifest_sha256
        assert (one.label, one.accuracy, one.low, one.mean_kept) == (
            other.label, other.accuracy, other.low, other.mean_kept,
        )  # fmt: skip


@pytest.fixture
def finished(made: Made, tmp_path: Path) -> Path:
    """A copy of the whole folder."""
    folder = tmp_path / "finished"
    shutil.copytree(made.folder, folder)
    return folder


def test_a_finished_run_measures_nothing_anew(
    made: Made,
    finished: Path,
    request_of: RequestOf,
    scenes: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "build", None)
    prepared = run.prepare(request_of(), scenes, finished)
    assert run.run(prepared) == made.record
    stricter = run.run(run.prepare(request_of(), scenes, finished), max_accuracy_drop=0.5)
    assert stricter.points[0].ttft_ms == made.record.points[0].ttft_ms
    assert stricter.max_accuracy_drop == 0.5


def test_more_shares_are_added(
    made: Made, finished: Path, request_of: RequestOf, scenes: Dataset, asked: list[int]
) -> None:
    """Of another bundle, as that of before had no such share; what was finished stays as it is."""
    request = request_of(pruners=("divprune",), keeps=(0.5, 0.25, 0.1))
    record = run.run(run.prepare(request, scenes, finished))
    assert sum(asked) == LIMIT
    before = {point.label: point.ttft_ms for point in made.record.points}
    after = {point.label: point.ttft_ms for point in record.points}
    assert list(after) == ["none, keep 1", *(f"divprune, keep {keep}" for keep in (0.5, 0.25, 0.1))]
    assert before.items() >= {(label, time) for label, time in after.items() if label in before}


def test_an_error_names_its_bundle(
    request_of: RequestOf, scenes: Dataset, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = run.build

    def refuses(recipe: Any, *args: Any, **options: Any) -> Any:
        if recipe.pruner == "dart":
            raise SessionError("was refused", subject="vision.onnx", hint="mend it")
        return build(recipe, *args, **options)

    monkeypatch.setattr(run, "build", refuses)
    with pytest.raises(SessionError) as caught:
        run.run(run.prepare(request_of(pruners=("dart",)), scenes, finished))
    assert caught.value.subject == "dart, keep 0.25:0.5: vision.onnx"


def test_the_error_of_the_unpruned_bundle_names_it(
    request_of: RequestOf, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise SessionError("was refused", subject="vision.onnx", hint="mend it")

    monkeypatch.setattr(run, "build", refuses)
    with pytest.raises(SessionError) as caught:
        run.run(run.prepare(request_of(), scenes, tmp_path / "out"))
    assert caught.value.subject == "none, keep 1: vision.onnx"


def test_a_bundle_that_cannot_be_built_is_left_out_and_tried_again(
    request_of: RequestOf, scenes: Dataset, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, told = run.build, []

    def refuses(recipe: Any, *args: Any, **options: Any) -> Any:
        if recipe.pruner == "dart":
            raise SessionError("was refused", subject="vision.onnx", hint="mend it")
        return build(recipe, *args, **options)

    monkeypatch.setattr(run, "build", refuses)
    request, progress = request_of(pruners=("dart", "spatial"), keeps=(0.5,)), Recorded()
    record = run.run(run.prepare(request, scenes, finished), progress=progress, failed=told.append)
    assert [point.label for point in record.points] == ["none, keep 1", "spatial, keep 0.5"]
    assert record.left_out is not None
    (left_out,) = record.left_out
    assert (left_out.pruner, left_out.keeps) == ("dart", (0.5,))
    assert left_out.reason == "could not be built: dart, keep 0.5: vision.onnx: was refused"
    assert told == [left_out]
    assert progress.totals == [sum(progress.counts)]
    monkeypatch.setattr(run, "build", build)
    record = run.run(run.prepare(request, scenes, finished))
    assert record.left_out == ()
    assert len(record.points) == 3


def test_a_plot_is_of_the_record_beside_it(
    made: Made, finished: Path, request_of: RequestOf, scenes: Dataset
) -> None:
    plot = finished / "recommend.png"
    run.run(run.prepare(request_of(), scenes, finished, plot=False), plot=False)
    assert plot.read_bytes() == (made.folder / "recommend.png").read_bytes(), "the same record"
    run.run(run.prepare(request_of(), scenes, finished, plot=False), plot=False, max_accuracy_drop=0.5)
    assert not plot.exists()
    run.run(run.prepare(request_of(), scenes, finished), max_accuracy_drop=0.5)
    assert plot.exists()


def test_what_is_damaged_is_known_before_anything_is_built(
    request_of: RequestOf, scenes: Dataset, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build", None)
    shutil.rmtree(finished / "evaluations" / "random-keep0.5")
    request = request_of(pruners=("random", "dart"))
    with pytest.raises(BundleError, match="holds no finished evaluation under unc"):
        run.run(run.prepare(request, scenes, finished))


# What was changed by hand


def test_a_changed_evaluation_is_not_believed(request_of: RequestOf, scenes: Dataset, finished: Path) -> None:
    record = finished / "evaluations" / "random-keep0.5" / "unc-eval.json"
    record.write_text(record.read_text().replace('"accuracy": 0', '"accuracy": 1'))
    for replace in (False, True):
        with pytest.raises(
            BundleError, match=r"changed since they were written: evaluations/random-keep0\.5"
        ):
            run.prepare(request_of(limit=LIMIT - 1), scenes, finished, replace=replace)


def test_an_evaluation_that_is_gone_is_named(request_of: RequestOf, scenes: Dataset, finished: Path) -> None:
    shutil.rmtree(finished / "evaluations" / "random-keep0.5")
    with pytest.raises(BundleError, match="holds no finished evaluation under unc") as caught:
        run.run(run.prepare(request_of(), scenes, finished))
    assert "points/random-keep0.5.json" in caught.value.subject
    assert "delete it" in caught.value.hint


def test_a_point_of_another_evaluation_is_not_believed(
    request_of: RequestOf, scenes: Dataset, finished: Path
) -> None:
    evaluations = finished / "evaluations"
    shutil.rmtree(evaluations / "random-keep0.5")
    shutil.copytree(evaluations / "divprune-keep0.5", evaluations / "random-keep0.5")
    with pytest.raises(BundleError, match="is of another evaluation"):
        run.run(run.prepare(request_of(), scenes, finished))


def test_a_time_that_was_changed_is_not_believed(
    request_of: RequestOf, scenes: Dataset, finished: Path
) -> None:
    point = finished / "points" / "random-keep0.5.json"
    content = json.loads(point.read_text())
    point.write_text(json.dumps(content | {"ttft_ms": content["ttft_ms"] / 2}) + "\n")
    with pytest.raises(BundleError, match=r"changed since they were written: points/random-keep0\.5"):
        run.prepare(request_of(), scenes, finished)
