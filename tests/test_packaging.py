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


def test_the_bundled_checkpoint_is_whole(wheel_files: set[str]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert f"gap_export/assets/llava-shapes/{name}" in wheel_files


def test_the_bundled_checkpoint_is_small() -> None:
    folder = ROOT / "gap_export" / "assets" / "llava-shapes"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000


def test_nothing_of_the_workshop_is_in_the_wheel(wheel_files: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gap_export"}
