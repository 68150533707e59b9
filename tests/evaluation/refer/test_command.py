"""`gap-export eval` as a process: killed in the middle, started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from gap_export.bundle.folder import Bundle
from gap_export.bundle.hashes import record_of
from gap_export.errors import InputError
from gap_export.evaluation.refer.results import open_run

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "gap_export", "eval"]
SCENES = ["--data", "scenes:7", "--limit", "140", "--threads", "1"]


def evaluate(*arguments: str, code: int = 0) -> Any:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if code == 0 else done.stderr


def table(folder: Path) -> list[dict[str, Any]]:
    rows = parquet.read_table(folder / "unc-results.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_killed_in_the_middle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    folder = str(tiny_bundle().folder)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    expected = evaluate(folder, *SCENES, "-o", str(undisturbed), "--json")
    assert (expected["expressions"], expected["images"], expected["backend"]) == (140, 20, "onnxruntime")

    answers = killed / "answers.jsonl"
    process = subprocess.Popen([*COMMAND, folder, *SCENES, "-o", str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 14):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = answers.read_text().splitlines()
    assert 14 <= len(before) < 140
    assert not (killed / "unc-results.parquet").exists()

    assert evaluate(folder, *SCENES, "-o", str(killed), "--json") == expected
    assert table(killed) == table(undisturbed)
    assert answers.read_text().splitlines()[: len(before)] == before, "something was answered again"


def test_the_record(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    folder = str(tiny_bundle().folder)
    record = evaluate(folder, *SCENES, "-o", str(tmp_path / "run"), "--json")
    wanted = {
        "protocol",
        "split",
        "expressions",
        "images",
        "accuracy",
        "mean_iou",
        "unparsable",
        "missing_images",
        "backend",
    }
    assert wanted <= record.keys()
    assert json.loads((tmp_path / "run" / "unc-eval.json").read_text()) == record
    torch = evaluate(folder, *SCENES, "-o", str(tmp_path / "torch"), "--json", "--backend", "torch")
    assert {**torch, "backend": "onnxruntime"} == record
    assert table(tmp_path / "run") == table(tmp_path / "torch")
    other = evaluate(folder, *SCENES, "-o", str(tmp_path / "run"), "--json", "--protocol", "lmms-eval")
    assert other["protocol"] == "lmms-eval"
    assert (tmp_path / "run" / "lmms-eval-results.parquet").is_file()


def test_prompts_with_the_expression_before_the_image_are_answered_whole(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Shikra's are; it is said once, not for every image, and not where it was asked for."""
    folder = str(tiny_bundle(prompt="USER : where is {expression} in <image> ? ASSISTANT :").folder)
    scenes = [*SCENES[:2], "--limit", "14", "--threads", "1"]
    said = []
    for more in ([], ["--one-by-one"]):
        command = [*COMMAND, folder, *scenes, *more, "-o", str(tmp_path / f"run{len(more)}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said.append(
            (done.stdout + done.stderr).count("every expression is answered whole: the prompt has the")
        )
    assert said == [1, 0]
    assert table(tmp_path / "run0") == table(tmp_path / "run1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "scenes"], "give one of them"),
        (["--data", "nowhere.json", "BUNDLE"], "does not exist"),
        (["--data", "scenes", "BUNDLE", "--protocol", "coco"], "not a protocol"),
        (["--data", "scenes", "BUNDLE", "--backend", "jax"], "unknown backend"),
        (["--data", "scenes", "BUNDLE", "--keep", "0.5"], "cannot be chosen"),
        (["--data", "scenes", "BUNDLE", "--workers", "2"], "add --ray"),
        (["--data", "ANSWERS", "BUNDLE"], "brings no images"),
        (["--data", "ANSWERS", "BUNDLE", "--images", "."], "none of the 1 images is there"),
        (["--data", "ANSWERS", "--predictions", "x"], "--family: is not given"),
        (["--data", "ANSWERS", "--predictions", "x", "--family", "lava"], "not a family"),
        (["--data", "ANSWERS", "--predictions", "x", "--box-format", "lava"], "did you mean 'llava'"),
        (
            ["--data", "ANSWERS", "--predictions", "x", "--family", "llava", "--box-format", "lava"],
            "did you mean 'llava'",
        ),
        (["--data", "scenes", "BUNDLE", "--box-format", "list"], "is not a box format"),
    ],
    ids=str,
)
def test_what_cannot_work(
    arguments: list[str], words: str, tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    annotations = tmp_path / "rec.jsonl"
    annotations.write_text(json.dumps({"img_path": "a.jpg", "expression": "mug", "bbox": [1, 2, 3, 4]}))
    names = {"BUNDLE": str(tiny_bundle().folder), "ANSWERS": str(annotations)}
    message = evaluate(*[names.get(each, each) for each in arguments], "-o", str(tmp_path / "out"), code=2)
    assert words in message
    assert "hint" in message
    assert not (tmp_path / "out").exists(), "an evaluation that cannot be was begun"


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_names_in_any_encoding_are_printed_and_stored(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    row = {"image": "a.jpg", "sent": "mug", "bbox": [1, 2, 30, 40], "width": 100, "height": 100}
    (folder / "rec.jsonl").write_text(json.dumps(row))
    (folder / "answers.jsonl").write_text(json.dumps({"id": "a.jpg.0", "answer": "[[10, 20, 300, 400]]"}))
    arguments = [
        "--data",
        folder / "rec.jsonl",
        "--predictions",
        folder / "answers.jsonl",
        "--family",
        "internvl",
    ]
    done = subprocess.run(
        [*COMMAND, *arguments, "-o", folder / "out"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9/out" in done.stdout
    stored = json.loads((folder / "out" / "provenance.json").read_text())
    assert stored["data"].endswith("caf\\udce9/rec.jsonl")


SIZED = {"img_path": "a.jpg", "expression": "mug", "bbox": [10, 20, 50, 80], "width": 50, "height": 200}


def test_answers_from_a_file_in_a_format_alone_or_of_a_family(tmp_path: Path) -> None:
    """The frame is the family's, or without one that of the format; pixels as seen are told by no file."""
    data, answers, out = tmp_path / "rec.jsonl", tmp_path / "answers.jsonl", str(tmp_path / "out")
    data.write_text(json.dumps(SIZED))
    answers.write_text(json.dumps({"id": "a.jpg.0", "answer": '{"bbox": [200, 100, 1000, 400]}'}))
    arguments = ["--data", str(data), "--predictions", str(answers), "-o", out, "--json"]
    alone = evaluate(*arguments, "--box-format", "bbox_1000")
    assert (alone["accuracy"], alone["mean_iou"], alone["box_format"]) == (1.0, 1.0, "bbox_1000")
    assert "boxes of the image" in alone["description"]
    of_a_family = evaluate(*arguments, "--family", "llava", "--box-format", "bbox_1000")
    assert (of_a_family["accuracy"], of_a_family["box_format"]) == (0.0, "bbox_1000")
    assert "boxes of the padded square" in of_a_family["description"]
    assert evaluate(*arguments, "--family", "qwen3_vl")["unparsable"] == 1
    assert "how large that was is not known" in evaluate(*arguments, "--box-format", "bbox_pixels", code=2)


def test_results_in_another_format_do_not_stand_beside_each_other(tmp_path: Path) -> None:
    data, answers, out = tmp_path / "rec.jsonl", tmp_path / "answers.jsonl", tmp_path / "out"
    data.write_text(json.dumps(SIZED))
    answers.write_text(json.dumps({"id": "a.jpg.0", "answer": "[0.2, 0.1, 1.0, 0.4]"}))
    arguments = ["--data", str(data), "--predictions", str(answers), "-o", str(out), "--json"]
    evaluate(*arguments, "--box-format", "llava")
    evaluate(*arguments, "--box-format", "llava", "--protocol", "lmms-eval")
    assert {run.record.box_format for run in (open_run(out), open_run(out, "lmms-eval"))} == {"llava"}
    evaluate(*arguments, "--box-format", "bbox_1000", "--protocol", "lmms-eval")
    with pytest.raises(InputError, match="none of the results under unc"):
        open_run(out)


def test_another_format_is_another_evaluation(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle().folder, folder, ignore=shutil.ignore_patterns("reports"))
    data = ["--data", "scenes", "--limit", "4", "--threads", "1", "--json"]
    evaluate(str(folder), *data)
    record = evaluate(str(folder), *data, "--box-format", "list_pixels")
    assert record["box_format"] == "list_pixels"
    assert sorted(path.name for path in (tmp_path / "bundle.runs").iterdir()) == [
        "scenes-all-gap-onnxruntime",
        "scenes-all-gap-onnxruntime-boxes-list_pixels",
    ]
    run = str(tmp_path / "bundle.runs" / "scenes-all-gap-onnxruntime")
    message = evaluate(str(folder), *data, "--box-format", "list_pixels", "-o", run, code=2)
    assert "box format None there, list_pixels here" in message
    assert evaluate(str(folder), *data, "--box-format", "list_pixels") == record


def test_recommend(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """A random model grounds nothing at any share, so that the smallest loses nothing."""
    folder = tmp_path / "bundle"
    source = tiny_bundle(pruner="divprune", keep="0.1:0.3:1.0").folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("reports"))
    arguments = ["--data", "scenes", "--limit", "12", "--keep", "1.0,0.3", "--requests", "2", "--json"]
    command = [*COMMAND[:-1], "recommend", str(folder), *arguments, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["chosen"], record["expressions"]) == (0.3, 12)
    assert all(point["speedup"] > 0 for point in record["points"])
    assert record == json.loads((folder / "reports" / "recommend.json").read_text())
    assert record["manifest_sha256"] == record_of(folder / "manifest.json").sha256
    assert sorted(path.name for path in (tmp_path / "bundle.runs").iterdir()) == [
        "scenes-all-gap-onnxruntime-keep0.3",
        "scenes-all-gap-onnxruntime-keep1",
    ]
    assert [path.name for path in (folder / "reports").iterdir()] == ["recommend.json"]


def test_evaluations_lie_beside_the_bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """In no folder that a rebuild replaces; and those of another build are not gone on with."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle().folder, folder, ignore=shutil.ignore_patterns("reports"))
    evaluate(str(folder), "--data", "scenes", "--limit", "4", "--threads", "1", "--json")
    run = tmp_path / "bundle.runs" / "scenes-all-gap-onnxruntime"
    assert sorted(path.name for path in run.iterdir()) == [
        "answers.jsonl",
        "files.json",
        "provenance.json",
        "settings.json",
        "unc-eval.json",
        "unc-results.parquet",
    ]
    assert not (folder / "reports").exists()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    message = evaluate(str(folder), "--data", "scenes", "--limit", "4", "--json", code=2)
    assert "holds another evaluation: manifest sha256" in message
    evaluate(str(folder), "--data", "scenes", "--limit", "4", "--threads", "1", "--replace", "--json")


def test_compare(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    folder = str(tiny_bundle().folder)
    for name in ("one", "other"):
        evaluate(folder, "--data", "scenes", "--limit", "10", "-o", str(tmp_path / name), "--json")
    command = [*COMMAND[:-1], "compare", str(tmp_path / "one"), str(tmp_path / "other")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    record = json.loads(done.stdout)
    assert (done.returncode, record["agreement"], record["identical"], record["worst"]) == (0, 1.0, 1.0, [])
    impossible = [*command, "--min-box-iou", "1.1"]
    assert subprocess.run(impossible, capture_output=True, check=False).returncode == 2


def test_compare_fails_a_run_with_other_boxes(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    data = ["--data", "scenes", "--limit", "10"]
    evaluate(str(tiny_bundle().folder), *data, "-o", str(tmp_path / "one"), "--json")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(
            json.dumps({"id": row["id"], "answer": "[0.0, 0.0, 0.01, 0.01]"}) + "\n"
            for row in table(tmp_path / "one")
        )
    )
    evaluate(
        "--predictions", str(answers), "--family", "llava", *data, "-o", str(tmp_path / "other"), "--json"
    )
    command = [*COMMAND[:-1], "compare", str(tmp_path / "one"), str(tmp_path / "other")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
