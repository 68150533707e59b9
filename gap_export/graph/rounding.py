"""Floats to few bits, some rows of a weight at a time.

    int8    one scale per row; seven bits of the eight
    int4    one scale per block of 32; the block's extreme is -8 (as llama.cpp's Q4_0), or a little beyond it
    fp8     E4M3, one scale per row
    nvfp4   E2M1, one E4M3 scale per block of 16, and one scale of the whole weight for those

Rounding is to nearest, symmetric about zero. Four-bit blocks try several scales and take the one that loses least.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent, B blocks of a row, L elements of a block.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Elements of an int4 block."""
FP4_BLOCK = 16
"""Elements of an nvfp4 block: what tensor cores take."""
INT8_MAX = 63
"""Processors without VNNI add two products of eight bits in sixteen, and what is too large is cut off without a word: 2 * 255 * 127
is, 2 * 255 * 63 is not."""
E4M3_MAX = 448.0
E2M1_MAX = 6.0
_SMALLEST_E4M3 = np.float32(2**-9)

_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a block's extreme that the largest number may stand for: cutting the extreme off a little often rounds the others better."""
_STRETCHED = (1.5, *_SHRUNK)
"""The same for E2M1, whose largest numbers lie far apart: the extreme may become 4 instead of 6."""


def int8_rows(rows_NK: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([N, K] int8 in -63..63, [N] float32 scales); their product is nearest to the rows."""
    scales_N = _never_zero(np.abs(rows_NK).max(axis=1) / INT8_MAX)
    return np.clip(np.rint(rows_NK / scales_N[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8), scales_N


def int4_rows(
    rows_NK: NDArray[np.float32], kind: type[np.floating[Any]] = np.float32
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([N, K] int8 in -8..7, [N, K / 32] float32 scales, which have the sign that makes a block's extreme -8).

    Args:
        rows_NK: of the weight.
        kind: what scales are stored in: weights are rounded to what they will be multiplied with.
    """
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    place_NB1 = np.abs(blocks_NBL).argmax(axis=2)[..., None]
    extreme_NB1 = np.take_along_axis(blocks_NBL, place_NB1, axis=2)
    tried = []
    for shrunk in _SHRUNK:
        step_NB1 = _never_zero((extreme_NB1 * (shrunk / -8)).astype(kind))
        tried.append((np.clip(np.rint(blocks_NBL / step_NB1), -8, 7), step_NB1))
    numbers_NBL, scales_NB1 = _losing_least(blocks_NBL, tried)
    return numbers_NBL.astype(np.int8).reshape(columns, inner), scales_NB1[..., 0]


def fp8_rows(
    rows_NK: NDArray[np.float32], kind: type[np.floating[Any]] = np.float16
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """([N, K] float8_e4m3fn, [N] float32 scales); `kind` as for `int4_rows`."""
    scales_N = _never_zero((np.abs(rows_NK).max(axis=1) / E4M3_MAX).astype(kind))
    scaled_NK = np.clip(rows_NK / scales_N[:, None], -E4M3_MAX, E4M3_MAX)
    return scaled_NK.astype(ml_dtypes.float8_e4m3fn), scales_N


def nvfp4_rows(rows_NK: NDArray[np.float32], whole: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """([N, K] float4_e2m1fn, [N, K / 16] float8_e4m3fn scales); a weight is their product with `whole`.

    Args:
        rows_NK: of the weight.
        whole: `nvfp4_whole` of all its rows.
    """
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // FP4_BLOCK, FP4_BLOCK)
    extreme_NB1 = np.abs(blocks_NBL).max(axis=2, keepdims=True)
    tried = []
    for part in _STRETCHED:
        stored_NB1 = _e4m3(extreme_NB1 * np.float32(part / E2M1_MAX / whole))
        step_NB1 = np.maximum(stored_NB1, _SMALLEST_E4M3) * np.float32(whole)
        scaled_NBL = np.clip(blocks_NBL / step_NB1, -E2M1_MAX, E2M1_MAX)
        tried.append((scaled_NBL.astype(ml_dtypes.float4_e2m1fn).astype(np.float32), step_NB1))
    numbers_NBL, steps_NB1 = _losing_least(blocks_NBL, tried)
    return (
        numbers_NBL.astype(ml_dtypes.float4_e2m1fn).reshape(columns, inner),
        _e4m3(steps_NB1[..., 0] / np.float32(whole)).astype(ml_dtypes.float8_e4m3fn),
    )


def nvfp4_whole(largest: float) -> float:
    """The scale of a whole tensor whose largest element is `largest`: its largest block scale is then the largest of E4M3."""
    return float(np.float32(largest / (E2M1_MAX * E4M3_MAX))) or 1.0


def packed_pairs(codes_NK: NDArray[Any]) -> NDArray[np.uint8]:
    """[N / 2, K] uint8: two neighbours of a column in one byte, the first in its low half, as ONNX packs four-bit numbers.

    Args:
        codes_NK: one byte each; its low half counts.
    """
    halves = codes_NK.view(np.uint8) & 0xF
    return (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)


def _losing_least(
    blocks_NBL: NDArray[np.float32], tried: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(numbers, steps) of the candidate with the smallest squared error, block by block."""
    losses = [np.square(numbers * step - blocks_NBL).sum(axis=2, keepdims=True) for numbers, step in tried]
    best_1NB1 = np.stack(losses).argmin(axis=0)[None]
    numbers_NBL, steps_NB1 = (
        np.take_along_axis(np.stack(each), best_1NB1, axis=0)[0] for each in zip(*tried, strict=True)
    )
    return numbers_NBL, steps_NB1


def _e4m3(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to what E4M3 can hold."""
    clipped = np.minimum(values, np.float32(E4M3_MAX))
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _never_zero(scales: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """One where there is nothing to scale, or so little that its scale is no number in float32 any more."""
    return np.asarray(np.where(scales != 0, scales, 1), np.float32)
