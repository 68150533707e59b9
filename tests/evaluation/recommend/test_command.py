"""`gap-export recommend` in both of its forms: what it refuses, what it prints, and on the bundled model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gap_export import cli
from gap_export.errors import InputError
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.image_source import InMemory
from gap_export.evaluation.sweep.request import all_pruners
from tests.evaluation.recommend.conftest import LIMIT, REQUESTS, Made, RequestOf

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs it in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["gap-export", "recommend", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "a bundle, or --pruners: give one of them"),
        ("--model shapes", "--model alone is neither"),
        ("-o {out}", "-o alone is neither"),
        ("bundle --pruners all", "--pruners all: has no place beside the bundle bundle"),
        ("bundle --model shapes", "--model shapes: has no place beside"),
        ("bundle --plot", "--plot: has no place beside the bundle bundle"),
        ("bundle --no-plot", "--no-plot: has no place beside the bundle bundle"),
        ("bundle -o {out}", "has no place beside the bundle bundle"),
        ("--pruners all -o {out}", "--model: is needed with --pruners"),
        ("--pruners all --model shapes", "--output: is needed with --pruners"),
        ("--pruners rando --model shapes -o {out}", "is not a pruner"),
        ("--pruners none --model shapes -o {out}", "always measured"),
        ("--pruners random, --model shapes -o {out}", "empty entry"),
        ("--pruners random --model shapes -o {out} --keep 1.0", "keep 1: is not below 1"),
        ("--pruners random --model shapes -o {out} --keep 0", "above 0"),
        ("--pruners random --model nothing -o {out}", "is not a recipe"),
        ("--pruners random --model shapes -o {out} --protocol x", "protocol"),
        ("--pruners random --model shapes -o {out} --backend auto", "needs a bundle that was measured"),
        ("--pruners random --model shapes -o {out} --backend torch", "runs the checkpoint"),
        ("--pruners random --model shapes -o {out} --requests 0", "--requests"),
        ("--pruners random --model shapes -o {other}", "holds no recommendation"),
        ("--pruners fastv --model shapes -o {out} --data nowhere", "nowhere"),
    ],
)
def test_what_it_refuses(line: str, words: str, tmp_path: Path, command: Command) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("work of a year")
    code, out, err = command(*line.format(out=tmp_path / "out", other=other).split())
    assert (code, out) == (2, ""), err
    assert words in err.replace("\n", " ")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_finished_run_is_read_and_printed(
    made: Made, request_of: RequestOf, tmp_path: Path, command: Command
) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(
        yaml.safe_dump(request_of().recipe.model_dump(mode="json", exclude_none=True, exclude={"name"}))
    )
    shutil.copytree(made.folder, out)
    line = ["--pruners", "random,divprune", "--model", recipe, "-o", out, "--keep", "1.0,0.5,0.25", "--data", "scenes:3"]  # fmt: skip
    line += ["--limit", LIMIT, "--requests", REQUESTS, "--threads", 1]
    code, printed, words = command(*line, "--json")
    assert code == (0 if made.record.choice else 1), words
    assert "5 of 5 points are finished already" in words
    assert printed.count("\n") == 1, "one line"
    assert json.loads(printed) == json.loads((made.folder / "recommend.json").read_text())
    code, printed, _ = command(*line)
    assert "Pareto front of 5 points" in printed
    assert f"stored in {out}" in printed.replace("\n", "")
    assert (out / "recommend.png").read_bytes() == (made.folder / "recommend.png").read_bytes()


@pytest.mark.parametrize("form", ["bundle", "pruners"])
def test_images_that_are_not_there_are_said_to_be(
    form: str,
    request_of: RequestOf,
    scenes: Dataset,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert scenes.source is not None
    names = list(dict.fromkeys(expression.image for expression in scenes.expressions))
    images = InMemory({name: scenes.source.open(name) for name in names[1:3]})
    three = tuple(each for each in scenes.expressions if each.image in names[:3])
    lacking = dataclasses.replace(scenes, expressions=three, source=images)
    monkeypatch.setattr("gap_export.evaluation.refer.dataset.open_dataset", lambda *_, **__: lacking)

    def stop(*_: object, **__: object) -> None:
        raise InputError("is begun", subject="the work", hint="")

    for function in ("bundle.recommend", "run.run"):
        monkeypatch.setattr(f"gap_export.evaluation.recommend.{function}", stop)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump(request_of().recipe.model_dump(mode="json", exclude_none=True, exclude={"name"}))
    )
    line = ["bundle"] if form == "bundle" else ["--pruners", "random", "--model", recipe, "-o", tmp_path / "out"]  # fmt: skip
    _, _, words = command(*line, "--keep", "0.5,0.25")
    assert f"1 images are not there, so 3 expressions are neither asked nor scored: {names[0]}" in " ".join(
        words.split()
    )
    assert "is begun" in words


@pytest.mark.long
def test_every_pruner_on_the_bundled_model(tmp_path: Path, command: Command) -> None:
    """No pruner is left out, what is known of pruners shows, and the choice is within the tolerance and faster."""
    out = tmp_path / "out"
    line = ["--pruners", "all", "--model", "shapes", "-o", out, "--keep", "0.5,0.25", "--data", "scenes:7"]
    line += ["--limit", 210, "--requests", 10, "--threads", 1, "--max-accuracy-drop", 0.08]
    code, printed, words = command(*line, "--json")
    assert code == 0, words
    record = Recommendation.model_validate_json(printed)
    assert len(record.points) == 1 + 2 * len(all_pruners())
    assert not record.left_out
    assert record.choice is not None
    assert record.choice.low >= -0.08
    assert (record.choice.speedup or 0) > 1.2
    found = {(point.pruner, point.keep): point.accuracy for point in record.points}
    assert found["cls_attention", 0.25] > found["random", 0.25]
