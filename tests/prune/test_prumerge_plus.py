"""PruMerge+: choice, merged features, the even sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.positions import MergedId
from gap_export.prune.prumerge_plus import sequence_indices

NAME = "prumerge_plus"


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


def test_the_sequence_is_even_and_distinct() -> None:
    for count in range(1, 577):
        indices = sequence_indices(576, count)
        steps = {b - a for a, b in itertools.pairwise(indices)}
        assert indices[0] == 0
        assert len(set(indices)) == count
        assert max(steps, default=1) - min(steps, default=1) <= 1
