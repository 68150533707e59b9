"""The command line: exit codes, messages, records, and that nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from PIL import Image

from gap_export import cli
from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import Manifest
from gap_export.checkpoint.hub import resolve
from gap_export.cli import models
from gap_export.errors import MissingRequirementError
from gap_export.evaluation import validate
from gap_export.precision import PRECISIONS
from tests.prose import prose

BuildBundle = Callable[..., Bundle]


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("build", "--model", ...)` as a user would type it, in this process."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["gap-export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    return run


def refused(result: Result, *words: str) -> None:
    """Exit code 2, a message with these words, a hint, nothing on standard output, no traceback."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert "hint" in result.err
    assert result.out == ""
    for word in words:
        assert word in result.err


@pytest.fixture
def recipe_file(tiny_options: dict[str, Any], tmp_path: Path) -> Path:
    """The recipe of the tiny checkpoint; `out` folders are made beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_options))
    return path


def changed_recipe(recipe_file: Path, **changes: Any) -> Path:
    """The recipe with other fields."""
    recipe_file.write_text(yaml.safe_dump({**yaml.safe_load(recipe_file.read_text()), **changes}))
    return recipe_file


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# General


def test_help_and_version(command: Command) -> None:
    assert command("--help").code == 0
    version = command("--version")
    assert (version.code, version.out.strip()) == (0, cli.__version__)


def test_the_name_alone_shows_help(command: Command) -> None:
    shown = command()
    assert shown.code == 2
    assert "usage: command line" not in shown.err
    assert "lint" in shown.out + shown.err


def test_unknown_commands_and_options_are_the_users_error(command: Command) -> None:
    refused(command("buidl"), "buidl")
    refused(command("build", "--modle", "shapes"), "--modle")
    refused(command("build", "--output", "x"), "--model", "see gap-export build --help")
    refused(command("build", "--model", "shapes", "-o", "x", "--keep", "half"), "keep 'half'")


def test_an_exit_code_of_a_command_reaches_the_shell(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    def stops(*_: Any) -> None:
        raise typer.Exit(1)

    monkeypatch.setattr(models, "print_json", stops)
    assert command("models", "--json").code == 1


def test_ctrl_c_is_130_and_no_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "print_json", interrupted)
    result = command("models", "--json")
    assert result.code == 130
    assert "interrupted" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("said", [ImportError, MissingRequirementError])
def test_ctrl_c_while_an_extension_module_is_imported(
    said: type[Exception], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a module says that it cannot be imported: nothing is missing, and nothing need be installed."""

    def interrupted(*_: Any) -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stop:
                raise ImportError("initialization failed") from stop
        except ImportError as error:
            if said is ImportError:
                raise
            raise MissingRequirementError(
                "is not installed", subject="onnxruntime", hint="install it"
            ) from error

    monkeypatch.setattr(models, "print_json", interrupted)
    result = command("models", "--json")
    assert result.code == 130
    assert "interrupted" in result.err
    assert "install" not in result.err


def test_a_bug_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "print_json", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gap-export", "models", "--json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_square_brackets_in_paths_are_shown(command: Command, tmp_path: Path) -> None:
    refused(command("inspect", tmp_path / "a[bold]b"), "a[bold]b")
    refused(command("eval", tmp_path, "--data", "scenes:x"), "scenes:x")


def test_square_brackets_in_folders_are_no_markup(
    command: Command, tiny_bundle: BuildBundle, image_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "[/odd]" / "bundle"
    shutil.copytree(tiny_bundle().folder, folder)
    answer = folder.parent / "answer.png"
    for arguments in (
        ("run", folder, "--image", image_file, "--refer", "the red one", "--draw", answer),
        ("eval", folder, "--data", "scenes", "--limit", "1"),
        ("bench", folder, "--requests", "1", "--new-tokens", "1", "--no-memory", "--threads", "1"),
    ):
        done = command(*arguments)
        assert (done.code, "[/odd]" in done.out.replace("\n", "")) == (0, True), done


def test_models(command: Command) -> None:
    record = json.loads(command("models", "--json").out)
    by_name = {recipe["name"]: recipe for recipe in record["recipes"]}
    assert by_name["shapes"]["checkpoint"] == "bundled:llava-shapes"
    assert {"llava", "llava-13b", "llava-original", "shikra", "minigpt-v2"} <= set(by_name)
    assert all(
        {"name", "family", "box_format", "pruners", "checkpoint"} <= set(recipe)
        for recipe in by_name.values()
    )
    assert by_name["shikra"]["needs"]["base"] == "huggyllama/llama-7b"
    assert "prumerge" in by_name["llava"]["pruners"]
    assert "prumerge" in by_name["minigpt-v2"]["pruners"]
    assert "fastv" in by_name["qwen2-vl"]["pruners"]
    shown = command("models").out
    assert all(name in shown for name in by_name)
    formats = {each["name"]: each for each in record["box_formats"]}
    assert formats["list_pixels"] == {
        "name": "list_pixels",
        "example": "[64, 96, 192, 192]",
        "unit": None,
        "frame": "image",
    }
    assert formats["shikra"]["frame"] == "padded_square"
    assert all(name in shown for name in formats)


# Build: what is refused


@pytest.mark.parametrize("keep", ["0", "1.5", "-1", "nan", "inf"])
def test_keep_outside_its_range(keep: str, command: Command, recipe_file: Path, tmp_path: Path) -> None:
    refused(
        command("build", "--model", recipe_file, "-o", tmp_path / "out", "--keep", keep), "keep", "above 0"
    )
    assert listing(tmp_path) == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pruner", "cls_atention"], ["cls_atention", "did you mean 'cls_attention'"]),
        (["--pruner", "zzz"], ["zzz", "choose one of"]),
        (["--pruner", "none", "--keep", "0.5"], ["none", "keeps all 36"]),
        (["--positions", "gapped"], ["positions", "gapped"]),
        (["--precision", "int3"], ["precision", "int3"]),
        (["--target", "tpu"], ["targets", "tpu"]),
        (["--capacity", "30"], ["capacity 30", "at least 38"]),
        (["--capacity", "0"], ["capacity"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "from 1 to"]),
        (["--max-new-tokens", "500"], ["max_new_tokens", "256", "lower --max-text or --max-new-tokens"]),
        (["--max-text", "1"], ["--max-text", "from 2 to"]),
        (["--max-text", "500"], ["max_text", "256", "lower --max-text or --max-new-tokens"]),
        (["--box-format", "list"], ["box_format 'list'", "is not a box format", "list_pixels"]),
        (["--box-format", "lava"], ["did you mean 'llava'"]),
        (["--seed", "-1"], ["seed"]),
        (["--prune-layers", "2"], ["cls_attention", "no layer to choose"]),
        (["--pruner", "fastv", "--prune-layers", "2"], ["prune_layers 2", "from 1 to 1"]),
        (["--pruner", "pyramiddrop"], ["more than 3 layers, this one has 2"]),
        (["--pruner", "divprune", "--keep", "adaptive"], ["divprune", "give a fraction or a range"]),
        (["--checkpoint", "/does/not/exist"], ["/does/not/exist", "is not a folder"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_cannot_work(
    options: list[str], words: list[str], command: Command, recipe_file: Path, tmp_path: Path
) -> None:
    refused(command("build", "--model", recipe_file, "-o", tmp_path / "out", *options), *words)
    assert listing(tmp_path) == ["tiny.yaml"]


def test_unknown_model(command: Command, tmp_path: Path) -> None:
    refused(command("build", "--model", "shape", "-o", tmp_path / "out"), "did you mean 'shapes'")
    refused(command("build", "--model", tmp_path / "none.yaml", "-o", tmp_path / "out"), "cannot be read")
    refused(command("build", "--model", tmp_path / "none", "-o", tmp_path / "out"), "is not a recipe")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2", ["is not YAML"]),
        ("just words", ["is not a mapping"]),
        ("", ["is not a mapping"]),
        ("checkpoint: x\nkep: 0.5\n", ["kep"]),
        ("keep: 0.5\n", ["checkpoint"]),
        ("checkpoint: x\nkeep: .nan\n", ["keep"]),
        ("checkpoint: x\n1: 2\n", ["1"]),
    ],
)
def test_recipe_files_that_cannot_work(
    content: str, words: list[str], command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    refused(command("build", "--model", path, "-o", tmp_path / "out"), *words)


def cut_short(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def emptied(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 0)


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / file
        content = json.loads(path.read_text())
        for key, value in changes.items():
            target = content
            *parents, last = key.split("__")
            for parent in parents:
                target = target[parent]
            target[last] = value
        path.write_text(json.dumps(content))

    return edit


def without(file: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / file).unlink()


def with_text(file: str, text: str) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        (checkpoint / file).write_text(text)

    return write


def without_end_token(checkpoint: Path) -> None:
    edited("config.json", text_config__eos_token_id=None)(checkpoint)
    with_text("generation_config.json", '{"eos_token_id": null}')(checkpoint)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, ["truncated", "model.safetensors"]),
        (emptied, ["not a safetensors file", "0 bytes"]),
        (without("model.safetensors"), ["has no model.safetensors"]),
        (without("config.json"), ["has no config.json"]),
        (with_text("config.json", "{"), ["config.json, line 1", "is not JSON"]),
        (edited("config.json", model_type="paligemma"), ["paligemma", "supported: internvl, llava"]),
        (edited("config.json", auto_map={"AutoModel": "x.Y"}), ["auto_map"]),
        (edited("config.json", text_config__model_type="mistral"), ["text_config.model_type"]),
        (edited("config.json", vision_feature_layer=[-2, -1]), ["vision_feature_layer"]),
        (edited("config.json", vision_feature_select_strategy="full"), ["vision_feature_select_strategy"]),
        (without("preprocessor_config.json"), ["image processor"]),
        (edited("preprocessor_config.json", image_mean=[0.5]), ["preprocessor_config.json"]),
        (edited("preprocessor_config.json", image_std=[0.5, 0.5, 0]), ["preprocessor_config.json"]),
        (without("tokenizer.json"), ["tokenizer.json", "has no tokenizer"]),
        (with_text("tokenizer.json", "{}"), ["is not a tokenizer"]),
        (without_end_token, ["eos_token_id"]),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_work(
    damage: Callable[[Path], None],
    words: list[str],
    command: Command,
    recipe_file: Path,
    checkpoint_copy: Path,
    tmp_path: Path,
) -> None:
    damage(checkpoint_copy)
    result = command("build", "--model", recipe_file, "--checkpoint", checkpoint_copy, "-o", tmp_path / "out")
    refused(result, *words)
    assert listing(tmp_path) == ["checkpoint", "tiny.yaml"]


def test_weights_that_do_not_belong_to_the_config(
    command: Command, recipe_file: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    edited("config.json", vision_config__intermediate_size=64)(checkpoint_copy)
    result = command("build", "--model", recipe_file, "--checkpoint", checkpoint_copy, "-o", tmp_path / "out")
    refused(result, "has shape", "config.json implies")
    assert listing(tmp_path) == ["checkpoint", "tiny.yaml"]


def test_prompts_that_cannot_work(command: Command, recipe_file: Path, tmp_path: Path) -> None:
    for prompt, word in (
        ("<image> where ?", "{expression}"),
        ("where is {expression} ?", "placeholder"),
        ("<image> <image> where is {expression} ?", "placeholder"),
        ("<image> {expression}" + " the" * 60, "capacity"),
    ):
        recipe = changed_recipe(recipe_file, prompt=prompt)
        refused(command("build", "--model", recipe, "-o", tmp_path / "out"), word)
    ends_with_image = changed_recipe(recipe_file, prompt="where is {expression} ? <image>", pruner="fastv")
    refused(command("build", "--model", ends_with_image, "-o", tmp_path / "out"), "ends with the image")
    refused(command("build", "--model", changed_recipe(recipe_file, prompt=None, fit="crop"), "-o", tmp_path / "out"), "fit: crop")  # fmt: skip
    assert listing(tmp_path) == ["tiny.yaml"]


def test_outputs_that_are_in_the_way(
    command: Command, recipe_file: Path, tmp_path: Path, bundle_copy: Path
) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")

    def build(out: Path, *options: str) -> Result:
        return command("build", "--model", recipe_file, "-o", out, *options)

    refused(build(tmp_path / "a file"), "is a file")
    refused(build(tmp_path / "mine"), "holds no bundle")
    refused(build(tmp_path / "mine", "--replace"), "holds no bundle")
    refused(build(bundle_copy, "--keep", "0.5"), "another bundle", "--replace")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert open_bundle(bundle_copy, every_hash=True).manifest.pruning.keep == 0.25


def test_an_output_that_cannot_be_written(command: Command, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    refused(
        command("build", "--model", recipe_file, "-o", tmp_path / "a file" / "out"), "a file is no folder"
    )


# Build: what comes out


def test_build_reports_what_it_made(command: Command, recipe_file: Path, tmp_path: Path) -> None:
    result = command(
        "build", "--model", recipe_file, "-o", tmp_path / "out", "--pruner", "spatial", "--keep", "0.5", "--no-golden", "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert (record["kept"], record["visual_tokens"], record["pruner"]) == (18, 36, "spatial")
    assert record["graphs"] == ["decoder", "embed", "splice", "vision"]
    assert record["positions"] == "gap"
    assert listing(tmp_path) == ["out", "tiny.yaml"]
    assert listing(tmp_path / "out") == [
        "chat_template.jinja",
        "decoder.onnx",
        "embed.onnx",
        "manifest.json",
        "model.safetensors",
        "splice.onnx",
        "tokenizer.json",
        "vision.onnx",
    ]
    written = sum(
        path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"
    )
    assert record["written_bytes"] == written

    spoken = command("build", "--model", recipe_file, "-o", tmp_path / "again", "--pruner", "spatial", "--keep", "0.5", "--no-golden")  # fmt: skip
    assert "from the trace cache: vision, splice, embed, decoder" in spoken.out


def test_what_the_user_should_know_is_said_once(
    command: Command, recipe_file: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    edited("config.json", text_config__sinks=4)(checkpoint_copy)
    arguments = ("build", "--model", recipe_file, "--checkpoint", checkpoint_copy, "-o", tmp_path / "out")
    result = command(*arguments, "--no-golden", "--json")
    assert result.code == 0
    note = "text_config.sinks: a field that is not known here and not followed"
    assert result.err.startswith(f"warning: {note}")
    assert result.err.count("warning") == 1
    assert json.loads(result.out)["notes"][0].startswith(note)


def test_a_calibration_text_makes_another_bundle(recipe_file: Path, tmp_path: Path, command: Command) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("where is the red circle " * 110)
    built = ("build", "--model", recipe_file, "--calibration", text, "-o", tmp_path / "built")
    refused(command(*built), "no use for a calibration text", "int4 or int4-fp16")
    result = command(*built, "--precision", "int4", "--no-golden")
    assert result.code == 0, result.err
    assert (tmp_path / "built" / "calibration.txt").is_file()
    text.write_text("where is")
    refused(command(*built, "--precision", "int4", "--replace"), "has 3 tokens", "longer text")
    assert (tmp_path / "built" / "manifest.json").is_file()


def test_measured_ranges_make_a_bundle_in_fp8(
    command: Command, tiny_bundle: BuildBundle, recipe_file: Path, tmp_path: Path
) -> None:
    ranges = tmp_path / "ranges.json"
    result = command("calibrate", tiny_bundle().folder, "-o", ranges, "--limit", "2", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads(ranges.read_text())
    spoken = command("calibrate", tiny_bundle().folder, "-o", ranges, "--limit", "2")
    assert "15 layers over 2 expressions (scenes)" in spoken.out
    low = ("build", "--model", recipe_file, "-o", tmp_path / "low", "--precision", "fp8")
    refused(command(*low), "needs activation ranges", "gap-export calibrate")
    refused(command(*low, "--ranges", recipe_file), "cannot be read")
    result = command(*low, "--ranges", ranges, "--no-golden")
    assert result.code == 0, result.err
    assert (tmp_path / "low" / "ranges.json").is_file()
    refused(command("calibrate", tmp_path / "low", "-o", ranges), "is in fp8")
    refused(
        command("calibrate", tiny_bundle().folder, "-o", ranges, "--images", tmp_path),
        "belongs to a data set",
    )


def test_ctrl_c_in_the_middle_of_a_build_leaves_nothing_and_the_same_command_finishes(
    recipe_file: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-m", "gap_export", "build", "--model", str(recipe_file), "-o", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Without graphs that were traced before, so that there is a middle.
    slow = {**environment, "GAP_EXPORT_TRACE_CACHE": "off"}
    child = subprocess.Popen(arguments, env=slow, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".out.*.building/*")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert listing(tmp_path) == ["tiny.yaml"]

    again = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert open_bundle(tmp_path / "out", every_hash=True).manifest.pruning.kept == 9
    assert listing(tmp_path) == ["out", "tiny.yaml"]


# Run


def test_run_answers(command: Command, tiny_bundle: BuildBundle, image_file: Path, tmp_path: Path) -> None:
    folder = tiny_bundle().folder
    drawn = tmp_path / "drawn.png"
    result = command(
        "run", folder, "--image", image_file, "--refer", "the red mug zebra", "--json", "--draw", drawn
    )
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert set(record) >= {"box", "answer", "kept", "kept_indices", "image_size", "unknown_words", "backend"}
    assert record["visual_tokens"] == 36
    assert record["finish_reason"] in ("stop", "length")
    assert record["kept"] == len(record["kept_indices"]) == 9
    assert record["kept_indices"] == sorted(set(record["kept_indices"]))
    assert record["image_size"] == [48, 40]
    assert record["unknown_words"] == ["zebra"]
    with Image.open(drawn) as image:
        image.load()
    shown = command("run", folder, "--image", image_file, "--refer", "the red mug zebra")
    assert shown.code == 0
    assert "keep 9 of 36" in shown.out
    assert "zebra" in shown.err


def test_run_refuses_bad_input(
    command: Command, tiny_bundle: BuildBundle, image_file: Path, tmp_path: Path
) -> None:
    empty, words, half = tmp_path / "empty.png", tmp_path / "words.jpg", tmp_path / "half.png"
    empty.touch()
    words.write_text("not an image")
    half.write_bytes(image_file.read_bytes()[:2000])

    def run(image: Path = image_file, refer: str = "the mug", *options: str) -> Result:
        return command("run", tiny_bundle().folder, "--image", image, "--refer", refer, *options)

    refused(run(tmp_path / "none.png"), "none.png")
    refused(run(empty), "empty.png")
    refused(run(words), "words.jpg")
    refused(run(half), "half.png")
    refused(run(tmp_path), str(tmp_path))
    refused(run(refer=""), "is empty")
    refused(run(refer="  \n"), "is empty")
    refused(run(refer="red " * 40), "shorten the expression", "larger --max-text")
    refused(run(image_file, "the mug", "--box-format", "shikara"), "did you mean 'shikra'")
    refused(run(refer="a <image> mug"), "<image>")
    refused(run(image_file, "the mug", "--backend", "tflite"), "tflite", "onnxruntime")
    refused(run(image_file, "the mug", "--max-new-tokens", "0"), "--max-new-tokens", "from 1 to")
    refused(run(image_file, "the mug", "--max-new-tokens", "400"), "capacity")
    refused(run(image_file, "the mug", "--threads", "-1"), "threads")
    refused(run(image_file, "the mug", "--draw", str(tmp_path / "no folder" / "x.png")), "x.png")
    refused(run(image_file, "the mug", "--draw", str(tmp_path / "x.unknown")), "x.unknown")
    assert listing(tmp_path) == ["empty.png", "half.png", "words.jpg"]


@pytest.mark.parametrize("which", ["run", "inspect", "validate"])
def test_damaged_bundles_are_refused_by_every_command(
    which: str, command: Command, bundle_copy: Path, image_file: Path
) -> None:
    options = ["--image", image_file, "--refer", "the mug"] if which == "run" else []
    graph = bundle_copy / "splice.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"\0")
    refused(command(which, bundle_copy, *options), "splice.onnx", "hash")
    graph.write_bytes(content[:-1])
    refused(command(which, bundle_copy, *options), "splice.onnx", "bytes")
    graph.unlink()
    refused(command(which, bundle_copy, *options), "splice.onnx", "missing")
    (bundle_copy / "manifest.json").write_text("{")
    refused(command(which, bundle_copy, *options), "manifest.json")
    (bundle_copy / "manifest.json").unlink()
    refused(command(which, bundle_copy, *options), "is not a bundle")
    refused(command(which, bundle_copy / "nowhere", *options), "is not a bundle")


def test_a_precision_without_cpu_kernels_says_where_it_can_run(
    command: Command, bundle_copy: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], cpu=False))
    result = command("run", bundle_copy, "--image", image_file, "--refer", "the mug")
    refused(result, "fp32 graphs have no CPU kernels", "TensorRT")


# Inspect and lint


def test_inspect_shows_how_boxes_are_written(
    command: Command, recipe_file: Path, image_file: Path, tmp_path: Path
) -> None:
    options = ("--box-format", "list_pixels", "--max-text", "40", "--no-golden")
    assert command("build", "--model", recipe_file, "-o", tmp_path / "out", *options).code == 0
    assert open_bundle(tmp_path / "out").manifest.recipe.max_text == 40
    record = json.loads(command("inspect", tmp_path / "out", "--json").out)
    assert record["box_format"] == {
        "codec": "list_pixels",
        "frame": "padded_square",
        "example": "[64, 96, 192, 192]",
    }
    assert (
        "boxes [64, 96, 192, 192] (list_pixels, of the padded square)"
        in command("inspect", tmp_path / "out").out
    )
    for option in ((), ("--box-format", "bbox_1000")):
        assert (
            command("run", tmp_path / "out", "--image", image_file, "--refer", "the mug", *option).code == 0
        )


def test_inspect(command: Command, tiny_bundle: BuildBundle) -> None:
    folder = tiny_bundle().folder
    record = json.loads(command("inspect", folder, "--json", "--verify").out)
    assert set(record["graphs"]) == {"vision", "splice", "embed", "decoder"}
    assert record["graphs"]["decoder"]["in_place"] == 4
    assert [row["position_id"] for row in record["ids_and_slots"]] == [
        "j",
        "T_pre + i_k",
        "T_pre + 36 + j",
        "T_pre + 36 + T_post + t",
    ]
    assert [row["slot"] for row in record["ids_and_slots"]] == [
        "j",
        "T_pre + k",
        "T_pre + 9 + j",
        "T_pre + 9 + T_post + t",
    ]
    shown = command("inspect", folder)
    assert shown.code == 0
    assert "T_pre + i_k" in shown.out


def test_inspect_of_a_baseline_tells_its_own_rule(command: Command, tiny_bundle: BuildBundle) -> None:
    record = json.loads(command("inspect", tiny_bundle(positions="shifted").folder, "--json").out)
    assert [row["position_id"] for row in record["ids_and_slots"]][1:] == [
        "T_pre + k",
        "T_pre + 9 + j",
        "T_pre + 9 + T_post + t",
    ]


@pytest.mark.slow
def test_inspect_of_a_decoder_that_drops_tokens(command: Command, deep_bundle: BuildBundle) -> None:
    folder = deep_bundle(pruner="pyramiddrop", positions="gap").folder
    record = json.loads(command("inspect", folder, "--json", "--verify").out)
    assert set(record["graphs"]) == {"vision", "splice", "embed", "prefill", "decode"}
    assert [stage["next_slot"] for stage in record["stages"]] == [
        "next_slot",
        "next_slot.1",
        "next_slot.2",
        "next_slot.3",
    ]
    assert [stage["kept"] for stage in record["stages"]] == [36, 23, 14, 9]
    assert [stage["layers"] for stage in record["stages"]] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert {stage["reads_ids"] for stage in record["stages"]} == {"position_ids"}
    assert (record["kept"], record["mean_kept"], record["visual_tokens"]) == (9, 20.5, 36)
    assert [row["position_id"] for row in record["ids_and_slots"]][2:] == [
        "T_pre + 36 + j",
        "T_pre + 36 + T_post + t",
    ]
    assert [row["slot"] for row in record["ids_and_slots"]][2:] == [
        "T_pre + K_s + j",
        "T_pre + K_s + T_post + t",
    ]
    shown = command("inspect", folder).out
    assert "keep 9 of 36 at the end (36, 23, 14, 9 by stage), 20.5 in the mean over layers" in shown
    assert "write_index.3" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pruner", "later"), [("fastv", 1), pytest.param("pyramiddrop", 3, marks=pytest.mark.long)]
)
def test_inspect_of_stages_that_are_renumbered(
    command: Command, deep_bundle: BuildBundle, pruner: str, later: int
) -> None:
    folder = deep_bundle(pruner=pruner, positions="shifted").folder
    stages = json.loads(command("inspect", folder, "--json").out)["stages"]
    assert [stage["reads_ids"] for stage in stages] == ["position_ids"] + ["its slots"] * later


@pytest.mark.slow
def test_a_decoder_that_drops_tokens_answers_and_is_timed(
    command: Command, deep_bundle: BuildBundle, image_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(deep_bundle(pruner="fastv", positions="gap").folder, tmp_path / "bundle"))
    drawn = tmp_path / "drawn.png"
    result = command(
        "run", folder, "--image", image_file, "--refer", "the red mug", "--json", "--draw", drawn
    )
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["kept"] == len(set(record["kept_indices"])) == 9
    assert drawn.is_file()
    assert command("run", folder, "--image", image_file, "--refer", "the mug", "--keep", "0.25").code == 0
    refused(
        command("run", folder, "--image", image_file, "--refer", "the mug", "--keep", "0.5"),
        "keeps 9 of every",
    )
    timed = command("bench", folder, "--requests", "2", "--new-tokens", "2", "--json")
    assert timed.code == 0, timed.err
    (row,) = json.loads(timed.out)["rows"]
    manifest = open_bundle(folder).manifest
    stages = manifest.pruning.stages
    needed = [row["prompt_slots"] + 2 - (stages[0].kept - stage.kept) for stage in stages]
    slots = manifest.cache_layout.slots_for(needed)
    assert all(0 <= laid_out - least < 16 for laid_out, least in zip(slots, needed, strict=True))
    assert (row["kept"], row["capacity"]) == (9, slots[0])
    assert row["cache_bytes"] == 2 * 2 * 16 * manifest.cache_layout.total_slots(slots) * 4


def test_lint_passes_ours_and_fails_a_decoder_that_ignores_ids(
    command: Command, tiny_bundle: BuildBundle, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    for name in bundle.manifest.graphs:
        result = command("lint", bundle.graph_path(name), "--strict", "--json")
        assert result.code == 0, result
        assert json.loads(result.out)["verdict"]["survives"] is True
    model = onnx.load(bundle.graph_path("decoder"), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    del attention.attribute[:]
    attention.attribute.append(onnx.helper.make_attribute("is_causal", 1))
    onnx.save(model, tmp_path / "causal.onnx")
    result = command("lint", tmp_path / "causal.onnx", "--strict")
    assert result.code == 1, result
    refused(command("lint", bundle.graph_path("decoder"), "--kind", "encoder"), "encoder")
    refused(command("lint", tmp_path / "none.onnx"), "none.onnx")
    (tmp_path / "empty.onnx").touch()
    refused(command("lint", tmp_path / "empty.onnx"), "empty.onnx")


# Validate


@pytest.fixture
def ready_baselines(tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Companions of the session's making instead of freshly built ones; building them is tested in test_validation."""

    @contextmanager
    def baseline(_bundle: Bundle, recipe: Any, *_: Any) -> Iterator[Bundle]:
        if recipe.pruner == "none":
            yield tiny_bundle(pruner="none", keep=1.0)
        elif recipe.positions == "gap":
            yield tiny_bundle()
        else:
            yield tiny_bundle(positions=str(recipe.positions))

    monkeypatch.setattr(validate, "_baseline", baseline)


@pytest.mark.usefixtures("ready_baselines")
def test_validate_passes_a_right_bundle(command: Command, tiny_bundle: BuildBundle) -> None:
    folder = tiny_bundle().folder
    result = command("validate", folder, "--limit", "6", "--json", "--threads", "1")
    assert result.code == 0, result
    record = json.loads(result.out)
    assert record["ok"] is True
    assert all(gate["passed"] for gate in record["gates"])
    assert {gate["name"] for gate in record["gates"]} >= {
        "kept_sets",
        "position_ids",
        "logit_difference",
        "box_iou",
    }
    assert [set(control) >= {"name", "caught"} for control in record["controls"]] == [True] * 5
    assert all(control["caught"] for control in record["controls"])
    assert set(record["grounding"]) >= {"full", "shifted", "permuted", "gap", "cases"}
    assert record["grounding"]["cases"] == 6
    assert json.loads((folder / "reports" / "parity.json").read_text()) == record
    open_bundle(folder, every_hash=True)


def with_graph_of(folder: Path, name: str, other: Bundle) -> None:
    """Another bundle's graph in place of this one's, with everything that hides it: its hash, and inputs that nothing reads."""
    own, foreign = (
        onnx.load(str(path / f"{name}.onnx"), load_external_data=False) for path in (folder, other.folder)
    )
    there = {value.name for value in foreign.graph.input}
    foreign.graph.input.extend(value for value in own.graph.input if value.name not in there)
    (folder / f"{name}.onnx").write_bytes(foreign.SerializeToString())
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    files = {**manifest.files, f"{name}.onnx": record_of(folder / f"{name}.onnx")}
    write_manifest(folder, manifest.model_copy(update={"files": files}))


@pytest.mark.usefixtures("ready_baselines")
def test_validate_fails_a_bundle_with_a_foreign_splice(
    command: Command, bundle_copy: Path, tiny_bundle: BuildBundle
) -> None:
    """The mistake this project exists for: ids renumbered, everything else right, every hash in order."""
    with_graph_of(bundle_copy, "splice", tiny_bundle(positions="shifted"))
    open_bundle(bundle_copy, every_hash=True)
    result = command("validate", bundle_copy, "--limit", "4", "--json", "--threads", "1")
    assert result.code == 1, result
    record = json.loads(result.out)
    assert record["ok"] is False
    failed = {gate["name"] for gate in record["gates"] if not gate["passed"]}
    assert failed >= {"position_ids", "logit_difference"}
    shown = command("validate", bundle_copy, "--limit", "2", "--threads", "1")
    assert shown.code == 1
    assert "a gate was not met" in shown.out


@pytest.mark.usefixtures("ready_baselines")
def test_validate_reports_logits_that_are_not_numbers(
    command: Command, tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gap_export.runtime.ort import OnnxRuntimeSession
    from gap_export.runtime.session import Prefilled

    prefill = OnnxRuntimeSession.prefill
    monkeypatch.setattr(
        OnnxRuntimeSession,
        "prefill",
        lambda *args, **options: Prefilled(prefill(*args, **options).logits * float("nan")),
    )
    result = command("validate", tiny_bundle().folder, "--limit", "2", "--json", "--threads", "1")
    assert result.code == 1, result
    assert json.loads(result.out)["ok"] is False


# validate --text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return prose(tmp_path)


def test_a_text_is_validated(command: Command, bundle_copy: Path, text: Path) -> None:
    options = ("--text", text, "--tokens", "8", "--threads", "1")
    result = command("validate", bundle_copy, *options, "--json")
    assert result.code == 0, result
    record = json.loads(result.out)
    assert record["ok"] is True
    assert (record["prefill"]["tokens"], record["control_caught"]) == (8, True)
    assert {gate["name"] for gate in record["gates"]} == {
        f"{part}: {name}"
        for part in ("prefill", "steps")
        for name in ("perplexity_rise", "mean_kl", "top1_agreement")
    }
    assert json.loads((bundle_copy / "reports" / "text_parity.json").read_text()) == record
    shown = command("validate", bundle_copy, *options)
    assert shown.code == 0, shown
    for words in ("8 in one call", "247 one by one", "prose.txt", "perplexity", "all gates met"):
        assert words in shown.out
    assert "text_parity.json" in command("inspect", bundle_copy).out
    open_bundle(bundle_copy, every_hash=True)


def test_a_text_that_is_read_otherwise_fails(command: Command, bundle_copy: Path, text: Path) -> None:
    """Embeddings of another sign, every hash in order."""
    embed = bundle_copy / "embed.onnx"
    model = onnx.load(str(embed), load_external_data=False)
    (lookup,) = (node for node in model.graph.node if node.op_type == "Gather")
    model.graph.node.append(onnx.helper.make_node("Neg", [lookup.output[0]], ["negative"]))
    model.graph.node[-1].output[0], lookup.output[0] = lookup.output[0], "looked_up"
    model.graph.node[-1].input[0] = "looked_up"
    embed.write_bytes(model.SerializeToString())
    manifest = Manifest.model_validate_json((bundle_copy / "manifest.json").read_text())
    files = {**manifest.files, embed.name: record_of(embed)}
    write_manifest(bundle_copy, manifest.model_copy(update={"files": files}))
    result = command("validate", bundle_copy, "--text", text, "--threads", "1")
    assert result.code == 1, result
    assert "a gate was not met" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", "500"), "--limit"),  # the default, but asked for
        (("--keep", "0.5"), "--keep"),
        (("--batch", "4"), "--batch"),
        (("--text-tower", "tower"), "--text-tower"),
        (("--backend", "tensorrt-rtx"), "--backend tensorrt-rtx"),
        (("--backend", "torch"), "--backend torch"),
    ],
)
def test_what_a_text_does_not_read_is_refused(
    command: Command, tiny_bundle: BuildBundle, text: Path, options: tuple[str, str], words: str
) -> None:
    refused(command("validate", tiny_bundle().folder, "--text", text, *options), words, "leave")
    refused(command("validate", tiny_bundle().folder, *options, "--text", text), words)


def test_tokens_belong_to_a_text(command: Command, tiny_bundle: BuildBundle, tmp_path: Path) -> None:
    folder = tiny_bundle().folder
    refused(command("validate", folder, "--tokens", "8"), "--tokens", "--text")
    refused(command("validate", folder, "--text", tmp_path / "nowhere.txt", "--tokens", "0"), "--tokens")
    refused(command("validate", folder, "--text", tmp_path / "nowhere.txt"), "nowhere.txt", "UTF-8")


def test_validate_needs_the_checkpoint_the_bundle_was_built_from(
    command: Command, bundle_copy: Path, tmp_path: Path
) -> None:
    refused(command("validate", bundle_copy, "--checkpoint", tmp_path / "gone"), "gone")
    manifest = open_bundle(bundle_copy).manifest
    recipe = manifest.recipe.model_copy(update={"checkpoint": "/moved/away"})
    write_manifest(
        bundle_copy, manifest.model_copy(update={"checkpoint": recipe.checkpoint, "recipe": recipe})
    )
    refused(command("validate", bundle_copy), "/moved/away")


def test_the_bundled_checkpoint_is_there() -> None:
    assert (resolve("bundled:llava-shapes") / "config.json").is_file()
