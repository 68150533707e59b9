"""Attention within every tile, as `cls_attention` has it: the same share of each is kept, whatever the others show.

Source: FasterVLM (arXiv 2412.01818) on LLaVA-NeXT, which treats tiles as images of their own. Patches are ranked among those of
their own tile, and kept by the share of the tile that comes before them, so that K needs no division among the tiles. With one
tile it is `cls_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures, cls_attention

SHARES = 2**19
"""Steps of a share: fine enough for tiles of 729 patches and parts of them, and all products stay below 2**31."""

MOST_TILES = 64


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; of patches at the same place in their tiles, that of the first tile is better."""
    scores_BN, places_N = cls_attention.scores(features), torch.arange(features.visual_tokens)
    tile_N = torch.zeros_like(places_N) if features.tile is None else features.tile
    beside_NN = tile_N[:, None] == tile_N
    mine_BN1, theirs_B1N = scores_BN[:, :, None], scores_BN[:, None]
    is_better_BNN = (theirs_B1N > mine_BN1) | ((theirs_B1N == mine_BN1) & (places_N < places_N[:, None]))
    rank_BN = (is_better_BNN & beside_NN).to(torch.int64).sum(dim=-1)
    share_BN = (2 * rank_BN + 1) * SHARES // beside_NN.to(torch.int64).sum(dim=-1)
    return Selected((share_BN * MOST_TILES + tile_N).topk(kept, dim=-1, largest=False).indices)
