"""Spatial: a uniform grid over the image, whatever it shows.

Rows are chosen so that cells are as square as K allows, each at the middle of its stripe; the K points are assigned to the rows
as evenly as possible and spread the same way along each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def used_rows(grid: tuple[int, int], kept: int) -> int:
    """How many rows of the grid hold K points, so that the points are as far apart along a row as rows are."""
    rows, columns = grid
    min_rows = math.ceil(kept / columns)
    return min(max(round(math.sqrt(kept * rows / columns)), min_rows, 1), rows, kept)


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    if features.grid is None:
        raise ValueError("spatial needs patches that lie on one grid")
    rows, columns = features.grid
    # The rows in use are rounded to taste, so a table of them is baked in; all else is integer arithmetic with K.
    table_N = torch.tensor([used_rows(features.grid, count + 1) for count in range(rows * columns)])
    used_1 = table_N[torch.full((1,), kept - 1)]
    points_K = torch.arange(kept)
    stripe_K = ((points_K + 1) * used_1 - 1) // kept
    first_K, end_K = stripe_K * kept // used_1, (stripe_K + 1) * kept // used_1
    row_K = (2 * stripe_K + 1) * rows // (2 * used_1)
    column_K = (2 * (points_K - first_K) + 1) * columns // (2 * (end_K - first_K))
    return Selected((row_K * columns + column_K).expand(features.patches.shape[0], -1))
