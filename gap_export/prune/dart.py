"""DART: a few pivot tokens, and the tokens that repeat them least.

Source: DART (arXiv 2502.11494), duplication rather than importance: pivots are chosen, and each in turn takes its share of the
tokens left that are least alike to it (cosine). Tokens are the projected ones, pivots those of highest L1 norm, as in NVIDIA's
TensorRT-Edge-LLM, which prunes between projector and decoder as well.

That variant has text tokens among its pivots. They are left out here: tokens are dropped in the vision graph, before any
prompt is known, so that one encoded picture serves every question about it.

K splits into 4 pivots and K - 4 others, dealt evenly, the first pivots taking one more; below 4 all are pivots.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.order import take

PIVOTS = 4
_BEYOND_ANY = 4.0


def shares(kept: int) -> list[int]:
    """How many tokens each pivot takes."""
    pivots = min(PIVOTS, kept)
    others = kept - pivots
    return [others // pivots + (pivot < others % pivots) for pivot in range(pivots)]


class Dart:
    """Pivots by L1 norm, others by least similarity to a pivot."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`: pivots, then what each of them took, least alike first."""
        if features.projected_BNH is None:
            raise ValueError("dart needs projected tokens")
        tokens_BNH = features.projected_BNH.float()
        chosen = [tokens_BNH.abs().sum(dim=-1).topk(min(PIVOTS, kept), dim=-1).indices]
        directions_BNH = normalize(tokens_BNH, dim=-1)
        alike_BPN = torch.matmul(take(directions_BNH, chosen[0]), directions_BNH.transpose(1, 2))
        for pivot, share in enumerate(shares(kept)):
            if share:
                taken_BN = torch.zeros_like(alike_BPN[:, 0]).scatter(1, torch.cat(chosen, dim=1), _BEYOND_ANY)
                chosen.append((alike_BPN[:, pivot] + taken_BN).topk(share, dim=-1, largest=False).indices)
        return Selected(torch.cat(chosen, dim=1))
