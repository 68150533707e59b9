"""DivPrune: the greedy choice, step by step."""

from __future__ import annotations

import torch

from gap_export.positions import MergedId
from gap_export.prune import VisionFeatures, divprune


def test_more_tokens_keep_the_fewer() -> None:
    generator = torch.Generator().manual_seed(3)
    features = VisionFeatures(
        torch.empty(2, 20, 8), (4, 5), projected=torch.randn(2, 20, 8, generator=generator)
    )
    whole = divprune.select(features, 20, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK
    for kept in range(1, 20):
        fewer = divprune.select(features, kept, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK
        assert torch.equal(fewer, whole[:, :kept])


def test_copies_are_chosen_last_and_never_twice() -> None:
    generator = torch.Generator().manual_seed(4)
    originals = torch.randn(1, 5, 8, generator=generator)
    features = VisionFeatures(torch.empty(1, 20, 8), (4, 5), projected=originals.repeat(1, 4, 1))
    chosen = divprune.select(features, 20, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK[0].tolist()
    assert sorted(chosen) == list(range(20))
    assert {index % 5 for index in chosen[:5]} == set(range(5))
