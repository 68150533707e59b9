"""Where the tokens of an image lie, on one grid or on several, as tensors: extents may be known only when the graph runs.

Shape letters: G grids, those that stand for several counted one by one, B batch, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gap_export.prune.features import Extent, Grid

_SMALLEST = torch.finfo(torch.float32).tiny


def extents(grids: Sequence[Grid]) -> tuple[Tensor, Tensor, Tensor]:
    """[G] int64 each: rows, columns, and which of the N tokens is the first."""
    rows, columns, firsts = [], [], []
    offset: Extent = 0
    for grid in grids:
        tokens = grid.rows * grid.columns
        rows.append(_of_each(grid.rows, grid.count))
        columns.append(_of_each(grid.columns, grid.count))
        firsts.append(offset + torch.arange(grid.count) * tokens)
        offset = offset + grid.count * tokens
    return torch.cat(rows), torch.cat(columns), torch.cat(firsts)


def _of_each(extent: Extent, count: int) -> Tensor:
    return extent.expand(count) if isinstance(extent, Tensor) else torch.full((count,), extent)


def nearest_to_centre(grids: Sequence[Grid], weights_BN: Tensor) -> Tensor:
    """Of the grid that most of the weight lies on, the token nearest to the centre of the weight there.

    Args:
        grids: that all N tokens lie on.
        weights_BN: not negative; need not sum to one.

    Returns:
        [B, 1] int64 raster indices among the N.
    """
    rows_G, columns_G, first_G = extents(grids)
    tokens_N, weights_BN = torch.arange(weights_BN.shape[1]), weights_BN.float()
    beyond_NG = tokens_N[:, None] - first_G
    lies_NG = (beyond_NG >= 0) & (beyond_NG < rows_G * columns_G)
    heaviest_B1 = torch.matmul(weights_BN, lies_NG.float()).argmax(dim=-1, keepdim=True)
    rows_B1, columns_B1, first_B1 = (
        of_G.expand(weights_BN.shape[0], -1).gather(1, heaviest_B1) for of_G in (rows_G, columns_G, first_G)
    )
    within_BN = tokens_N - first_B1
    row_BN = torch.div(within_BN, columns_B1, rounding_mode="trunc")
    own_BN = weights_BN * ((within_BN >= 0) & (within_BN < rows_B1 * columns_B1))
    total_B1 = own_BN.sum(dim=1, keepdim=True).clamp(min=_SMALLEST)  # (scores may all vanish in float32)

    def centre(places_BN: Tensor) -> Tensor:
        mean_B1 = (own_BN * places_BN).sum(dim=1, keepdim=True) / total_B1
        return (mean_B1 + 0.5).floor().long()

    return first_B1 + centre(row_BN) * columns_B1 + centre(within_BN - row_BN * columns_B1)
