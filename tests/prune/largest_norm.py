"""A pruner from outside the package: the patches of largest norm, as many as are above the mean where the image decides.

Row, tensor code and float64 twin are all that there is of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gap_export.positions import PAD, MergedId
from gap_export.prune import Pruner, Selected, VisionFeatures
from gap_export.prune.reference import Choice, Floats

ROW = Pruner(
    "largest_norm", "the patches of largest norm", reference=__name__, module=__name__, adaptive=True
)


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """See `PrunerModule.select`."""
    return Selected(_norms(features).topk(kept, dim=-1).indices)


def select_adaptive(features: VisionFeatures[Tensor], bound: int, *, merged_id: MergedId) -> Selected:
    """See `AdaptiveModule.select_adaptive`."""
    norms_BN = _norms(features)
    counts_B = (norms_BN > norms_BN.mean(dim=-1, keepdim=True)).to(torch.int64).sum(dim=-1)
    is_chosen_BK = torch.arange(bound) < counts_B[:, None]
    return Selected(torch.where(is_chosen_BK, norms_BN.topk(bound, dim=-1).indices, PAD), counts_B=counts_B)


def _norms(features: VisionFeatures[Tensor]) -> Tensor:
    norms_BN: Tensor = features.patches.float().square().sum(dim=-1)
    return norms_BN


def largest_norm(features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId) -> Choice:
    """See `Twin`."""
    squared = [sum(value**2 for value in patch) for patch in features.patches.tolist()]
    ranked = sorted(range(len(squared)), key=lambda patch: -squared[patch])
    margin = squared[ranked[kept - 1]] / squared[ranked[kept]] - 1 if kept < len(ranked) else np.inf
    return Choice(np.array(ranked[:kept], np.int64), margin=margin)


def largest_norm_adaptive(features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId) -> Choice:
    """See `AdaptiveTwin`."""
    squared = np.array([sum(value**2 for value in patch) for patch in features.patches.tolist()])
    needed = int((squared > squared.mean()).sum())
    choice = largest_norm(features, min(needed, bound), seed=0, merged_id=merged_id)
    return Choice(choice.indices_K, margin=choice.margin, needed=needed)
