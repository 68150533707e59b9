"""From what a pruner chose to what enters the decoder: order, and indices for tokens that have none of their own.

Shape letters: B batch, N visual tokens, K kept, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.positions import MergedId, PositionPolicy
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.grids import nearest_to_centre

_AFTER_ALL = 1 << 16
"""Stands for the index of padding in a sort: above every raster index, and times K still an int32."""


def take(features_BNE: Tensor, indices_BK: Tensor) -> Tensor:
    """[B, N, E] at [B, K] int64 -> [B, K, E]."""
    return features_BNE.gather(1, indices_BK[:, :, None].expand(-1, -1, features_BNE.shape[-1]))


def ranks(values_BN: Tensor) -> Tensor:
    """[B, N] int64: the place of each value in descending order."""
    order_BN = values_BN.topk(values_BN.shape[1], dim=-1).indices
    places_N = torch.arange(values_BN.shape[1])
    return torch.zeros_like(order_BN).scatter(1, order_BN, places_N.expand_as(order_BN))


def in_decoder_order(selected: Selected, policy: PositionPolicy) -> Selected:
    """Put tokens into the order in which they enter the decoder.

    TopK gives score order. Under every policy but `permuted` tokens are sorted by raster index, so that raster order,
    causal order and position order agree; of two with the same index, the better one comes first. Padding stays last.
    """
    if not policy.keeps_raster_order:
        return selected
    indices_BK, patches_BKE, counts_B = selected.indices_BK, selected.patches_BKE, selected.counts_B
    if patches_BKE is None and counts_B is None:
        return Selected(indices_BK.sort(dim=-1).values)
    # One sort of (index, place) packed into one integer is stable on every runtime, and tells the places as well.
    keys_BK = indices_BK if counts_B is None else torch.where(indices_BK < 0, _AFTER_ALL, indices_BK)
    kept = indices_BK.shape[1]
    base_1 = torch.full((1,), kept)  # (the exporter knows no remainder by a symbolic number)
    places_BK = (keys_BK * base_1 + torch.arange(kept)).sort(dim=-1).values % base_1
    ordered_BKE = None if patches_BKE is None else take(patches_BKE, places_BK)
    return Selected(indices_BK.gather(1, places_BK), ordered_BKE, counts_B)


def merged_index(
    merged_id: MergedId, features: VisionFeatures[Tensor], *, kept_BM: Tensor, weights_BN: Tensor
) -> Tensor:
    """The raster index that a token stands for which was merged from many patches.

    Args:
        merged_id: the rule.
        features: of the batch.
        kept_BM: raster indices of the patches that were kept; `PAD` among them counts for nothing.
        weights_BN: share of each patch in the merged token, not negative; need not sum to one.

    Returns:
        [B, 1] int64.

    Raises:
        ValueError: a centroid of tokens that lie on no grid.
    """
    if merged_id is MergedId.LAST_VISUAL:
        return torch.full_like(kept_BM[:, :1], weights_BN.shape[1] - 1)
    if merged_id is MergedId.MAX_KEPT:
        return kept_BM.amax(dim=1, keepdim=True)
    return nearest_to_centre(features.laid_out, weights_BN)
