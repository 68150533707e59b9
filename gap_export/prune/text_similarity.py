"""Text similarity: keep the patches that match the expression best, in the space that CLIP shares between images and text.

One of the four baselines of GAP (arXiv 2506.21873), which names it and does not define it. This is the natural reading: top-k by
cosine of patch and text.

In that space patches of OpenAI's CLIP are *less* like the text that describes them than others are (CLIP Surgery, arXiv
2304.05653), and so the published text-aware pruners (TRIM, CDPruner) turn the sign. Which sign is right for a tower,
`VisionFeatures.aligned_inversely` says; all pruners that read text follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def scores(features: VisionFeatures[Tensor]) -> Tensor:
    """Score of every patch.

    Returns:
        [B, N] float32: cosine with the text, its sign such that patches which match have more.
    """
    aligned_BNP, text_BP = aligned_pair(features)
    cosine_BN = torch.matmul(normalize(aligned_BNP, dim=-1), normalize(text_BP, dim=-1)[..., None])
    return matching(features, cosine_BN[..., 0])


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    return Selected(scores(features).topk(kept, dim=-1).indices)


def aligned_pair(features: VisionFeatures[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, N, P] and [B, P] float32: patches and expression in the space they share."""
    if features.aligned is None or features.text is None:
        raise ValueError("pruners that look at the expression need a text tower")
    return features.aligned.float(), features.text.float()


def matching(features: VisionFeatures[Tensor], similarity_BN: Tensor) -> Tensor:
    """The similarity, its sign turned where patches that match are less similar than others."""
    return -similarity_BN if features.aligned_inversely else similarity_BN
