"""No pruning: every token is kept. The unpruned baseline, through the same graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; `kept` must be N, which every call tells where images differ."""
    if features.grid is not None and kept != features.visual_tokens:
        raise ValueError(f"none keeps all {features.visual_tokens} tokens, not {kept}")
    return Selected(torch.arange(kept).expand(features.patches.shape[0], -1))
