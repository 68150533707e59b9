"""Spatial: a uniform grid over the image, whatever it shows.

Of a grid of tokens, rows are chosen so that cells are as square as K allows, each at the middle of its stripe; the K points are assigned to the rows as
evenly as possible and spread the same way along each. Where the tokens of an image lie on several grids (a whole image and its tiles), K is divided
among them by how many tokens they have.

Nothing of it is a choice that others published; uniform points are what other pruners are measured against (arXiv 2502.11501). It is integer arithmetic
throughout, so that K and the extents of the grids may be known when the graph runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures
from gap_export.prune.grids import extents


def used_rows(grid: tuple[int, int], kept: int) -> int:
    """How many rows of the grid hold K points, so that the points are as far apart along a row as rows are."""
    rows, columns = grid
    min_rows = math.ceil(kept / columns)
    return min(max(round(math.sqrt(kept * rows / columns)), min_rows, 1), rows, kept)


def select(features: VisionFeatures[Tensor], kept: int, *, seed: int, merged_id: MergedId) -> Selected:
    """Choose K tokens of every image."""
    rows_G, columns_G, first_G = extents(features.laid_out)
    # Grids share the points by where their tokens begin among the N; a grid may get none.
    cut_G, end_G = (
        kept * token_G // features.visual_tokens for token_G in (first_G, first_G + rows_G * columns_G)
    )
    own_G = end_G - cut_G
    used_G = _used_rows(rows_G, columns_G, own_G)
    points_K = torch.arange(kept)
    grid_K = (points_K[:, None] >= cut_G).sum(dim=1) - 1
    rows_K, columns_K, own_K, used_K, at_K = (
        of_G.index_select(0, grid_K) for of_G in (rows_G, columns_G, own_G, used_G, first_G)
    )
    within_K = points_K - cut_G.index_select(0, grid_K)
    stripe_K = ((within_K + 1) * used_K - 1) // own_K
    first_K, end_K = stripe_K * own_K // used_K, (stripe_K + 1) * own_K // used_K
    row_K = (2 * stripe_K + 1) * rows_K // (2 * used_K)
    column_K = (2 * (within_K - first_K) + 1) * columns_K // (2 * (end_K - first_K))
    indices_K = at_K + row_K * columns_K + column_K
    return Selected(indices_K.expand(features.patches.shape[0], -1))


def _used_rows(rows_G: Tensor, columns_G: Tensor, kept_G: Tensor) -> Tensor:
    """`used_rows` of every grid; 0 where it holds no points.

    A square root in float32 may be off by one: it is rounded by comparing whole numbers, halves to the even number as `round` does.
    """
    least_G = ((kept_G * rows_G / columns_G).sqrt().long() - 1).clamp(min=0)
    near_G3 = least_G[:, None] + torch.arange(3)
    odd_G3 = 2 * near_G3 + 1
    halfway_G3 = odd_G3 * odd_G3 * columns_G[:, None]
    square_G1 = (4 * kept_G * rows_G)[:, None]
    beyond_G3 = (square_G1 > halfway_G3) | ((square_G1 == halfway_G3) & (near_G3 % 2 == 1))
    rounded_G = least_G + beyond_G3.sum(dim=1)
    enough_G = (kept_G + columns_G - 1) // columns_G
    return rounded_G.maximum(enough_G).clamp(min=1).minimum(rows_G).minimum(kept_G)
