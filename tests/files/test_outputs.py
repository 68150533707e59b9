"""Every command that writes, and every kind of place that cannot be written: one clear line, before the work, and nothing is touched."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gap_export import cli
from gap_export.bundle.folder import Bundle

Target = Callable[[Path], Path]
"""Makes a place in a folder that cannot be written."""


def file_with(content: bytes, name: str = "taken") -> Target:
    def made(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return made


def folder_with(*names: str) -> Target:
    def made(folder: Path) -> Path:
        (folder / "taken").mkdir()
        for name in names:
            (folder / "taken" / name).write_text('{"name": "application", "files": {}}')
        return folder / "taken"

    return made


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def device(folder: Path) -> Path:
    try:
        os.mknod(folder / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes are not permitted here")
    return folder / "device"


def below_a_file(folder: Path) -> Path:
    return file_with(b"x")(folder) / "out"


NOWHERE: dict[str, Target] = {
    "no name": lambda _: Path(""),
    "name of 300": lambda folder: folder / ("x" * 300),
    "null byte": lambda folder: folder / "null\0byte",
    "pipe": pipe,
    "device": device,
    "below a file": below_a_file,
}
FOLDERS: dict[str, Target] = NOWHERE | {
    "file": file_with(b"work of a year"),
    "web application": folder_with("manifest.json", "settings.json", "provenance.json", "files.json"),
    "notes": folder_with("notes.txt"),
}
FILES: dict[str, Target] = NOWHERE | {
    "folder": folder_with(),
    "text": file_with(b"work of a year", "taken.png"),
    "web page": file_with(b"<html>mine</html>"),
    "JSON": file_with(b'{"largest": 1}'),
}
COMMANDS: dict[str, tuple[list[str], dict[str, Target]]] = {
    "build": (["build", "--model", "{recipe}", "-o"], FOLDERS),
    "build again": (["build", "--model", "{recipe}", "--replace", "-o"], FOLDERS),
    "eval": (["eval", "{bundle}", "--data", "scenes", "--limit", "1", "--replace", "-o"], FOLDERS),
    "score": (["eval", "--predictions", "{text}", "--family", "llava", "--data", "scenes", "-o"], FOLDERS),
    "sweep": (["sweep", "--model", "{recipe}", "--no-plot", "--replace", "-o"], FOLDERS),
    "report": (["report", "{bundle}", "-o"], FILES),
    "calibrate": (["calibrate", "{bundle}", "-o"], FILES),
    "run": (["run", "{bundle}", "--image", "{image}", "--refer", "cat", "--draw"], FILES),
}


class Refused:
    """Runs a command line in this process, and holds it to a refusal."""

    def __init__(
        self, given: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._given, self._capfd, self._monkeypatch = given, capfd, monkeypatch

    def __call__(self, arguments: list[str]) -> str:
        """What it says."""
        line = [each.format(**self._given) for each in arguments]
        self._monkeypatch.setattr(sys, "argv", ["gap-export", *line])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self._capfd.readouterr()
        assert stop.value.code == 2, err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 2, err
        assert out == ""
        return str(err)


@pytest.fixture
def refused(
    tiny_bundle: Callable[..., Bundle],
    tiny_options: dict[str, Any],
    image_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    from gap_export.pipeline import graphs
    from gap_export.recipe.recipe import Recipe
    from gap_export.runtime import model, ort

    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work was begun")

    inputs = tmp_path_factory.mktemp("inputs")
    (inputs / "tiny.yaml").write_text(Recipe.model_validate(tiny_options).model_dump_json(exclude_none=True))
    (inputs / "answers.jsonl").write_text('{"id": "0", "answer": "x"}\n')
    given = {
        "recipe": str(inputs / "tiny.yaml"),
        "bundle": str(tiny_bundle().folder),
        "image": str(image_file),
        "text": str(inputs / "answers.jsonl"),
    }
    monkeypatch.setattr(graphs, "trace_graphs", work)
    monkeypatch.setattr(ort.OnnxRuntimeSession, "__init__", work)
    monkeypatch.setattr(model, "load", work)
    return Refused(given, capfd, monkeypatch)


def state(folder: Path) -> dict[str, Any]:
    """Everything in a folder: what it is and what it holds."""
    return {
        path.relative_to(folder).as_posix(): (
            stat.S_IFMT(path.lstat().st_mode),
            path.lstat().st_ino,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("command", "place"), [(name, place) for name, (_, places) in COMMANDS.items() for place in places]
)
def test_places_that_are_refused(command: str, place: str, refused: Refused, tmp_path: Path) -> None:
    arguments, places = COMMANDS[command]
    target = places[place](tmp_path)
    before = state(tmp_path)
    text = "" if target == Path() else str(target)
    refused([*arguments, text])
    assert state(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk(options)`: a file system of 64 kB."""
    mounted: list[Path] = []

    def made(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size=64k,{options}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield made
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


@pytest.mark.parametrize("disk", ["ro", "full"])
@pytest.mark.parametrize("command", COMMANDS)
def test_disks_that_take_nothing(
    command: str, disk: str, refused: Refused, small_disk: Callable[[str], Path]
) -> None:
    folder = small_disk("ro" if disk == "ro" else "rw")
    if disk == "full":
        fill(folder)
    before = state(folder)
    for name in ("out.png", "new/out.png") if command != "run" else ("out.png",):
        said = refused([*COMMANDS[command][0], str(folder / name)])
        assert ("read-only" if disk == "ro" else "no space left") in said
    assert state(folder) == before


def test_a_mount_point_is_not_replaced_as_a_whole(
    refused: Refused, small_disk: Callable[[str], Path]
) -> None:
    folder = small_disk("rw")
    for command in ("build", "build again"):
        assert "is a mount point" in refused([*COMMANDS[command][0], str(folder)])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "eval", "sweep", "score"])
def test_nothing_is_put_into_a_bundle(command: str, refused: Refused, bundle_copy: Path) -> None:
    before = state(bundle_copy)
    for name in ("out", "reports/out", "deep/er/out"):
        said = refused([*COMMANDS[command][0], str(bundle_copy / name)])
        assert "lies in the bundle" in said
    assert state(bundle_copy) == before


def test_inputs_are_not_outputs(
    refused: Refused, bundle_copy: Path, tmp_path: Path, image_file: Path
) -> None:
    image = shutil.copy(image_file, tmp_path / "image.png")
    (bundle_copy / "reports").mkdir(exist_ok=True)
    shutil.copy(image_file, bundle_copy / "reports" / "bench.png")
    (tmp_path / "link.png").symlink_to("image.png")
    before = state(tmp_path)
    draw = ["run", str(bundle_copy), "--image", str(image), "--refer", "cat", "--draw"]
    for target in (image, tmp_path / "link.png", bundle_copy / "reports" / "bench.png"):
        assert "is read by this command" in refused([*draw, str(target)])
    for name in ("manifest.json", "tokenizer.json"):
        for line in (draw, ["calibrate", str(bundle_copy), "-o"], ["report", str(bundle_copy), "-o"]):
            assert "is read by this command" in refused([*line, str(bundle_copy / name)])
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["x", "x.txt", "x.unknown", "x.psd", "no folder/x.png"])
def test_drawings_that_cannot_be_written(name: str, refused: Refused, tmp_path: Path) -> None:
    assert name in refused([*COMMANDS["run"][0], str(tmp_path / name)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.webp", "x.bmp", "x.gif", "x.tiff", "x.pdf"])
def test_images_are_drawn_over_whatever_their_name(name: str, tmp_path: Path) -> None:
    from gap_export.boxes.image_file import check_drawing, save_drawing

    Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    check_drawing(tmp_path / name, images=[tmp_path / "input.png"], bundle=tmp_path / "bundle")
    save_drawing(Image.new("RGB", (30, 20), "red"), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name != "x.pdf":
        with Image.open(tmp_path / name) as image:
            assert image.size == (30, 20)
