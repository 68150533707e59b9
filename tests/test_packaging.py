"""The wheel holds what a user needs: every module, the recipes, the bundled checkpoint; and nothing of the workshop."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel(wheel_files: set[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gap_export").rglob("*.py")}
    assert modules <= wheel_files


def test_recipes_are_in_the_wheel(wheel_files: set[str]) -> None:
    recipes = {f"gap_export/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes
    assert recipes <= wheel_files


@pytest.mark.parametrize("checkpoint", ["llava-shapes", "clip-shapes"])
def test_the_bundled_checkpoints_are_whole(wheel_files: set[str], checkpoint: str) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert f"gap_export/checkpoint/assets/{checkpoint}/{name}" in wheel_files


@pytest.mark.parametrize(("checkpoint", "limit"), [("llava-shapes", 8_000_000), ("clip-shapes", 600_000)])
def test_the_bundled_checkpoints_are_small(checkpoint: str, limit: int) -> None:
    folder = ROOT / "gap_export" / "checkpoint" / "assets" / checkpoint
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit


def test_nothing_of_the_workshop_is_in_the_wheel(wheel_files: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gap_export"}
