"""From what a pruner chose to what enters the decoder: order, and indices for tokens that have none of their own.

Shape letters: B batch, N visual tokens, K kept, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.positions import MergedId, PositionPolicy
from gap_export.prune import Selected


def take(features_BNE: Tensor, indices_BK: Tensor) -> Tensor:
    """[B, N, E] at [B, K] int64 -> [B, K, E]."""
    return features_BNE.gather(1, indices_BK[:, :, None].expand(-1, -1, features_BNE.shape[-1]))


def in_decoder_order(selected: Selected, policy: PositionPolicy) -> Selected:
    """Put tokens into the order in which they enter the decoder.

    TopK gives score order. Under every policy but `permuted` tokens are sorted by raster index, so that raster order,
    causal order and position order agree; of two with the same index, the better one comes first.
    """
    if not policy.keeps_raster_order:
        return selected
    indices_BK, patches_BKE = selected.indices_BK, selected.patches_BKE
    if patches_BKE is None:
        return Selected(indices_BK.sort(dim=-1).values)
    # One sort of (index, place) packed into one integer is stable on every runtime, and tells the places as well.
    kept = indices_BK.shape[1]
    places_BK = (indices_BK * kept + torch.arange(kept)).sort(dim=-1).values % kept
    return Selected(indices_BK.gather(1, places_BK), take(patches_BKE, places_BK))


def merged_index(
    merged_id: MergedId, *, kept_BM: Tensor, weights_BN: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The raster index that a token stands for which was merged from many patches.

    Args:
        merged_id: the rule.
        kept_BM: raster indices of the patches that were kept.
        weights_BN: share of each patch in the merged token, not negative; need not sum to one.
        grid: (rows, columns).

    Returns:
        [B, 1] int64.
    """
    rows, columns = grid
    if merged_id is MergedId.LAST_VISUAL:
        return torch.full_like(kept_BM[:, :1], rows * columns - 1)
    if merged_id is MergedId.MAX_KEPT:
        return kept_BM.amax(dim=1, keepdim=True)
    shares_BN = weights_BN.float() / weights_BN.float().sum(dim=1, keepdim=True)
    places_N2 = torch.stack(
        [torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)], dim=1
    )
    nearest_B2 = (torch.matmul(shares_BN, places_N2.float()) + 0.5).floor().to(torch.int64)
    return nearest_B2[:, :1] * columns + nearest_B2[:, 1:]
