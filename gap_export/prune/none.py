"""No pruning: every token is kept. The unpruned baseline, through the same graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.prune import VisionFeatures


class KeepAll:
    """All N tokens in raster order."""

    name = "none"
    needs_class_token = False
    needs_seed = False

    def select(self, features: VisionFeatures, kept: int, seed: int) -> Tensor:
        """See `Pruner.select`; `kept` must be N."""
        if kept != features.visual_tokens:
            raise ValueError(f"none keeps all {features.visual_tokens} tokens, not {kept}")
        return torch.arange(kept).expand(features.patches_BNE.shape[0], -1)
