"""TRIM: keep the patches that match the expression, and sum up the rest in one token.

Source: TRIM (arXiv 2409.10994). Scores: softmax over the patches of the *raw* product of patch and text embeddings, not
normalised, its sign turned (see `text_similarity.py`). One more token is the mean of the features, before the projector, of all
that were not kept; it comes last.

With a static count, K - 1 tokens are kept by score. With an adaptive one, as many as have outstanding scores (`outliers.py`).
The original scores the whole question, here the expression is scored alone. It cuts long texts off at the context of the text tower;
here they are refused when they are given. Its softmax is 0 in float32 for all but a few patches; here none vanish (`_relative_scores`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.appended import Layout, layout
from gap_export.prune.order import take
from gap_export.prune.outliers import outlier_count
from gap_export.prune.text_similarity import aligned_pair, matching

_FAR_ABOVE = 60.0
"""Logarithm of a score that is an outlier whatever the others are; its exponential is finite in float32."""


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    return _with_mean(features, layout(_logits(features), kept), merged_id)


def select_adaptive(features: VisionFeatures[Tensor], bound: int, *, merged_id: MergedId) -> Selected:
    """Choose as many tokens of every image as have outlying scores."""
    logits_BN = _logits(features)
    own_B1 = outlier_count(_relative_scores(logits_BN))
    selected = _with_mean(features, layout(logits_BN, bound, own_B1), merged_id)
    return replace(selected, counts_B=own_B1[:, 0] + 1)


def _logits(features: VisionFeatures[Tensor]) -> Tensor:
    """[B, N] float32; ranked as the scores are, but apart where the softmax of far ones is 0."""
    aligned_BNP, text_BP = aligned_pair(features)
    return matching(features, torch.matmul(aligned_BNP, text_BP[..., None])[..., 0])


def _relative_scores(logits_BN: Tensor) -> Tensor:
    """[B, N] float32: the softmax but for a factor, chosen so that the upper quartile is about 1.

    The rule for outliers does not mind the factor. The softmax itself is a few scores near 1 and, where products are large, nothing but
    zeros at the quartiles that decide. What is far above them may be cut off.
    """
    ranked_BN = logits_BN.topk(logits_BN.shape[1], dim=-1).values
    quartile_B1 = ranked_BN[:, (logits_BN.shape[1] - 1) // 4, None]
    return (logits_BN - quartile_B1).clamp(max=_FAR_ABOVE).exp()


def _with_mean(features: VisionFeatures[Tensor], layout: Layout, merged_id: MergedId) -> Selected:
    patches_BNE = features.added_up
    shares_BN = layout.is_rest_BN / layout.is_rest_BN.sum(dim=-1, keepdim=True)
    mean_B1E = torch.matmul(shares_BN[:, None], patches_BNE.float()).to(patches_BNE.dtype)
    return Selected(
        layout.indices(merged_id, features, shares_BN),
        torch.where(layout.is_appended_BK[..., None], mean_B1E, take(patches_BNE, layout.ranked_BK)),
    )
