"""Random: a seeded draw, the same for every image, baked into the graph. The paper's weakest baseline."""

from __future__ import annotations

import numpy as np
import torch

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def drawn_indices(visual_tokens: int, kept: int, seed: int) -> list[int]:
    """The first K of a seeded permutation of 0..N-1; larger K keeps a superset."""
    permutation = np.random.default_rng(seed).permutation(visual_tokens)
    return [int(index) for index in permutation[:kept]]


class Random:
    """K tokens drawn without looking."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`; the order of the draw stands in for a score."""
        drawn = torch.tensor(drawn_indices(features.visual_tokens, kept, seed), dtype=torch.int64)
        return Selected(drawn.expand(features.patches_BNE.shape[0], -1))
