"""Error compensation: the error of each rounded column of a weight is made up for by the columns that are still to be rounded.

GPTQ (Frantar et al. 2022, arXiv 2210.17323). With X the activations that a linear layer reads, H = X^T X weighs the errors of its weight W:
rounding to Q changes its outputs by tr((W - Q) H (W - Q)^T) altogether. Columns are rounded in order. What that changes in the outputs is
smallest if each later column takes over a share of the error, which depends on H alone: it stands in the upper Cholesky factor U of the
inverse of H. Column k, off by e, adds -e U[k, j] / U[k, k] to column j > k. Rows of W do not depend on each other.

H is damped, by a tenth of its mean diagonal: it is measured on a few thousand tokens, and channels that were never active among them
would be free otherwise.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent, L elements of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import Grid
from gap_export.graph.quantize.scheme import BlockScheme, Weight

DAMPING = 0.1
"""Part of the mean diagonal that is added to the diagonal."""


@dataclass(frozen=True)
class Shares:
    """What later columns take over of an error.

    Attributes:
        factor_KK: float32, upper triangular: the Cholesky factor of the inverse of damped H, factor^T factor = H^-1.
        importance_K: float32, the diagonal of damped H: what an error weighs that nothing makes up for.
    """

    factor_KK: NDArray[np.float32]
    importance_K: NDArray[np.float32]

    @classmethod
    def of(cls, moments_KK: NDArray[np.float32]) -> Shares:
        """From H.

        Args:
            moments_KK: X^T X, finite; it may be singular, or zero.
        """
        damped_KK = torch.from_numpy(moments_KK).to(torch.float64, copy=True)
        diagonal_K = damped_KK.diagonal()  # a view
        diagonal_K += (DAMPING * float(diagonal_K.mean())) or 1.0
        importance_K = diagonal_K.float().numpy()
        # Turned about, H = R R^T with R upper triangular: one Cholesky factor and the inverse of a triangle, and no inverse of H.
        root_KK = torch.linalg.cholesky(damped_KK.flip(0, 1)).flip(0, 1)
        del damped_KK, diagonal_K
        one_KK = torch.eye(len(root_KK), dtype=root_KK.dtype)
        factor_KK = torch.linalg.solve_triangular(root_KK, one_KK, upper=True)
        return cls(factor_KK.float().numpy(), importance_K)


def compensated(
    rows_NK: NDArray[np.float32], shares: Shares, scheme: BlockScheme, weight: Weight
) -> tuple[NDArray[Any], ...]:
    """Round some rows of a weight, as `Scheme.encode`, column by column.

    The grid of a block is chosen when its first column comes up, from what its columns have become by then.

    Args:
        rows_NK: any of its rows; left as they are.
        shares: of what the weight is multiplied with.
        scheme: says where grids lie.
        weight: that the rows belong to.
    """
    left_NK, numbers_NK = rows_NK.copy(), np.empty_like(rows_NK)
    inner, grids = rows_NK.shape[1], []
    for start in range(0, inner, scheme.BLOCK):
        stop = start + scheme.BLOCK
        block = slice(start, stop)
        grid = scheme.grid(left_NK[:, block], weight, shares.importance_K[block])
        errors_NL = np.empty_like(left_NK[:, block])
        for column in range(start, stop):
            own_N1, share_K = left_NK[:, column : column + 1], shares.factor_KK[column]
            numbers_N1 = grid.numbers(own_N1)
            error_N1 = (own_N1 - grid.floats(numbers_N1)) / share_K[column]
            left_NK[:, column + 1 : stop] -= error_N1 * share_K[column + 1 : stop]
            numbers_NK[:, column : column + 1] = numbers_N1
            errors_NL[:, column - start : column - start + 1] = error_N1
        # Columns of later blocks are read no earlier than here: they get the errors of a block together.
        left_NK[:, stop:] -= errors_NL @ shares.factor_KK[block, stop:]
        grids.append(grid)
    return scheme.arranged(numbers_NK, _side_by_side(grids))


def _side_by_side(grids: list[Grid]) -> Grid:
    """[N, 1] grids of one block each as one of [N, B, 1]."""
    scales_NB1, zeros_NB1 = (
        np.stack([getattr(grid, name) for grid in grids], axis=1) for name in ("scales_B1", "zeros_B1")
    )
    return Grid(scales_NB1, zeros_NB1, grids[0].least, grids[0].most)
