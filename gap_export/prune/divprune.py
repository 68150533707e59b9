"""DivPrune: a subset in which the two tokens most alike are as different as can be.

Source: DivPrune (arXiv 2503.02175), greedy max-min diversity over projected tokens with cosine distance: first the token
whose nearest neighbour is farthest, then always the one that is farthest from everything chosen.

The choice is sequential: K steps. Each keeps the distance of every token to the nearest chosen one and updates it with one
row of the distance matrix, so that a step costs O(N).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.order import take
from gap_export.prune.scan import sequential

_FARTHER_THAN_ANY = 3.0
_NEARER_THAN_ANY = -1.0


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; best first is the order of the choice."""
    if features.projected is None:
        raise ValueError("divprune needs projected tokens")
    visual = features.visual_tokens
    tokens_BNH = normalize(features.projected.float(), dim=-1)
    distance_BNN = 1.0 - torch.matmul(tokens_BNH, tokens_BNH.transpose(1, 2))
    # (torch.eye would be traced with unsigned integers, which TensorRT does not read.)
    itself_NN = torch.arange(visual)[:, None] == torch.arange(visual)
    isolation_BN = distance_BNN.masked_fill(itself_NN, _FARTHER_THAN_ANY).amin(dim=-1)
    # A chosen token is nearer to itself than anything, and so is never chosen again.
    distance_BNN = distance_BNN.masked_fill(itself_NN, _NEARER_THAN_ANY)

    def step(worth_BN: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Choose; the worth of a token is its distance to the nearest chosen one, before the first its isolation."""
        chosen_B1 = worth_BN.argmax(dim=-1, keepdim=True)
        nearest_BN = torch.where(number == 0, _FARTHER_THAN_ANY, worth_BN)
        return torch.minimum(nearest_BN, take(distance_BNN, chosen_B1)[:, 0]), chosen_B1[:, 0].clone()

    _, chosen_KB = sequential(step, isolation_BN, kept)
    return Selected(chosen_KB.transpose(0, 1))
