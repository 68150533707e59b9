"""DivPrune: the greedy choice, step by step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gap_export.positions import MergedId
from gap_export.prune import VisionFeatures
from gap_export.prune.divprune import DivPrune

NAME = "divprune"


@pytest.mark.parametrize(("grid", "kept"), [((24, 24), 144), ((16, 16), 64)])
def test_exported_graph_equals_float64(check: SimpleNamespace, grid: tuple[int, int], kept: int) -> None:
    check.agrees_with_float64(NAME, grid, kept, cases=10)


def test_a_batch_equals_its_pictures_alone(check: SimpleNamespace) -> None:
    check.batch_equals_singles(NAME)


def test_every_count_from_fewest_to_all(check: SimpleNamespace) -> None:
    check.every_count(NAME)


def test_tensorrt_builds_it(builds_in_tensorrt: Callable[..., None]) -> None:
    builds_in_tensorrt(NAME)


def test_more_tokens_keep_the_fewer() -> None:
    generator = torch.Generator().manual_seed(3)
    features = VisionFeatures(
        torch.empty(2, 20, 8), (4, 5), projected_BNH=torch.randn(2, 20, 8, generator=generator)
    )
    whole = DivPrune().select(features, 20, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK
    for kept in range(1, 20):
        fewer = DivPrune().select(features, kept, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK
        assert torch.equal(fewer, whole[:, :kept])


def test_copies_are_chosen_last_and_never_twice() -> None:
    generator = torch.Generator().manual_seed(4)
    originals = torch.randn(1, 5, 8, generator=generator)
    features = VisionFeatures(torch.empty(1, 20, 8), (4, 5), projected_BNH=originals.repeat(1, 4, 1))
    chosen = DivPrune().select(features, 20, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK[0].tolist()
    assert sorted(chosen) == list(range(20))
    assert {index % 5 for index in chosen[:5]} == set(range(5))
