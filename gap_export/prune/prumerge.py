"""PruMerge: keep what the class token attends to, add to each survivor its nearest tokens, append the rest as one token.

Source: LLaVA-PruMerge (arXiv 2403.15388). Scores: attention of the class token in the layer that follows the feature layer,
queries and keys at full width, heads not split. Every kept token gets its 32 nearest tokens (cosine of those keys; kept ones
count too) added, weighted by their scores; one more token is the weighted sum of all that were not kept. Nothing is
normalised.

In a tower without a class token the scores are the attention that patches receive from each other, at full width as well.

With a static count, K - 1 tokens are kept by score. With an adaptive one, as many as have outstanding scores (`outliers.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.appended import Layout, layout
from gap_export.prune.order import take
from gap_export.prune.outliers import outlier_count

NEIGHBOURS = 32


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    scores_BN = full_width_scores(features)
    return merged_into(features, scores_BN, layout(scores_BN, kept), merged_id)


def select_adaptive(features: VisionFeatures[Tensor], bound: int, *, merged_id: MergedId) -> Selected:
    """Choose as many tokens of every image as have outlying scores."""
    scores_BN = full_width_scores(features)
    own_B1 = outlier_count(scores_BN)
    selected = merged_into(features, scores_BN, layout(scores_BN, bound, own_B1), merged_id)
    return replace(selected, counts_B=own_B1[:, 0] + 1)


def full_width_scores(features: VisionFeatures[Tensor]) -> Tensor:
    """[B, N] float32, as `VisionFeatures.full_width_attention`."""
    scores_BN = features.full_width_attention
    if scores_BN is None:
        raise ValueError("prumerge needs a vision tower that shows its attention")
    return scores_BN


def merged_into(
    features: VisionFeatures[Tensor], scores_BN: Tensor, layout: Layout, merged_id: MergedId
) -> Selected:
    """Features of the kept tokens with their neighbours added, and the token that stands for all others.

    Args:
        features: of the batch.
        scores_BN: weights of the tokens.
        layout: what is kept in which row.
        merged_id: index of the appended token.
    """
    visual, patches_BNE = features.visual_tokens, features.added_up
    assert features.full_width_keys is not None
    keys_BNE = normalize(features.full_width_keys, dim=-1)
    is_itself_BKN = layout.ranked_BK[:, :, None] == torch.arange(visual)
    alike_BKN = torch.matmul(take(keys_BNE, layout.ranked_BK), keys_BNE.transpose(1, 2))
    # A small image has fewer than 32 others: what is chosen beyond them is no token, but better than the token itself.
    is_large = isinstance(visual, int) and visual > NEIGHBOURS
    others_BKM = pad(
        alike_BKN.masked_fill(is_itself_BKN, -2.0), (0, 0 if is_large else NEIGHBOURS), value=-1.5
    )
    nearest_BKJ = others_BKM.topk(NEIGHBOURS, dim=-1).indices
    is_near_BKN = torch.zeros_like(others_BKM).scatter(2, nearest_BKJ, 1.0)[..., :visual]

    own_BKN = (is_itself_BKN + is_near_BKN * scores_BN[:, None]) * layout.is_own_BK[:, :, None]
    rest_BN = scores_BN * layout.is_rest_BN
    weights_BKN = own_BKN + rest_BN[:, None] * layout.is_appended_BK[:, :, None]
    return Selected(
        layout.indices(merged_id, features, rest_BN),
        torch.matmul(weights_BKN, patches_BNE.float()).to(patches_BNE.dtype),
    )
