"""VisionZip: the class token, what it attends to most, and a few tokens that sum up the rest.

Source: VisionZip (arXiv 2412.04467). Dominant tokens: the class token itself and the patches it attends to most in the
feature layer (sum over heads, which ranks as the mean does). Contextual tokens: of the remaining patches, in raster order, every
`step`-th is a target; each of the others goes to the target it is most alike (cosine of the layer's keys, mean over heads), and
a target becomes itself plus the mean of what went to it.

K splits 54 : 10 into dominant and contextual tokens, as in the original's 64. Contextual tokens stand where their targets
stand; the class token, first in the original, stands nowhere and is given an index by `merged_id`, its attention being the weights.

Where the tower has no class token, or none that the decoder could take, all K are patches; without one, patches are ranked by the attention
that they receive from each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures, cls_attention
from gap_export.prune.order import merged_index, take

_LESS_THAN_ANY = -2.0


def contextual_count(kept: int) -> int:
    """How many of K tokens are contextual: 10 of 64, rounded."""
    return (kept * 10 + 32) // 64


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image: class token, dominant patches by score, contextual tokens in raster order."""
    visual, patches_BNE, class_token_BE = features.visual_tokens, features.added_up, features.class_token
    contextual, leading = contextual_count(kept), 0 if class_token_BE is None else 1
    dominant = kept - contextual - leading
    step = torch.sym_max(1, (visual - dominant) // torch.sym_max(1, contextual))
    rows_K = torch.arange(kept)
    is_class_K, is_target_K = rows_K < leading, rows_K >= leading + dominant

    scores_BN = cls_attention.scores(features)
    ranked_BN = scores_BN.topk(visual, dim=-1).indices
    # In raster order, dominant patches behind all others.
    behind_N = torch.where(torch.arange(visual) < dominant, visual, 0)
    rest_BN = (ranked_BN + behind_N).sort(dim=-1).values
    # (The row of the class token stands in for that of the first dominant patch until the end.)
    dominant_BK = ranked_BN[:, (rows_K - leading).clamp(min=0)]
    target_BK = rest_BN[:, (rows_K - leading - dominant).clamp(min=0) * step]
    chosen_BK = torch.where(is_target_K, target_BK, dominant_BK)

    if features.mean_keys is None:
        raise ValueError("visionzip needs a vision tower that shows its keys")
    keys_BND = normalize(features.mean_keys, dim=-1)
    alike_BKN = torch.matmul(take(keys_BND, chosen_BK), keys_BND.transpose(1, 2))
    nearest_BN = alike_BKN.masked_fill(~is_target_K[:, None], _LESS_THAN_ANY).argmax(dim=1)
    is_other_BN = torch.ones_like(scores_BN).scatter(1, chosen_BK, 0.0)
    goes_BKN = (nearest_BN[:, None] == rows_K[:, None]) * is_target_K[:, None] * is_other_BN[:, None]
    mean_BKN = goes_BKN / goes_BKN.sum(dim=-1, keepdim=True).clamp(min=1.0)
    tokens_BKE = take(patches_BNE, chosen_BK).float() + torch.matmul(mean_BKN, patches_BNE.float())
    tokens_BKE = tokens_BKE.to(patches_BNE.dtype)
    if class_token_BE is None:
        return Selected(chosen_BK, tokens_BKE)
    class_B1 = merged_index(merged_id, features, kept_BM=chosen_BK, weights_BN=scores_BN)
    return Selected(
        torch.where(is_class_K, class_B1, chosen_BK),
        torch.where(is_class_K[:, None], class_token_BE[:, None], tokens_BKE),
    )
