"""Every strategy with a reference of its own: the exported graph against float64, and what it has in common with the others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.positions import MergedId
from gap_export.recipe.recipe import load_recipe

pytestmark = pytest.mark.slow

STRATEGIES = tuple(name for name in prune.names(in_decoder=False) if name != "none")
MERGING = tuple(row.name for row in prune.PRUNERS.values() if row.merged)
LARGE, MEDIUM = ((24, 24), 144), ((16, 16), 64)
SETS = [*((name, *MEDIUM) for name in STRATEGIES), *((name, *LARGE) for name in ("divprune", "cdpruner"))]
"""All 576 tokens only where an error could grow from step to step; bench/pruners.py has them for every strategy."""


@pytest.mark.parametrize(("name", "grid", "kept"), SETS)
def test_exported_graph_equals_float64(
    check: SimpleNamespace, name: str, grid: tuple[int, int], kept: int
) -> None:
    check.agrees_with_float64(name, grid, kept, cases=10 if kept < 100 else 4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_equals_its_images_alone(check: SimpleNamespace, name: str) -> None:
    check.batch_equals_singles(name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_count_from_fewest_to_all(check: SimpleNamespace, name: str) -> None:
    check.every_count(name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_count_as_an_input_of_one_graph(check: SimpleNamespace, name: str) -> None:
    check.one_graph_for_every_count(name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_graphs_of_the_fewest_and_of_all(check: SimpleNamespace, name: str) -> None:
    check.fewest_and_all(name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_tensorrt_builds_the_selection(
    exported: Callable[..., Any], selection_builds_in_tensorrt: Callable[..., None], name: str
) -> None:
    selection_builds_in_tensorrt(exported(name, 64, (16, 16)))
    selection_builds_in_tensorrt(exported(name, None, (4, 5), width=48))


@pytest.mark.parametrize("name", ["prumerge", "visionzip", "vispruner"])
def test_tensorrt_builds_a_tower_in_half_precision(
    builds_in_tensorrt: Callable[..., None], name: str
) -> None:
    """Scores are computed in float32 and features stay what they are: types must not meet."""
    builds_in_tensorrt(name)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "divprune" else pytest.param(name, marks=pytest.mark.long)
        for name in STRATEGIES
        if prune.row(name).sequential
    ],
)
def test_tensorrt_builds_a_tower_below_a_loop(builds_in_tensorrt: Callable[..., None], name: str) -> None:
    """It crashes where the tower's attention is one fused node, and the loop is longer than those of the tiny tower."""
    shapes = load_recipe("shapes")
    fields = ("checkpoint", "text_tower", "prompt", "max_text", "keep")
    builds_in_tensorrt(name, **{field: getattr(shapes, field) for field in fields})


@pytest.mark.parametrize("merged_id", [MergedId.MAX_KEPT, MergedId.CENTROID])
@pytest.mark.parametrize("name", MERGING)
def test_every_place_of_the_merged_token(check: SimpleNamespace, name: str, merged_id: MergedId) -> None:
    check.every_count(name, merged_id)


@pytest.mark.parametrize("name", MERGING)
def test_one_token_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="keeps at least 2 tokens"):
        prune.check_count(prune.row(name), 1, 576)
