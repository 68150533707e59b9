"""VisionZip: the class token, what it attends to most, and a few tokens that sum up the rest.

Source: VisionZip (arXiv 2412.04467). Dominant tokens: the class token itself and the patches it attends to most in the
feature layer (sum over heads, which ranks as the mean does). Contextual tokens: of the remaining patches, in raster order, every
`step`-th is a target; each of the others goes to the target it is most alike (cosine of the layer's keys, mean over heads), and
a target becomes itself plus the mean of what went to it.

K splits 54 : 10 into dominant and contextual tokens, as in the original's 64. Contextual tokens stand where their targets
stand; the class token stands nowhere and is given an index by `merged_id`, its attention being the weights.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.cls_attention import ClsAttention
from gap_export.prune.order import merged_index, take


def contextual_count(kept: int) -> int:
    """How many of K tokens are contextual: 10 of 64, rounded."""
    return (kept * 10 + 32) // 64


def target_places(remaining: int, count: int) -> list[int]:
    """Which of the remaining tokens are targets: every step-th, the first `count` of them."""
    step = max(1, remaining // max(1, count))
    return [place * step for place in range(count)]


class VisionZip:
    """Class token, dominant patches, contextual tokens."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`: class token, dominant patches by score, contextual tokens in raster order."""
        if features.class_token_BE is None or features.keys_BATD is None:
            raise ValueError("visionzip needs a vision tower with a class token")
        contextual = contextual_count(kept)
        dominant = kept - contextual - 1
        scores_BN = ClsAttention().scores(features)
        ranked_BN = scores_BN.topk(features.visual_tokens, dim=-1).indices
        dominant_BD, rest_BR = ranked_BN[:, :dominant], ranked_BN[:, dominant:].sort(dim=-1).values

        remaining = features.visual_tokens - dominant
        targets = target_places(remaining, contextual)
        others = sorted(set(range(remaining)) - set(targets))
        targets_BC, others_BO = rest_BR[:, targets], rest_BR[:, others]
        chosen_BM = torch.cat([dominant_BD, targets_BC], dim=1)
        class_B1 = merged_index(merged_id, kept_BM=chosen_BM, weights_BN=scores_BN, grid=features.grid)
        indices_BK = torch.cat([class_B1, chosen_BM], dim=1)

        patches_BNE = features.patches_BNE
        class_B1E, dominant_BDE = features.class_token_BE[:, None], take(patches_BNE, dominant_BD)
        if not contextual:
            return Selected(indices_BK, torch.cat([class_B1E, dominant_BDE], dim=1))
        keys_BND = features.keys_BATD[:, :, 1:].float().mean(dim=1)
        target_keys_BCD = normalize(take(keys_BND, targets_BC), dim=-1)
        other_keys_BOD = normalize(take(keys_BND, others_BO), dim=-1)
        nearest_BO = torch.matmul(other_keys_BOD, target_keys_BCD.transpose(1, 2)).argmax(dim=-1)
        goes_BCO = (nearest_BO[:, None] == torch.arange(contextual)[:, None]).float()
        mean_BCO = goes_BCO / goes_BCO.sum(dim=-1, keepdim=True).clamp(min=1.0)
        gathered_BCE = torch.matmul(mean_BCO, take(patches_BNE, others_BO).float())
        contextual_BCE = take(patches_BNE, targets_BC).float() + gathered_BCE
        return Selected(
            indices_BK, torch.cat([class_B1E, dominant_BDE, contextual_BCE.to(patches_BNE.dtype)], dim=1)
        )
