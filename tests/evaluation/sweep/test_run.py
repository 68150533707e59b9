"""Sweeps: which points there are, that their numbers are those of ordinary bundles, and that a sweep can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
import yaml

from gap_export import cli
from gap_export.boxes import scenes
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import ModelSpec
from gap_export.errors import GapExportError, InputError, MissingRequirementError, RecipeError, SessionError
from gap_export.evaluation import runner
from gap_export.evaluation.sweep import run as sweep
from gap_export.evaluation.sweep.record import SweepRecord
from gap_export.evaluation.sweep.request import (
    SweepRequest,
    keeps_from,
    plan_points,
    positions_from,
    pruners_from,
)
from gap_export.graph import trace
from gap_export.graph.trace_cache import Tracer
from gap_export.modeling.components import Component
from gap_export.parallel.ray import Cluster
from gap_export.pipeline.build import BuildResult, build
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder
from tests.recorded import Recorded

pytestmark = pytest.mark.slow

BuildBundle = Callable[..., Bundle]
CASES = 6
FACTS = ModelSpec(
    hidden_size=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, vocabulary=64, visual_tokens=36, grid=(6, 6), max_positions=256
)  # fmt: skip


def request_of(options: dict[str, Any], **changes: Any) -> SweepRequest:
    wanted = {"pruners": ("cls_attention",), "keeps": (0.25,), "limit": CASES, "batch": 4, **changes}
    return SweepRequest(recipe=Recipe.model_validate(options), **wanted)


# Lists


def test_lists_of_the_command_line() -> None:
    assert pruners_from(" dart, random") == ("dart", "random")
    everything = pruners_from("all")
    assert "none" not in everything
    assert {"cls_attention", "visionzip", "random"} <= set(everything)
    assert keeps_from("0.5,1,0.11") == (0.5, 1.0, 0.11)
    assert positions_from("shifted,gap") == (PositionPolicy.SHIFTED, PositionPolicy.GAP)


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (pruners_from, "cls_atention", "did you mean 'cls_attention'"),
        (pruners_from, "random,dart,random", "is listed twice"),
        (pruners_from, "", "empty entry"),
        (pruners_from, "random,", "empty entry"),
        (pruners_from, "random,none", "always measured"),
        (pruners_from, "all,random", "is not a pruner"),
        (keeps_from, "0", "above 0"),
        (keeps_from, "0.5,1.5", "above 0"),
        (keeps_from, "-0.5", "above 0"),
        (keeps_from, "nan", "above 0"),
        (keeps_from, "half", "is not a number above 0"),
        (keeps_from, "0.5,0.50", "is listed twice"),
        (keeps_from, "", "empty entry"),
        (positions_from, "gapped", "is not a position policy"),
        (positions_from, "full", "is not a position policy"),
        (positions_from, "gap,gap", "is listed twice"),
        (positions_from, " ", "empty entry"),
    ],
)
def test_lists_that_cannot_work(read: Callable[[str], Any], text: str, words: str) -> None:
    with pytest.raises((RecipeError, InputError), match=words):
        read(text)


# Points


def test_every_strategy_at_every_count_under_every_policy(tiny_options: dict[str, Any]) -> None:
    request = request_of(tiny_options, pruners=("random", "spatial"), keeps=(0.5, 0.25))
    points, skipped = plan_points(request, FACTS)
    assert not skipped
    assert (points[0].pruner, points[0].kept, points[0].positions) == ("none", 36, "full")
    assert {(point.pruner, point.kept, point.positions) for point in points[1:]} == {
        (pruner, kept, policy)
        for pruner in ("random", "spatial")
        for kept in (18, 9)
        for policy in PositionPolicy
    }
    assert len(points) == 1 + 2 * 2 * 3
    assert request.recipe_of(points[0]).pruner == "none"
    assert request.recipe_of(points[0]).positions == "gap"


def test_what_cannot_be_is_skipped_with_its_reason(tiny_options: dict[str, Any]) -> None:
    """Too few tokens for one, nothing to look at for others; the rest of the sweep is made."""
    request = request_of(
        tiny_options, pruners=("vispruner", "prumerge", "random", "trim"), keeps=(0.25, 0.02)
    )
    lacking = FACTS.model_copy(update={"missing_features": ("attention",)})
    points, skipped = plan_points(request, lacking)
    assert {(point.pruner, point.kept) for point in points[1:]} == {
        ("random", 9),
        ("random", 1),
    }
    reasons = {(each.pruner, each.kept, each.positions): each.reason for each in skipped}
    assert len(reasons) == (2 + 2 + 2) * 3
    for policy in PositionPolicy:
        assert "has no text tower" in reasons["trim", 9, policy]
        assert "needs attention" in reasons["vispruner", 9, policy]
    few = request_of(tiny_options, pruners=("visionzip",), keeps=(0.25, 0.02))
    _, skipped = plan_points(few, FACTS)
    assert len(skipped) == 3
    assert all("keeps at least 2 tokens" in each.reason and each.kept == 1 for each in skipped)


def test_points_that_are_the_same_or_that_nobody_knows(tiny_options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="keep the same 9 of 36"):
        plan_points(request_of(tiny_options, keeps=(0.25, 0.26)), FACTS)
    with pytest.raises(RecipeError, match="is not a pruner"):
        plan_points(request_of(tiny_options, pruners=("rando",)), FACTS)


def test_a_recipe_that_works_nowhere_is_refused(tiny_options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="the model knows 40"):
        plan_points(request_of(tiny_options), FACTS.model_copy(update={"max_positions": 40}))


def test_the_capacity_of_a_recipe_does_not_bind_its_points(tiny_options: dict[str, Any]) -> None:
    """What is just enough for the pruned prompt is too little for the whole one."""
    points, skipped = plan_points(request_of({**tiny_options, "capacity": 38}), FACTS)
    assert (len(points), len(skipped)) == (4, 0)


# Before the long part


def test_what_is_checked_before_the_long_part(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"limit": 0}, {"batch": 0}):
        with pytest.raises(InputError, match="from 1 to"):
            sweep.prepare(request_of(tiny_options, **changes), tmp_path / "out")
    with pytest.raises(GapExportError, match="is not a folder"):
        sweep.prepare(request_of({**tiny_options, "checkpoint": "/not/there"}), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match=r"not installed.*--no-plot"):
        sweep.prepare(request_of(tiny_options), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert sweep.prepare(request_of(tiny_options), tmp_path / "out", plot=False).remaining()


def test_strategies_that_look_at_the_expression_need_the_recipes_text_tower(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    prepared = sweep.prepare(request_of(tiny_options, pruners=("trim", "random")), tmp_path / "out")
    assert not prepared.skipped
    assert prepared.store.settings.text_tower_sha256 is not None
    without = sweep.prepare(
        request_of({**tiny_options, "text_tower": None}, pruners=("trim", "random")), tmp_path / "without"
    )
    assert {each.pruner for each in without.skipped} == {"trim"}
    assert {point.pruner for point in without.remaining()} == {"none", "random"}


def test_a_folder_belongs_to_one_checkpoint_and_one_set_of_scenes(
    tiny_options: dict[str, Any], checkpoint_copy: Path, tmp_path: Path
) -> None:
    options = {**tiny_options, "checkpoint": str(checkpoint_copy)}
    sweep.prepare(request_of(options), tmp_path / "out")
    more = request_of(options, pruners=("random",), keeps=(0.5, 0.25), positions=(PositionPolicy.GAP,))
    sweep.prepare(more, tmp_path / "out")  # other points of the same settings
    with pytest.raises(GapExportError, match="limit 6 there, 7 here"):
        sweep.prepare(request_of(options, limit=7), tmp_path / "out")
    weights = checkpoint_copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(GapExportError, match="checkpoint sha256"):
        sweep.prepare(request_of(options), tmp_path / "out")


# Numbers


@dataclass(frozen=True)
class Swept:
    """A whole sweep in one process: what it left, the graphs of every bundle that it built, what was traced for them."""

    folder: Path
    record: SweepRecord
    graphs: dict[tuple[str, str], dict[str, bytes]]
    traced: dict[tuple[str, str], list[str]]
    answered: int


@pytest.fixture(scope="module")
def swept(tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tracer: Tracer) -> Swept:
    folder = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    graphs: dict[tuple[str, str], dict[str, bytes]] = {}
    traced: dict[tuple[str, str], list[str]] = {}
    new: list[str] = []
    trace_one, recording = trace.graph_from_component, Recorded()

    def traced_component(component: Component, *_: object, **__: object) -> Any:
        new.append(component.spec.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "graph_from_component", trace_one)
            return tracer(component).model

    def recorded(recipe: Recipe, *args: Any, **options: Any) -> BuildResult:
        new.clear()
        built = build(recipe, *args, **options)
        graphs[recipe.pruner, recipe.positions] = graphs_of(built.bundle)
        traced[recipe.pruner, recipe.positions] = list(new)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "build", recorded)
        patch.setattr(trace, "graph_from_component", traced_component)
        patch.setenv("GAP_EXPORT_TRACE_CACHE", "off")  # what others traced before is not counted
        record = sweep.run(sweep.prepare(request_of(tiny_options), folder), progress=recording)
    assert [path.name for path in folder.parent.iterdir()] == ["undisturbed"], "bundles are gone"
    return Swept(folder, record, graphs, traced, sum(recording.counts))


def graphs_of(bundle: Bundle) -> dict[str, bytes]:
    """The graphs but for the names of nodes and of what they make, which are numbered as they are made."""
    graphs = {}
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph_path(name), load_external_data=False)
        outputs = {value.name for value in model.graph.output}
        renamed: dict[str, str] = {}
        for node in model.graph.node:
            node.name = ""
            for value in node.output:
                renamed[value] = value if value in outputs else f"value {len(renamed)}"
            node.input[:] = [renamed.get(value, value) for value in node.input]
            node.output[:] = [renamed[value] for value in node.output]
        constants = {
            c.name: f"constant {i}" for i, c in enumerate(model.graph.initializer) if not c.external_data
        }
        for constant in model.graph.initializer:
            constant.name = constants.get(constant.name, constant.name)
        for node in model.graph.node:
            node.input[:] = [constants.get(value, value) for value in node.input]
        del model.graph.value_info[:]
        graphs[name] = model.SerializeToString(deterministic=True)
    return graphs


def test_every_point_has_the_graphs_and_the_answers_of_an_ordinary_bundle(
    swept: Swept, tiny_bundle: BuildBundle
) -> None:
    """BuildResult apart, without a shared tracer, and answered by what `validate` uses."""
    questions = list(scenes.cases(CASES))
    texts = set()
    for row in swept.record.rows:
        full = row.positions == "full"
        bundle = tiny_bundle(pruner="none", keep=1.0) if full else alone(tiny_bundle, str(row.positions))
        pruning = bundle.manifest.pruning
        assert swept.graphs[pruning.pruner, pruning.positions] == graphs_of(bundle)
        runs = runner.run_cases(
            Grounder(bundle), open_session(bundle, "onnxruntime", threads=1), questions, batch=4
        )
        stored = json.loads(
            (swept.folder / "points" / f"{row.pruner}-{row.kept}-{row.positions}.json").read_text()
        )
        assert stored["texts"] == [answer.text for run in runs for answer in run.answers]
        assert row.accuracy == runner.accuracy_of(runs, questions)
        assert (row.kept, row.visual_tokens, row.cases) == (pruning.kept, 36, CASES)
        assert row.cut_off == sum(not ended for run in runs for ended in run.generation.ended)
        texts.add(tuple(stored["texts"]))
    assert len(texts) == 4, "the answers tell the policies apart"


def alone(tiny_bundle: BuildBundle, positions: str) -> Bundle:
    return tiny_bundle() if positions == "gap" else tiny_bundle(positions=positions)


def test_what_points_have_in_common_is_traced_once(swept: Swept) -> None:
    """That these are the right graphs all the same, the test above says."""
    assert swept.traced == {
        ("none", "gap"): ["vision", "splice", "embed", "decoder"],
        ("cls_attention", "gap"): ["vision", "splice"],
        ("cls_attention", "shifted"): ["splice"],
        ("cls_attention", "permuted"): ["vision", "splice"],
    }


def test_answers_are_scored_against_the_true_boxes(swept: Swept) -> None:
    """With boxes that are known: the true one, one beside it, none."""
    from types import SimpleNamespace

    cases = list(scenes.cases(3))
    left, top, right, bottom = cases[1].box
    boxes = [cases[0].box, (left, top, (left + right) / 2, bottom), None]
    answers = [SimpleNamespace(text=str(box)) for box in boxes]
    generation = SimpleNamespace(finite=True, ended=(True, False, False))
    runs: Any = [SimpleNamespace(answers=answers, boxes=boxes, generation=generation)]
    found = sweep.answers_of(runs, cases, "onnxruntime")
    assert found.ious == pytest.approx((1, 0.5, 0))
    assert (found.without_box, found.cut_off, found.texts) == (1, 2, tuple(map(str, boxes)))
    generation.finite = False
    with pytest.raises(SessionError, match="not finite"):
        sweep.answers_of(runs, cases, "onnxruntime")


def test_what_lies_in_the_folder(swept: Swept) -> None:
    names = sorted(str(path.relative_to(swept.folder)) for path in swept.folder.rglob("*.*"))
    assert names == [
        "files.json",
        "points/cls_attention-9-gap.json",
        "points/cls_attention-9-permuted.json",
        "points/cls_attention-9-shifted.json",
        "points/none-36-full.json",
        "settings.json",
        "sweep.json",
        "sweep.md",
        "sweep.png",
    ]
    assert SweepRecord.model_validate_json((swept.folder / "sweep.json").read_bytes()) == swept.record
    assert swept.answered == 4 * CASES, "progress counts every answer"


def test_an_error_names_its_point(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise SessionError("was refused", subject="vision.onnx", hint="mend it")

    monkeypatch.setattr(sweep, "build", refuses)
    with pytest.raises(SessionError) as caught:
        sweep.run(sweep.prepare(request_of(tiny_options), tmp_path / "out"))
    assert caught.value.subject == "none, keep 36, full: vision.onnx"


# Killed and gone on with


def test_a_killed_sweep_goes_on_and_ends_as_if_nothing_had_been(
    swept: Swept,
    tiny_options: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun with two worker processes, finished with none: what comes out does not depend on them."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(tiny_options))
    arguments = ["sweep", "--model", str(recipe), "--pruners", "cls_attention", "--keep", "0.25", "--limit", str(CASES), "--batch", "4",
                 "-o", str(out), "--positions", "gap,shifted,permuted"]  # fmt: skip
    # Without graphs that were traced before, cells take as long as they do: the last is not done when the second is.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GAP_EXPORT_TRACE_CACHE": "off"}
    child = subprocess.Popen(
        [sys.executable, "-m", "gap_export", *arguments, "--workers", "2"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("points/*.json"))) < 2:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "sweep.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("points/*.json")}
    assert 2 <= len(finished) < 4

    monkeypatch.setattr(sys, "argv", ["gap-export", *arguments, "--workers", "1", "--json"])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed, words = capfd.readouterr()
    assert stop.value.code == 0, words
    assert f"{len(finished)} of 4 points are finished" in words
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "nothing was computed again"
    for name in (
        "sweep.json",
        "sweep.md",
        "sweep.png",
        *(f"points/{path.name}" for path in out.glob("points/*.json")),
    ):
        assert (out / name).read_bytes() == (swept.folder / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.yaml"], (
        "no bundle is left behind"
    )

    assert printed.count("\n") == 1, "one line"
    record = json.loads(printed)
    assert record == json.loads((out / "sweep.json").read_text())
    assert len(record["rows"]) == 4
    for row in record["rows"]:
        assert set(row) >= {"pruner", "keep", "kept", "positions", "accuracy", "cases", "standard_error"}
    assert [each["pruner"] for each in record["gap_against_shifted"]] == ["cls_attention"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pruners", "cls_atention"], "did you mean 'cls_attention'"),
        (["--keep", "0.5,2"], "above 0"),
        (["--limit", "0"], "--limit"),
        (["--backend", "tflite"], "unknown backend"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_the_command_refuses(
    options: list[str],
    words: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["gap-export", "sweep", "--model", "shapes", "-o", str(tmp_path / "out"), *options]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


# On a cluster


@pytest.mark.long
def test_on_a_cluster_whose_worker_is_killed(
    swept: Swept, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    """The point that was at work is done again by another; all points are those of a sweep in one process."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'gap-export[ray]'")
    request = request_of(tiny_options, positions=(PositionPolicy.GAP,))
    prepared = sweep.prepare(request, tmp_path / "out", plot=False)
    killed: list[int] = []
    recorded, over = Recorded(), threading.Event()

    def kill_one() -> None:
        """As soon as one is at work."""
        while not killed and not over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if not killed and process.name().startswith("ray::_Worker.do"):
                        process.kill()
                        killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        record = sweep.run(prepared, cluster=Cluster(2), plot=False, progress=recorded)
    finally:
        over.set()
        killer.join()
    assert killed
    assert len(record.rows) == 2
    assert sum(recorded.counts) == 2 * CASES, "nothing is counted twice"
    for path in (tmp_path / "out" / "points").iterdir():
        assert path.read_bytes() == (swept.folder / "points" / path.name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "bundles are gone"
