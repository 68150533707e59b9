"""PruMerge+: PruMerge with three of four tokens spread evenly over the image.

Source: LLaVA-PruMerge (arXiv 2403.15388), the variant that adds an arithmetic sequence of raster indices to the tokens kept by
score; scores, merging and the appended token are PruMerge's.

With an adaptive count, as many tokens are kept by score as PruMerge keeps, C of N, and joined with a sequence of about three times
as many: 0, step, 2 step .. N - 2 with step = N / (3 C), rounded down. The count depends on how many are in both. Where that would
be all tokens, the last one is what the appended token stands for.

With a static count: the appended token, then of the other K - 1 a quarter by score and the rest by the sequence, tokens in both
counting for the sequence, so that the next best by score move up. (The original's static mode, for training, has as many of the
one as of the other, tokens in both twice.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.appended import layout
from gap_export.prune.order import ranks
from gap_export.prune.outliers import outlier_count
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


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; tokens kept by score come first."""
    scores_BN = full_width_scores(features)
    best = by_score(kept)
    is_spread_N = in_sequence(features.visual_tokens, kept - 1 - best)
    # (Scores lie in 0..1.)
    is_best_BN = ranks(scores_BN - is_spread_N.float()) < best
    preference_BN = joined(scores_BN, is_best_BN, is_spread_N)
    return merged_into(features, scores_BN, layout(preference_BN, kept), merged_id)


def select_adaptive(features: VisionFeatures[Tensor], bound: int, *, merged_id: MergedId) -> Selected:
    """Choose as many tokens of every image as have outlying scores; tokens kept by score come first."""
    visual, scores_BN = features.visual_tokens, full_width_scores(features)
    best_B1, tokens_N = outlier_count(scores_BN), torch.arange(features.visual_tokens)
    is_best_BN = ranks(scores_BN) < best_B1
    # No more than a quarter can be outliers, so that a step is at least one. (TensorRT-RTX does not build this division
    # in integers. With the half no rounding can reach the next one.)
    step_B1 = ((visual + 0.5) / (3 * best_B1).float()).floor().to(torch.int64)
    is_spread_BN = (tokens_N % step_B1 == 0) & (tokens_N < visual - 1)
    own_B1 = (is_best_BN | is_spread_BN).float().sum(dim=-1, keepdim=True).to(torch.int64)
    own_B1 = own_B1.clamp(max=visual - 1)
    preference_BN = joined(scores_BN, is_best_BN, is_spread_BN)
    selected = merged_into(features, scores_BN, layout(preference_BN, bound, own_B1), merged_id)
    return replace(selected, counts_B=own_B1[:, 0] + 1)


def joined(scores_BN: Tensor, is_best_BN: Tensor, is_spread: Tensor) -> Tensor:
    """Preference [B, N]: tokens kept by score, by score; then the others of the sequence, in raster order; then the rest."""
    visual = scores_BN.shape[1]
    spread_N = -1.0 - torch.arange(visual) / visual
    return torch.where(is_best_BN, scores_BN, torch.where(is_spread, spread_N, -3.0))
