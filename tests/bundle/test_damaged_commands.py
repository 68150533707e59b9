"""Every command that takes a bundle, on bundles whose manifest is damaged: one message, exit code 2, nothing on standard output."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export import cli
from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError
from gap_export.pipeline.preflight import check_output
from gap_export.recipe.recipe import Recipe
from tests.bundle.mutations import mutations
from tests.bundle.test_check import read

COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("--image", "{image}", "--refer", "the red mug"),
    "ask": ("where is the red mug ?", "--image", "{image}"),
    "ask without a question": ("--no-image",),
    "inspect": (),
    "inspect --json": ("--json",),
    "inspect --verify": ("--verify",),
    "validate": ("--limit", "1"),
    "validate --text": ("--text", "{image}"),
    "bench": (),
    "eval": ("--data", "scenes"),
    "report": (),
    "recommend": (),
    "calibrate": ("-o", "{folder}/ranges.json"),
}
MANIFESTS = 3


@pytest.fixture
def damaged(tiny_bundle: Callable[..., Bundle]) -> list[Any]:
    """Manifests that opening refuses, of the same kinds for every command."""
    content = json.loads((tiny_bundle().folder / "manifest.json").read_text())
    every = [each for each in mutations(content) if each.path[0] not in ("graphs", "schema_version")]
    refused = [each for each in random.Random(1).sample(every, 60) if read(each) is not None]
    return [each.content for each in refused[:MANIFESTS]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_them_in_one_message(
    command: str,
    damaged: list[Any],
    bundle_copy: Path,
    image_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [each.format(image=image_file, folder=tmp_path) for each in COMMANDS[command]]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for content in damaged:
        (bundle_copy / "manifest.json").write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["gap-export", command.split()[0], str(bundle_copy), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        assert (stop.value.code, out) == (2, ""), err
        assert "Traceback" not in err
        said = [line for line in err.splitlines() if line.startswith(("bundle:", "usage:"))]
        assert len(said) == 1, err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_build_over_them_is_another_bundle_or_replaces_it(
    damaged: list[Any], bundle_copy: Path, tiny_options: dict[str, Any]
) -> None:
    recipe = Recipe.model_validate(tiny_options)
    for content in damaged:
        (bundle_copy / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(BundleError):
            check_output(bundle_copy, recipe, replace=False)
