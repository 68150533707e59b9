"""VisPruner: half by class-token attention, half by weeding out what is alike.

Source: VisPruner (arXiv 2412.01818v3). Important tokens: int(K / 2) by attention of the class token (feature layer, mean over
heads). The rest start in score order and are thinned in rounds: the list is split into its even and odd places, every even
token is compared with all odd ones (cosine of the features before the projector), and the up to 8 even ones most alike to
any odd one are dropped; the even survivors, most alike first, then the odd ones are the next round's list.

A round moves no features: all that changes is the place of each token in the list. Where fewer than 8 even tokens are left, a
round drops all of them, where the original's indexing gives up; it fails at lists of odd length too, which are no different here.

In a tower without a class token the scores are those of `cls_attention` there. Where no vector before the projector stands for a token
(Qwen-VL, LLaVA-OneVision's scaled-down grids), tokens are compared after it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures, cls_attention
from gap_export.prune.order import ranks, take
from gap_export.prune.scan import sequential

DROPPED_PER_ROUND = 8
_LESS_THAN_ANY = -4.0  # below every cosine, also when added to one
_DROPPED = -1


def rounds(visual_tokens: int, kept: int) -> int:
    """Rounds that are enough: the last two have nothing to do unless short lists made others drop less than they may."""
    return (visual_tokens - kept + DROPPED_PER_ROUND - 1) // DROPPED_PER_ROUND + 2


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; important tokens come first."""
    visual, important = features.visual_tokens, kept // 2
    wanted = kept - important
    ranked_BN = cls_attention.scores(features).topk(visual, dim=-1).indices
    tokens_BNE = take(normalize(features.patches.float(), dim=-1), ranked_BN)
    alike_BNN = torch.matmul(tokens_BNE, tokens_BNE.transpose(1, 2))

    def thin(place_BN: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """One round; with as many left as wanted, none is dropped and nothing moves."""
        left_B1 = place_BN.amax(dim=-1, keepdim=True) + 1
        evens_B1 = (left_B1 + 1) // 2
        drops_B1 = torch.minimum((left_B1 - wanted).clamp(max=DROPPED_PER_ROUND), evens_B1)
        is_left_BN = place_BN >= 0
        is_odd_BN, is_even_BN = is_left_BN & (place_BN % 2 == 1), is_left_BN & (place_BN % 2 == 0)
        beside_odd_BN = torch.where(is_odd_BN, 0.0, _LESS_THAN_ANY)
        closest_BN = (alike_BNN + beside_odd_BN[:, None]).amax(dim=-1)
        rank_BN = ranks(closest_BN.masked_fill(~is_even_BN, _LESS_THAN_ANY))
        even_place_BN = torch.where(rank_BN < drops_B1, _DROPPED, rank_BN - drops_B1)
        odd_place_BN = evens_B1 - drops_B1 + place_BN // 2
        moved_BN = torch.where(is_even_BN, even_place_BN, torch.where(is_odd_BN, odd_place_BN, _DROPPED))
        return torch.where(drops_B1 > 0, moved_BN, place_BN), left_B1

    # Important tokens take no part in the rounds: to these they look as if dropped.
    ranks_N = torch.arange(visual)
    first_N = torch.where(ranks_N < important, _DROPPED, ranks_N - important)
    first_BN = torch.zeros_like(ranked_BN) + first_N
    place_BN, _ = sequential(thin, first_BN, rounds(visual, kept))
    rest_BN = torch.where(place_BN < 0, visual, place_BN) + important
    order_BN = torch.where(ranks_N < important, ranks_N, rest_BN)
    return Selected(ranked_BN.gather(1, order_BN.topk(kept, dim=-1, largest=False).indices))
