"""VisPruner: half by class-token attention, half by weeding out what is alike.

Source: VisPruner (arXiv 2412.01818v3). Important tokens: int(K / 2) by attention of the class token (feature layer, mean over
heads). The rest start in score order and are thinned in rounds: the list is split into its even and odd places, every even
token is compared with all odd ones (cosine of the features before the projector), and the up to 8 even ones most alike to
any odd one are dropped; the even survivors, most alike first, then the odd ones are the next round's list.

The number of rounds follows from N and K alone, so the loop is laid out in the graph. Where fewer than 8 even tokens are left,
a round drops all of them, where the original's indexing gives up.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.cls_attention import ClsAttention
from gap_export.prune.order import take

DROPPED_PER_ROUND = 8


def rounds(remaining: int, wanted: int) -> list[int]:
    """How many tokens each round drops, until `wanted` are left."""
    drops = []
    while remaining > wanted:
        drops.append(min(DROPPED_PER_ROUND, remaining - wanted, (remaining + 1) // 2))
        remaining -= drops[-1]
    return drops


class VisPruner:
    """Important tokens by attention, diverse ones by elimination."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`; important tokens come first."""
        important = kept // 2
        ranked_BN = ClsAttention().scores(features).topk(features.visual_tokens, dim=-1).indices
        left_BR = ranked_BN[:, important:]
        tokens_BRE = take(normalize(features.patches_BNE.float(), dim=-1), left_BR)
        alike_BRR = torch.matmul(tokens_BRE, tokens_BRE.transpose(1, 2))
        for dropped in rounds(left_BR.shape[1], kept - important):
            closest_BV = alike_BRR[:, ::2, 1::2].amax(dim=-1)
            survivors_BV = closest_BV.topk(closest_BV.shape[1], dim=-1).indices[:, dropped:] * 2
            odd_O = torch.arange(1, left_BR.shape[1], 2)
            places_BR = torch.cat([survivors_BV, odd_O.expand(left_BR.shape[0], -1)], dim=1)
            left_BR = left_BR.gather(1, places_BR)
            alike_BRR = take(take(alike_BRR, places_BR).transpose(1, 2), places_BR)
        return Selected(torch.cat([ranked_BN[:, :important], left_BR], dim=1))
