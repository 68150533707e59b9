"""Class-token attention: keep the patches that the class token looks at most.

Source: FasterVLM (arXiv 2412.01818), score: attention of the class token to each patch, mean over heads, in the layer
whose output the decoder gets; top-k. The other rows of the attention map are not needed, so only that one is computed.

In a tower without a class token: attention received from all patches, the mean of those rows, as VisPruner's authors have it for SigLIP.
"""

from __future__ import annotations

from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def scores(features: VisionFeatures[Tensor]) -> Tensor:
    """Score of every patch.

    Returns:
        [B, N] float32, as `VisionFeatures.attention`.
    """
    scores_BN = features.attention
    if scores_BN is None:
        raise ValueError("cls_attention needs a vision tower that shows its attention")
    return scores_BN


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    return Selected(scores(features).topk(kept, dim=-1).indices)
