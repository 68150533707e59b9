"""CDPruner: a subset that is diverse, and more so where the image matches the expression.

Source: CDPruner (arXiv 2506.10967): the most probable subset of a determinantal point process, by greedy choice. The kernel is
r_i s_ij r_j: s is the cosine of the projected tokens, r the match of a patch with the expression (`text_similarity.py`) scaled
to 0..1. The original scales over the whole batch; here every image is scaled by itself. Its text is the question without the
instruction that ends it; here it is the expression. It averages over pieces of long
texts; here texts longer than the context of the text tower are refused when they are given.

The choice is sequential. The gain of a token is r_i^2 times the part of it that the chosen ones do not span: the
diagonal of the Schur complement of s. A choice adds one row to the factor of s (Cholesky's, rows of the chosen ones; fast greedy
choice of arXiv 1709.05135), O(K N). (Taken from s and not from the kernel, no
small r is lost to rounding.) Where hardly anything of a token is left, rounding would decide; such tokens go by r alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures, text_similarity
from gap_export.prune.order import take
from gap_export.prune.scan import sequential

SPANNED = 1e-5
"""A token of which no more is left lies in the span of the chosen ones."""
_SMALLEST = 1e-6
_CHOICES_PER_STEP = 4
"""A step of the loop copies the factor once, however many rows are added to it."""
_CHOSEN = -1.0


def relevance(features: VisionFeatures[Tensor]) -> Tensor:
    """[B, N] float32: the match with the expression, scaled to 0..1 within the image; never quite 0."""
    scores_BN = text_similarity.scores(features)
    least_B1, most_B1 = scores_BN.amin(dim=-1, keepdim=True), scores_BN.amax(dim=-1, keepdim=True)
    return (scores_BN - least_B1 + _SMALLEST) / (most_B1 - least_B1).clamp(min=_SMALLEST)


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image; best first is the order of the choice."""
    if features.projected is None:
        raise ValueError("cdpruner needs projected tokens")
    weight_BN = relevance(features).square()
    tokens_BNH = normalize(features.projected.float(), dim=-1)
    cosine_BNN = torch.matmul(tokens_BNH, tokens_BNH.transpose(1, 2))
    tokens_N = torch.arange(features.visual_tokens)

    def step(state: tuple[Tensor, ...], number: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Choose some, one by one, and take away from all tokens what each spans beyond those before it."""
        factor_BKN, left_BN = state
        chosen: list[Tensor] = []
        rows: list[Tensor] = []
        for _ in range(_CHOICES_PER_STEP):
            gain_BN = torch.where(left_BN == _CHOSEN, _CHOSEN, weight_BN * left_BN.clamp(min=SPANNED))
            chosen_B1 = gain_BN.argmax(dim=-1, keepdim=True)
            before_BKN = factor_BKN.gather(2, chosen_B1[:, :, None].expand(-1, factor_BKN.shape[1], -1))
            row_BN = (take(cosine_BNN, chosen_B1) - torch.matmul(before_BKN.transpose(1, 2), factor_BKN))[
                :, 0
            ]
            for earlier_BN in rows:
                row_BN = row_BN - earlier_BN.gather(1, chosen_B1) * earlier_BN
            pivot_B1 = row_BN.gather(1, chosen_B1)
            row_BN = torch.where(pivot_B1 > SPANNED, row_BN / pivot_B1.clamp(min=SPANNED).sqrt(), 0.0)
            is_out_BN = (left_BN == _CHOSEN) | (tokens_N == chosen_B1)
            left_BN = torch.where(is_out_BN, _CHOSEN, (left_BN - row_BN.square()).clamp(min=0.0))
            chosen.append(chosen_B1)
            rows.append(row_BN)
        new_BUN = torch.stack(rows, dim=1)
        places_U = number * _CHOICES_PER_STEP + torch.arange(_CHOICES_PER_STEP)
        factor_BKN = factor_BKN.scatter(1, places_U[None, :, None].expand_as(new_BUN), new_BUN)
        return (factor_BKN, left_BN), torch.cat(chosen, dim=1)

    # (Two or more: torch specialises graphs to a single one.) The last choices may be too many.
    steps = torch.sym_max(2, (kept + _CHOICES_PER_STEP - 1) // _CHOICES_PER_STEP)
    nothing_BKN = weight_BN.new_zeros(weight_BN.shape[0], steps * _CHOICES_PER_STEP, weight_BN.shape[1])
    _, chosen_TBU = sequential(step, (nothing_BKN, torch.ones_like(weight_BN)), steps)
    # (Gathered, not sliced: the exporter does not follow that there are as many.)
    return Selected(chosen_TBU.transpose(0, 1).flatten(1).index_select(1, torch.arange(kept)))
