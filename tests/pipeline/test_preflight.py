"""What a build needs is told before it begins."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import Derived, WeightLocation
from gap_export.errors import MissingRequirementError, RecipeError
from gap_export.pipeline import preflight
from gap_export.pipeline.build import build
from gap_export.pipeline.preflight import Needs, available_memory, check_needs, existing_parent, needs_of
from gap_export.recipe.recipe import Recipe

FACTS = ModelSpec(
    hidden_size=8, layers=32, attention_heads=1, kv_heads=1, head_dim=8, vocabulary=10, visual_tokens=576, grid=(24, 24), max_positions=2048
)  # fmt: skip
Usage = namedtuple("Usage", "total used free")


def checkpoint(tmp_path: Path) -> Checkpoint:
    """A thousand elements in fp16, as many in fp32, ten that are computed."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 7000)
    half = WeightLocation(file, "F16", (10, 100), 0, 2000)
    whole = WeightLocation(file, "F32", (1000,), 2000, 4000)
    computed = Derived((10,), (half,), lambda stored, rows: stored[0][rows])
    return Checkpoint(tmp_path, "x", {}, {"half": half, "whole": whole, "computed": computed})


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "checkpoint": "x", "precision": "fp16", **changes})


def needs(tmp_path: Path, *, linkable: bool = True, self_contained: bool = False, **changes: Any) -> Needs:
    return needs_of(
        checkpoint(tmp_path), recipe(**changes), FACTS, linkable=linkable, self_contained=self_contained
    )


def test_only_what_changes_is_written(tmp_path: Path) -> None:
    assert needs(tmp_path).disk == 2 * 1010
    assert needs(tmp_path, precision="fp32").disk == 4 * 1010
    assert needs(tmp_path, precision="bf16").disk == 2 * 2010
    assert (
        needs(tmp_path, linkable=False).disk == needs(tmp_path, self_contained=True).disk == 2 * 1010 + 7000
    )
    engines = needs(tmp_path, targets=("onnx", "tensorrt-rtx"))
    assert engines.disk == 2 * 1010 + 2 * 2010
    assert engines.memory == needs(tmp_path).memory + 2 * 2010


def test_memory_is_what_was_measured(tmp_path: Path) -> None:
    """bench/results/export.json: 0.59 GB for 32 layers."""
    assert 0.55e9 < needs(tmp_path).memory < 0.7e9


def test_a_calibration_takes_a_layer_its_activations_and_square_matrices(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    shapes = {"up": (3200, 100), "down": (64, 400), "table": (FACTS.vocabulary, 5000)}
    weights: Any = {name: WeightLocation(file, "F32", shape, 0, 0) for name, shape in shapes.items()}
    model = Checkpoint(tmp_path, "x", {}, weights)
    plain, calibrated = (
        needs_of(
            model, recipe(precision="int4", calibration=text), FACTS, linkable=True, self_contained=False
        )
        for text in (None, "prose.txt")
    )
    assert calibrated.disk == plain.disk
    layer, activations, squares = (
        4 * (3200 * 100 + 64 * 400) // FACTS.layers,
        4 * 4 * 4096 * 400,
        4 * 8 * 400**2,
    )
    assert calibrated.memory - plain.memory == layer + activations + squares


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
    check_needs(Needs(10**9, 0, 0), tmp_path / "out", recipe())
    with pytest.raises(
        MissingRequirementError, match=r"has 1\.0 GB free, and the build writes about 2\.5 GB"
    ) as caught:
        check_needs(Needs(2_500_000_000, 0, 10), tmp_path / "a" / "out", recipe(targets=("onnx", "tensorrt")))
    assert "--precision" in caught.value.hint
    assert "--target" in caught.value.hint


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 10**9)
    check_needs(Needs(0, 10**9, 0), tmp_path, recipe())
    with pytest.raises(
        MissingRequirementError, match=r"memory: of 1\.0 GB is free, and the build takes about 3\.0 GB"
    ):
        check_needs(Needs(0, 3 * 10**9, 0), tmp_path, recipe())


def test_the_smaller_of_machine_and_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAP_EXPORT_ANY_MEMORY", raising=False)
    assert available_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 1000 kB\n")
    assert available_memory(tmp_path, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert available_memory(tmp_path, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path, tmp_path) == 4900
    monkeypatch.setenv("GAP_EXPORT_ANY_MEMORY", "1")
    assert available_memory(tmp_path, tmp_path) is None


def test_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


def test_a_build_without_room_leaves_nothing(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(MissingRequirementError, match="free, and the build writes about"):
        build(Recipe.model_validate({**tiny_options, "precision": "fp16"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("where is {expression} ?", "gives 0 image placeholders instead of one"),
        ("<image> <image> where is {expression} ?", "gives 2 image placeholders instead of one"),
        ("<image> {expression} or {expression} ?", "has 2 times {expression} instead of once"),
    ],
)
def test_a_prompt_that_is_not_whole_is_the_recipes_fault(
    prompt: str, fault: str, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        build(Recipe.model_validate({**tiny_options, "prompt": prompt}), tmp_path / "out")
    assert caught.value.message == f"{fault}: {prompt!r}"
    assert "<image> once for every image" in caught.value.hint
    assert not (tmp_path / "out").exists()
