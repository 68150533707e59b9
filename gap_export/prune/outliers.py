"""How many tokens an image needs: as many as have scores far above the rest.

Source: LLaVA-PruMerge (arXiv 2403.15388) and TRIM: the interquartile rule, a score being an outlier above Q3 + 1.5 (Q3 - Q1), with
quartiles interpolated linearly as `np.percentile` does. The originals take the quartiles over the whole batch; here every
image is measured by its own N scores. Where none is an outlier one token is kept all the same: without any, nothing would tell
where in the image the tokens stand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_count(scores_BN: Tensor) -> Tensor:
    """[B, 1] int64: how many scores of an image are outliers, at least one."""
    ranked_BN = scores_BN.topk(scores_BN.shape[1], dim=-1).values
    lower_B1, upper_B1 = _quartile(ranked_BN, 1), _quartile(ranked_BN, 3)
    is_outlier_BN = scores_BN > upper_B1 + 1.5 * (upper_B1 - lower_B1)
    count_B1: Tensor = is_outlier_BN.float().sum(dim=-1, keepdim=True).clamp(min=1.0).to(torch.int64)
    return count_B1


def _quartile(ranked_BN: Tensor, number: int) -> Tensor:
    """[B, 1] of scores in descending order, the first quartile or the third; in whole numbers, as N may be symbolic."""
    last_1 = torch.full((1,), ranked_BN.shape[1]) - 1
    below_1 = torch.div(number * last_1, 4, rounding_mode="trunc")
    part_1 = (number * last_1 - 4 * below_1).float() / 4
    place_1 = last_1 - below_1
    lower_B1, higher_B1 = (ranked_BN.index_select(1, at) for at in (place_1, (place_1 - 1).clamp(min=0)))
    return torch.lerp(lower_B1, higher_B1, part_1.to(ranked_BN.dtype))
