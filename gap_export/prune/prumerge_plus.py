"""PruMerge+: PruMerge with three of four tokens spread evenly over the picture.

Source: LLaVA-PruMerge (arXiv 2403.15388), the variant that adds an arithmetic sequence of raster indices to the tokens kept by
score; scores, merging and the appended token are PruMerge's. In the original a sequence of about three times as many tokens
is joined with those kept by score, and the count depends on how many are in both. Here it is K: the appended token, then of
the other K - 1 a quarter by score and the rest by the sequence, tokens in both counting for the sequence, so that the next
best by score move up.
"""

from __future__ import annotations

import torch

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.prumerge import full_width_scores, merged_into


def sequence_indices(visual_tokens: int, count: int) -> list[int]:
    """`count` raster indices, evenly spaced from 0 on."""
    return [place * visual_tokens // count for place in range(count)]


def by_score(kept: int) -> int:
    """How many of K tokens are kept by score: a quarter of those that are not appended, at least one."""
    return max(1, (kept - 1 + 2) // 4)


class PruMergePlus:
    """A quarter by full-width class-token attention, three quarters by an even sequence, with merging."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`; tokens kept by score come first."""
        scores_BN = full_width_scores(features)
        best = by_score(kept)
        spread = torch.tensor(sequence_indices(features.visual_tokens, kept - 1 - best), dtype=torch.int64)
        taken_N = torch.zeros(features.visual_tokens).scatter(0, spread, 1.0)
        best_BM = (scores_BN - taken_N).topk(best, dim=-1).indices  # scores lie in 0..1
        own_BM = torch.cat([best_BM, spread.expand(scores_BN.shape[0], -1)], dim=1)
        return merged_into(features, scores_BN, own_BM, merged_id)
