"""PruMerge: keep what the class token attends to, add to each survivor its nearest tokens, append the rest as one token.

Source: LLaVA-PruMerge (arXiv 2403.15388). Scores: attention of the class token in the layer that follows the feature layer,
queries and keys at full width, heads not split. Every kept token gets its 32 nearest tokens (cosine of those keys; kept ones
count too) added, weighted by their scores; one more token is the weighted sum of all that were not kept. Nothing is
normalised.

The original adapts the count to the batch. Here it is K: K - 1 tokens by score and the appended one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.order import merged_index, take

NEIGHBOURS = 32


class PruMerge:
    """Top-k by full-width class-token attention, with merging."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`."""
        scores_BN = full_width_scores(features)
        return merged_into(features, scores_BN, scores_BN.topk(kept - 1, dim=-1).indices, merged_id)


def full_width_scores(features: VisionFeatures) -> Tensor:
    """[B, N] float32: softmax over class token and patches in the following layer, class column dropped."""
    query_BE, keys_BTE = features.following_query_BE, features.following_keys_BTE
    if query_BE is None or keys_BTE is None:
        raise ValueError(
            "prumerge needs a vision tower with a class token and a layer after the feature layer"
        )
    logits_BT = (
        torch.matmul(keys_BTE.float(), query_BE.float()[..., None])[..., 0] * query_BE.shape[-1] ** -0.5
    )
    scores_BN: Tensor = logits_BT.softmax(dim=-1)[:, 1:]
    return scores_BN


def merged_into(features: VisionFeatures, scores_BN: Tensor, own_BM: Tensor, merged_id: MergedId) -> Selected:
    """Features of the kept tokens with their neighbours added, and the token that stands for all others.

    Args:
        features: of the batch.
        scores_BN: weights of the tokens.
        own_BM: raster indices of the M = K - 1 tokens kept, best first.
        merged_id: index of the appended token.
    """
    assert features.following_keys_BTE is not None
    visual = features.visual_tokens
    patches_BNE = features.patches_BNE
    keys_BNE = normalize(features.following_keys_BTE[:, 1:].float(), dim=-1)
    is_own_BMN = own_BM[:, :, None] == torch.arange(visual)
    alike_BMN = torch.matmul(take(keys_BNE, own_BM), keys_BNE.transpose(1, 2)).masked_fill(is_own_BMN, -2.0)
    nearest_BMJ = alike_BMN.topk(min(NEIGHBOURS, visual - 1), dim=-1).indices
    is_near_BMN = torch.zeros_like(alike_BMN).scatter(2, nearest_BMJ, 1.0)

    weights_BMN = is_own_BMN.float() + is_near_BMN * scores_BN[:, None]
    rest_BN = scores_BN * (1.0 - is_own_BMN.float().sum(dim=1))
    merged_BKE = torch.matmul(torch.cat([weights_BMN, rest_BN[:, None]], dim=1), patches_BNE.float())
    index_B1 = merged_index(merged_id, kept_BM=own_BM, weights_BN=rest_BN, grid=features.grid)
    return Selected(torch.cat([own_BM, index_B1], dim=1), merged_BKE.to(patches_BNE.dtype))
