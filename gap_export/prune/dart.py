"""DART: a few pivot tokens, and the tokens that repeat them least.

Source: DART (arXiv 2502.11494), duplication rather than importance: pivots are chosen, and each in turn takes its share of the
tokens left that are least alike to it (cosine). Tokens are the projected ones, pivots those of highest L1 norm, as in NVIDIA's
TensorRT-Edge-LLM, which prunes between projector and decoder as well.

That variant has text tokens among its pivots. They are left out here, so that one encoded image serves every question
about it. DART's own code prunes behind an early decoder layer instead: pivots have the largest keys (L1 norm), likeness is the cosine
of normalised hidden states.

K splits into 4 pivots and K - 4 others, assigned evenly, the first pivots taking one more; below 4 all are pivots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.order import ranks, take

PIVOTS = 4
_BEYOND_ANY = 4.0


def shares(kept: int) -> tuple[int, ...]:
    """How many tokens each pivot takes."""
    others = torch.sym_max(kept - PIVOTS, 0)
    return tuple((others + PIVOTS - 1 - pivot) // PIVOTS for pivot in range(PIVOTS))


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image: pivots, then what each of them took, least alike first."""
    if features.projected is None:
        raise ValueError("dart needs projected tokens")
    tokens_BNH = features.projected.float()
    pivots_BP = tokens_BNH.abs().sum(dim=-1).topk(PIVOTS, dim=-1).indices
    directions_BNH = normalize(tokens_BNH, dim=-1)
    alike_BPN = torch.matmul(take(directions_BNH, pivots_BP), directions_BNH.transpose(1, 2))
    # A token's place in the order of the choice; N where no pivot has taken it.
    visual = features.visual_tokens
    place_BN = torch.full_like(alike_BPN[:, 0], visual, dtype=torch.int64)
    place_BN = place_BN.scatter(1, pivots_BP, torch.arange(PIVOTS).expand_as(pivots_BP))
    taken = PIVOTS
    for pivot, share in enumerate(shares(kept)):
        rank_BN = ranks(-alike_BPN[:, pivot].masked_fill(place_BN < visual, _BEYOND_ANY))
        place_BN = torch.where(rank_BN < share, taken + rank_BN, place_BN)
        taken = taken + share
    return Selected(place_BN.topk(kept, dim=-1, largest=False).indices)
