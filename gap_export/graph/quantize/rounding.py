"""Rounding that schemes have in common. It is to nearest, and symmetric about zero.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent, B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

E4M3_MAX = 448.0

_OF_NOTHING = 2.0**-14
"""Scale of zeros. Kernels that take zero points out of their sums at the end lose some of it in rounding: it is small, and a number in
every type of activations.
"""

SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a block's extreme that the largest number may stand for: cutting the extreme off a little often rounds the others better."""


Importance = NDArray[np.float32] | float
"""What an error weighs, [L] or the same for all elements of a block."""


@dataclass(frozen=True)
class Grid:
    """What the numbers of blocks stand for: (number - zero) * scale.

    Attributes:
        scales_B1: [..., B, 1] float32, or [..., 1] of one block of every row.
        zeros_B1: float32, of the same shape, or one for all.
        least: smallest number.
        most: largest number.
    """

    scales_B1: NDArray[np.float32]
    zeros_B1: NDArray[np.float32]
    least: int
    most: int

    def numbers(self, floats: NDArray[np.float32]) -> NDArray[np.float32]:
        """The nearest ones."""
        numbers: NDArray[np.float32] = np.clip(
            np.rint(floats / self.scales_B1) + self.zeros_B1, self.least, self.most
        )
        return numbers

    def floats(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """What numbers stand for."""
        return (numbers - self.zeros_B1) * self.scales_B1

    def loss(self, floats_BL: NDArray[np.float32], importance: Importance = 1.0) -> NDArray[np.float32]:
        """[..., 1], the weighted sum of squared errors that rounding blocks makes."""
        errors_BL = self.floats(self.numbers(floats_BL)) - floats_BL
        loss_B1: NDArray[np.float32] = (np.square(errors_BL) * importance).sum(axis=-1, keepdims=True)
        return loss_B1


def losing_least(
    blocks_BL: NDArray[np.float32],
    tried: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    importance: Importance = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(numbers, scales) of the candidate with the smallest squared error, block by block.

    Args:
        blocks_BL: [..., B, L], or [..., L].
        tried: candidates, numbers like the blocks and scales with one element in the place of L.
        importance: of the elements of a block.
    """
    losses = [
        (np.square(numbers * step - blocks_BL) * importance).sum(axis=-1, keepdims=True)
        for numbers, step in tried
    ]
    best = np.stack(losses).argmin(axis=0)[None]
    numbers_BL, steps_B1 = (
        np.take_along_axis(np.stack(each), best, axis=0)[0] for each in zip(*tried, strict=True)
    )
    return numbers_BL, steps_B1


def never_zero(scales: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """A small number where there is nothing to scale, or so little that its scale is no number in float32 any more."""
    return np.asarray(np.where(scales != 0, scales, _OF_NOTHING), np.float32)


def packed_pairs(codes_NK: NDArray[Any]) -> NDArray[np.uint8]:
    """[N / 2, K] uint8: two neighbours of a column in one byte, the first in its low half, as ONNX packs four-bit numbers.

    Args:
        codes_NK: one byte each; its low half counts.
    """
    halves = codes_NK.view(np.uint8) & 0xF
    return (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)
