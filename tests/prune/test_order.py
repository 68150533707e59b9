"""Decoder order with merged tokens: stable, features follow, and position ids that allow for shared indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gap_export.positions import MergedId, PositionPolicy, prompt_position_ids
from gap_export.prune import Selected, VisionFeatures, order

GRID = (4, 5)


@given(rows=st.lists(st.lists(st.integers(0, 19), min_size=6, max_size=6), min_size=1, max_size=3))
def test_features_follow_a_stable_sort(rows: list[list[int]]) -> None:
    indices = torch.tensor(rows)
    features = torch.arange(indices.numel()).reshape(*indices.shape, 1).float()
    ordered = order.in_decoder_order(Selected(indices, features), PositionPolicy.GAP)
    assert ordered.patches_BKE is not None
    for row, given_row in enumerate(rows):
        places = np.argsort(given_row, kind="stable")
        assert ordered.indices_BK[row].tolist() == sorted(given_row)
        assert ordered.patches_BKE[row, :, 0].tolist() == features[row, places, 0].tolist()


def test_permuted_leaves_the_order_of_the_choice() -> None:
    selected = Selected(torch.tensor([[3, 1, 2]]), torch.ones(1, 3, 2))
    assert order.in_decoder_order(selected, PositionPolicy.PERMUTED) is selected


@pytest.mark.parametrize(
    ("rule", "index"),
    [(MergedId.LAST_VISUAL, 19), (MergedId.MAX_KEPT, 12), (MergedId.CENTROID, 2 * 5 + 1)],
)
def test_places_of_a_merged_token(rule: MergedId, index: int) -> None:
    """Merged from (1, 0), (1, 2) and, as heavy as both, (3, 1): the centre is (2, 1)."""
    weights = torch.zeros(1, 20)
    weights[0, [5, 7, 16]] = torch.tensor([0.1, 0.1, 0.2])
    kept = torch.tensor([[3, 12, 4]])
    features = VisionFeatures(torch.empty(1, 20, 1), grid=GRID)
    assert order.merged_index(rule, features, kept_BM=kept, weights_BN=weights).tolist() == [[index]]


@pytest.mark.parametrize("policy", list(PositionPolicy))
def test_only_merged_tokens_may_share_an_index(policy: PositionPolicy) -> None:
    def ids(kept: list[int], merged: int) -> list[int]:
        found, _ = prompt_position_ids(
            [np.array(kept)], text=(2, 1), visual_tokens=[6], policy=policy, merged=merged
        )
        return [int(each) for each in found]

    with pytest.raises(ValueError, match="distinct"):
        ids([1, 4, 4], 0)
    with pytest.raises(ValueError, match="distinct"):
        ids([4, 4, 4], 1)
    with pytest.raises(ValueError, match="distinct"):
        ids([1, 4, 6], 1)
    shown = ids([1, 4, 4], 1)
    assert shown == ([0, 1, 3, 6, 6, 8] if policy is PositionPolicy.GAP else [0, 1, 2, 3, 4, 5])
