"""PruMerge+: PruMerge with three of four tokens spread evenly over the picture.

Source: LLaVA-PruMerge (arXiv 2403.15388), the variant that adds an arithmetic sequence of raster indices to the tokens kept by
score; scores, merging and the appended token are PruMerge's. In the original a sequence of about three times as many tokens
is joined with those kept by score, and the count depends on how many are in both.

With a static count: the appended token, then of the other K - 1 a quarter by score and the rest by the sequence, tokens in both
counting for the sequence, so that the next best by score move up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.appended import layout
from gap_export.prune.order import ranks
from gap_export.prune.prumerge import full_width_scores, merged_into


def in_sequence(visual_tokens: int, count: int) -> Tensor:
    """[N] bool: which raster indices are among `count` that are evenly spaced from 0 on, place * N // count."""
    tokens_N = torch.arange(visual_tokens)
    place_N = (tokens_N * count + visual_tokens - 1) // visual_tokens  # the first that does not come earlier
    is_hit_N: Tensor = place_N * visual_tokens // torch.sym_max(count, 1) == tokens_N
    return is_hit_N & (place_N < count)


def by_score(kept: int) -> int:
    """How many of K tokens are kept by score: a quarter of those that are not appended, at least one."""
    best: int = torch.sym_max(1, (kept - 1 + 2) // 4)
    return best


class PruMergePlus:
    """A quarter by full-width class-token attention, three quarters by an even sequence, with merging."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`; tokens kept by score come first."""
        scores_BN = full_width_scores(features)
        best = by_score(kept)
        is_spread_N = in_sequence(features.visual_tokens, kept - 1 - best)
        # (Scores lie in 0..1.)
        is_best_BN = ranks(scores_BN - is_spread_N.float()) < best
        preference_BN = joined(scores_BN, is_best_BN, is_spread_N)
        return merged_into(features, scores_BN, layout(preference_BN, kept), merged_id)


def joined(scores_BN: Tensor, is_best_BN: Tensor, is_spread: Tensor) -> Tensor:
    """Preference [B, N]: tokens kept by score, by score; then the others of the sequence, in raster order; then the rest."""
    visual = scores_BN.shape[1]
    spread_N = -1.0 - torch.arange(visual) / visual
    return torch.where(is_best_BN, scores_BN, torch.where(is_spread, spread_N, -3.0))
