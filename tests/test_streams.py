"""Streams that take nothing, a working folder that is gone, terminals and paths of any encoding: a right answer, or one line and code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.cli import streams
from gap_export.errors import InputError

COMMANDS = {
    "models": "models",
    "record": "models --json",
    "version": "--version",
    "usage": "run --threads 1_000",
    "refusal": "inspect nothing-there",
}
GAP_EXPORT = f"{sys.executable} -m gap_export"


def shell(
    line: str, folder: Path, *, optimised: bool = False, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell, in which `gap-export` is this checkout's."""
    command = GAP_EXPORT.replace("-m", "-O -m") if optimised else GAP_EXPORT
    return subprocess.run(
        ["bash", "-c", line.replace("gap-export", command, 1)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        timeout=60,
    )


def full_device(folder: Path) -> Path:
    """A device that is always full, in a folder of the test."""
    path = folder / "full"
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 7))
        path.open("wb").close()
    except PermissionError:
        pytest.skip("devices cannot be made or opened here")
    return path


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("record", ">&-"),
        ("record", "> full"),
        ("record", "| true; exit ${PIPESTATUS[0]}"),
        ("models", "> full"),
        ("models", "| true; exit ${PIPESTATUS[0]}"),
        ("version", "> full"),
    ],
)
def test_an_answer_that_cannot_be_written_is_no_success(ends: str, name: str, tmp_path: Path) -> None:
    if "full" in ends:
        full_device(tmp_path)
    done = shell(f"gap-export {COMMANDS[name]} {ends}", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"output: standard output: ")
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("record", "2>&-"),
        ("record", "<&- 2>&-"),
        ("usage", "2> full"),
        ("refusal", "2> full"),
        ("refusal", "2>&-"),
    ],
)
def test_messages_that_nobody_reads_change_nothing(ends: str, name: str, tmp_path: Path) -> None:
    if "full" in ends:
        full_device(tmp_path)
    done = shell(f"gap-export {COMMANDS[name]} {ends}", tmp_path)
    assert done.returncode == (2 if name in ("usage", "refusal") else 0)
    assert b"Traceback" not in done.stderr + done.stdout
    if name == "record":
        assert json.loads(done.stdout)["recipes"]


def test_a_working_folder_that_was_deleted_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell("rmdir ../gone; gap-export models", gone)
    assert done.returncode == 2
    assert done.stderr.startswith(b"input: the working folder: was deleted")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_any_terminal_shows_every_record(encoding: str, tmp_path: Path) -> None:
    done = shell("gap-export models", tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert b"cls_attention" in done.stdout


@pytest.mark.parametrize("arguments", [["run", "--draw", ""], ["run", "--draw="], [""], ["build", "-o", ""]])
def test_empty_arguments_are_named(arguments: list[str]) -> None:
    """`-o ""` would be the working folder."""
    with pytest.raises(InputError, match="is empty"):
        streams.check_surroundings(arguments)
    streams.check_surroundings(["run", "--draw", "x", "--keep=0.5"])


def test_paths_of_no_encoding_and_without_assertions(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Latin-1 names are shown escaped; `python -O` leaves no check out."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copytree(tiny_bundle().folder, folder / "bundle", copy_function=os.link)
    image = folder / os.fsdecode(b"\xe9.png")
    Image.new("RGB", (36, 36), "red").save(image)
    asked = "gap-export run bundle --image *.png --refer 'red mug' --threads 1 --draw drawn.jpg"
    for optimised in (False, True):
        done = shell(asked, folder, optimised=optimised)
        assert done.returncode == 0, done.stderr
    assert (folder / "drawn.jpg").is_file()
    done = shell("gap-export inspect ../caf*/bundle --json", folder)
    assert json.loads(done.stdout)["bundle"] == os.fsdecode(b"../caf\xe9/bundle")
    refused = shell("gap-export run bundle --image *.png --refer '' --threads 1", folder, optimised=True)
    assert refused.returncode == 2
    done = shell("gap-export inspect *.png", folder)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"bundle: \udce9.png")
