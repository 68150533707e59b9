"""PruMerge: choice, merged features, the place of the appended token."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.positions import MergedId

NAME = "prumerge"


@pytest.mark.parametrize(("grid", "kept"), [((24, 24), 144), ((16, 16), 64)])
def test_exported_graph_equals_float64(check: SimpleNamespace, grid: tuple[int, int], kept: int) -> None:
    check.agrees_with_float64(NAME, grid, kept, cases=10)


def test_a_batch_equals_its_pictures_alone(check: SimpleNamespace) -> None:
    check.batch_equals_singles(NAME)


def test_every_count_from_fewest_to_all(check: SimpleNamespace) -> None:
    check.every_count(NAME)


def test_tensorrt_builds_it(builds_in_tensorrt: Callable[..., None]) -> None:
    builds_in_tensorrt(NAME)


@pytest.mark.parametrize("merged_id", [MergedId.MAX_KEPT, MergedId.CENTROID])
def test_every_place_of_the_merged_token(check: SimpleNamespace, merged_id: MergedId) -> None:
    check.every_count(NAME, merged_id)


def test_one_token_is_refused() -> None:
    with pytest.raises(RecipeError, match="keeps at least 2 tokens"):
        prune.require_count(prune.strategy(NAME), 1, 576)
