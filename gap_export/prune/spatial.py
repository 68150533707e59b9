"""Spatial: a uniform grid over the picture, whatever it shows."""

from __future__ import annotations

import math

import torch

from gap_export.positions import MergedId
from gap_export.prune import Selected, VisionFeatures


def grid_indices(grid: tuple[int, int], kept: int) -> list[int]:
    """Raster indices of K points spread evenly over the grid.

    Rows are chosen so that cells are as square as K allows, each at the middle of its stripe; the K points are dealt to
    the rows as evenly as possible and spread the same way along each.

    Args:
        grid: (rows, columns).
        kept: K, 1..rows * columns.
    """
    rows, columns = grid
    fewest_rows = math.ceil(kept / columns)
    used_rows = min(max(round(math.sqrt(kept * rows / columns)), fewest_rows, 1), rows, kept)
    indices: list[int] = []
    for stripe in range(used_rows):
        row = (2 * stripe + 1) * rows // (2 * used_rows)
        points = (stripe + 1) * kept // used_rows - stripe * kept // used_rows
        indices += [row * columns + (2 * point + 1) * columns // (2 * points) for point in range(points)]
    return indices


class Spatial:
    """K tokens on a uniform grid, in raster order."""

    def select(self, features: VisionFeatures, kept: int, *, seed: int, merged_id: MergedId) -> Selected:
        """See `Pruner.select`."""
        chosen = torch.tensor(grid_indices(features.grid, kept), dtype=torch.int64)
        return Selected(chosen.expand(features.patches_BNE.shape[0], -1))
