"""Random: a seeded draw, the same for every image, baked into the graph. The paper's weakest baseline."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gap_export.positions import Ids, MergedId
from gap_export.prune import Selected, VisionFeatures

MOST_TOKENS = 2**14
"""Images have no more visual tokens than this."""


def lots(seed: int) -> Ids:
    """[MOST_TOKENS] int64: the lot that each token draws, all different. The lowest ones are kept."""
    return np.random.default_rng(seed).permutation(MOST_TOKENS).astype(np.int64)


def drawn_indices(visual_tokens: int, seed: int) -> list[int]:
    """A seeded order of 0..N-1; the first K are the draw, so that a larger K keeps a superset."""
    return [int(index) for index in np.argsort(lots(seed)[:visual_tokens])]


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; the order of the draw stands in for a score."""
    images = features.patches.shape[0]
    if features.grid is not None:
        drawn_N = torch.tensor(drawn_indices(features.visual_tokens, seed), dtype=torch.int64)
        return Selected(drawn_N[:kept].expand(images, -1))
    lots_N = torch.tensor(lots(seed), dtype=torch.float32)[: features.visual_tokens]
    return Selected(lots_N.topk(kept, largest=False).indices.expand(images, -1))
