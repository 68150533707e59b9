"""The layout of pruners that append one token for all patches they drop: own patches, that token, padding if any.

Shape letters: B batch, N visual tokens, K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gap_export.positions import PAD, MergedId
from gap_export.prune import VisionFeatures
from gap_export.prune.order import merged_index


@dataclass(frozen=True)
class Layout:
    """What stands in which row.

    Attributes:
        ranked_BK: raster indices in the order of preference; those in rows of their own are kept.
        is_own_BK: rows of patches that are kept, first in each image.
        is_appended_BK: the row after them.
        is_rest_BN: float32, 1 for patches that are not kept.
    """

    ranked_BK: Tensor
    is_own_BK: Tensor
    is_appended_BK: Tensor
    is_rest_BN: Tensor

    def indices(self, merged_id: MergedId, features: VisionFeatures[Tensor], weights_BN: Tensor) -> Tensor:
        """[B, K] int64; `weights_BN` are the shares of the patches in the appended token."""
        own_BK = torch.where(self.is_own_BK, self.ranked_BK, PAD)
        appended_B1 = merged_index(merged_id, features, kept_BM=own_BK, weights_BN=weights_BN)
        return torch.where(self.is_appended_BK, appended_B1, own_BK)


def layout(preference_BN: Tensor, kept: int, own_B1: Tensor | None = None) -> Layout:
    """Lay out K rows.

    Args:
        preference_BN: the patches of highest preference are kept.
        kept: K.
        own_B1: int64, how many patches each image keeps, at least 1; never more than K - 1 are. All K - 1 where left out.
    """
    ranked_BK = preference_BN.topk(kept, dim=-1).indices
    rows_K = torch.arange(kept)
    if own_B1 is None:
        own_B1 = torch.full_like(ranked_BK[:, :1], kept - 1)
    own_B1 = own_B1.clamp(max=kept - 1)
    is_own_BK, is_appended_BK = rows_K < own_B1, rows_K == own_B1
    is_rest_BN = torch.ones_like(preference_BN).scatter(1, ranked_BK, (~is_own_BK).float())
    return Layout(ranked_BK, is_own_BK, is_appended_BK, is_rest_BN)
