"""Random: a seeded draw, the same for every image, baked into the graph. The paper's weakest baseline."""

from __future__ import annotations

import numpy as np
import torch

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def drawn_indices(visual_tokens: int, seed: int) -> list[int]:
    """A seeded permutation of 0..N-1; the first K are the draw, so that a larger K keeps a superset."""
    return [int(index) for index in np.random.default_rng(seed).permutation(visual_tokens)]


class Random:
    """K tokens drawn without looking."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`; the order of the draw stands in for a score."""
        drawn_N = torch.tensor(drawn_indices(features.visual_tokens, seed), dtype=torch.int64)
        return Selected(drawn_N[:kept].expand(features.patches_BNE.shape[0], -1))
