"""Copied layers in the graphs of every family: equal to the last byte to what a trace of all layers gives.

Of checkpoints in the layouts of their authors, see `test_original_layouts.py` and `test_minigpt_v2.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.spec import GraphName
from gap_export.graph.trace_cache import Tracer
from gap_export.pipeline.graphs import export_graphs
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from tests.families.answers import Tiny
from tests.families.both_ways import assert_equal_both_ways, deepened
from tests.families.tiny_families import FAMILIES

pytestmark = pytest.mark.long

TOWERS = ("llava_next", "llava_next_mistral", "llava_onevision", "internvl")
"""Families whose vision tower calls its layers; those of Qwen-VL are taken apart, and traced whole."""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_family(
    name: str,
    precision: str,
    tiny_family: Callable[[str], Tiny],
    tiny_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    tiny = tiny_family(name)
    options = {
        **tiny_options,
        **FAMILIES[name].builds[1][0],
        "checkpoint": str(tiny.checkpoint),
        "precision": precision,
    }
    del options["text_tower"]
    copied: list[GraphName] = ["decoder", "vision"] if name in TOWERS else ["decoder"]
    assert_equal_both_ways(options, tmp_path, copied=copied)


@pytest.mark.parametrize("pruner", ["cls_attention", "divprune", "trim"])
def test_llava(pruner: str, tiny_options: dict[str, Any], tmp_path: Path) -> None:
    options = {**tiny_options, "pruner": pruner, "keep": 0.25}
    assert_equal_both_ways(options, tmp_path, copied=("vision", "decoder"))


@pytest.mark.parametrize(
    ("pruner", "cuts", "positions", "precision"),
    [
        ("fastv", (2,), PositionPolicy.GAP, "fp16"),
        ("pyramiddrop", (1, 2, 4), PositionPolicy.SHIFTED, "fp32"),
        ("sparsevlm", (5, 6, 7), PositionPolicy.PERMUTED, "fp32"),
    ],
    ids=["fastv", "pyramiddrop", "sparsevlm"],
)
def test_decoders_with_stages(
    pruner: str,
    cuts: tuple[int, ...],
    positions: PositionPolicy,
    precision: str,
    deep_checkpoint: Path,
    tiny_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Each stage of the nine layers by itself; here one has layers to spare."""
    options = {
        **tiny_options,
        "checkpoint": str(deep_checkpoint),
        "prune_layers": cuts,
        "keep": 0.25,
        "pruner": pruner,
        "positions": positions,
        "precision": precision,
    }
    assert_equal_both_ways(options, tmp_path, copied=("vision", "prefill", "decode"))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_files_are_the_same(
    precision: str, tiny_checkpoint: Path, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    """Simplified, quantised, with their weights."""
    checkpoint = deepened(tiny_checkpoint, tmp_path / "checkpoint")
    recipe = Recipe.model_validate({**tiny_options, "checkpoint": checkpoint, "precision": precision})
    contents = []
    for whole in (False, True):
        folder = tmp_path / str(whole)
        folder.mkdir()
        export_graphs(recipe, folder, only={"decoder"}, tracer=Tracer(None, whole=whole))
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
