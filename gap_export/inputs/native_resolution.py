"""Images at their own shape: scaled to whole patches, cut into them, each with its place (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Arithmetic and pixels are those of transformers' Pillow-backed processor (`Qwen2VLImageProcessorPil`). A square of patches becomes
one visual token; patches come square by square, so that those of one token are together.

Source: Qwen2-VL (arXiv 2409.12191), section 2.1, naive dynamic resolution; windows: Qwen2.5-VL (arXiv 2502.13923), section 2.1.1.

Shape letters: N visual tokens, P patches of each, F samples of a patch, W windows, M visual tokens of the largest window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.errors import InputError
from gap_export.inputs.images import FILTERS, normalised, rgb
from gap_export.inputs.layouts import NativeResolutionLayout, TokenRange
from gap_export.positions import Ids

PIXELS, PATCH_POSITIONS = "pixel_values", "patch_positions"
WINDOW_TOKENS, TOKEN_SLOTS = "window_tokens", "token_slots"
"""Names of the vision graph's inputs."""

NO_TOKEN = -1
"""Fills windows at the edge, which hold fewer tokens."""

USUAL_SIZE = (640, 480)
"""Width and height of a usual image, which engines are tuned for."""

MOST_ASPECT = 200
"""The longest side may be so many times the shortest, as in transformers."""


@dataclass(frozen=True)
class NativeImage:
    """One image, ready for the vision graph.

    Attributes:
        inputs: `pixel_values` [N, P, F] float32, `patch_positions` [N, P, 2] int64 (row, column); with windows `window_tokens`
            [W, M] int64, the tokens of each, and `token_slots` [N] int64, where each token stands among those W * M.
        grid: (rows, columns) of its visual tokens.
    """

    inputs: dict[str, NDArray[np.float32] | Ids]
    grid: tuple[int, int]


def resized(width: int, height: int, preprocessing: NativeResolutionLayout) -> tuple[int, int]:
    """(width, height) in pixels of an image as the model sees it: multiples of a token's side, within the number of pixels.

    Raises:
        InputError: an image without area, or one that is more than 200 times as long as it is wide.
    """
    if min(width, height) < 1 or max(width, height) > MOST_ASPECT * min(width, height):
        raise InputError(
            f"has one side more than {MOST_ASPECT} times as long as the other",
            subject=f"image of {width}x{height} pixels",
            hint="cut it into pieces",
        )
    side = preprocessing.patch * preprocessing.merge
    # Python rounds halves to the even number; so does the processor.
    nearest_width, nearest_height = round(width / side) * side, round(height / side) * side
    if nearest_width * nearest_height > preprocessing.max_pixels:
        shrink = math.sqrt(width * height / preprocessing.max_pixels)
        return (
            max(side, math.floor(width / shrink / side) * side),
            max(side, math.floor(height / shrink / side) * side),
        )
    if nearest_width * nearest_height < preprocessing.min_pixels:
        grow = math.sqrt(preprocessing.min_pixels / (width * height))
        return math.ceil(width * grow / side) * side, math.ceil(height * grow / side) * side
    return nearest_width, nearest_height


def native_image(image: Image.Image, preprocessing: NativeResolutionLayout) -> NativeImage:
    """An image as patches.

    Args:
        image: any size and mode.
        preprocessing: of the bundle.

    Raises:
        InputError: see `resized`.
    """
    image = rgb(image)
    width, height = resized(*image.size, preprocessing)
    pixels_CHW = normalised(image.resize((width, height), FILTERS[preprocessing.resample]), preprocessing)
    patch, merge = preprocessing.patch, preprocessing.merge
    rows, columns = height // (patch * merge), width // (patch * merge)

    squares = pixels_CHW.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    # An image is a film of equal frames.
    film = np.repeat(squares[:, :, :, :, :, None], preprocessing.frames, axis=5)
    places_2HW = np.indices((rows * merge, columns * merge), dtype=np.int64)
    positions = places_2HW.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0)
    return NativeImage(
        inputs={
            PIXELS: film.reshape(rows * columns, merge**2, -1),
            PATCH_POSITIONS: np.ascontiguousarray(positions.reshape(rows * columns, merge**2, 2)),
            **_windows(rows, columns, preprocessing.window),
        },
        grid=(rows, columns),
    )


def _windows(rows: int, columns: int, side: int | None) -> dict[str, Ids]:
    """Which tokens share a window; squares from the upper left corner on, cut off at the right and the bottom."""
    if side is None:
        return {}
    down, across = -(-rows // side), -(-columns // side)
    padded = np.full((down * side, across * side), NO_TOKEN, np.int64)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    tokens_WM = padded.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side**2)
    slots_N = np.empty(rows * columns, np.int64)
    real = np.flatnonzero(tokens_WM >= 0)
    slots_N[tokens_WM.flat[real]] = real
    return {WINDOW_TOKENS: np.ascontiguousarray(tokens_WM), TOKEN_SLOTS: slots_N}


def native_range(preprocessing: NativeResolutionLayout) -> tuple[TokenRange, int]:
    """How many visual tokens images have: bounds that no image leaves, of whatever shape.

    Returns:
        (range, N of the largest image).
    """
    area = (preprocessing.patch * preprocessing.merge) ** 2
    smallest, largest = preprocessing.min_pixels / area, preprocessing.max_pixels / area
    # Scaled up, both sides are rounded up; scaled down, both are rounded down, but to one token at least.
    grown = (math.sqrt(smallest * MOST_ASPECT) + 1) * (math.sqrt(smallest / MOST_ASPECT) + 1)
    narrow = math.sqrt(largest * MOST_ASPECT)
    most = math.floor(max(largest, grown, narrow))
    fewest = max(1, min(math.ceil(smallest), math.floor(largest / 4)))
    width, height = resized(*USUAL_SIZE, preprocessing)
    return TokenRange(min_tokens=fewest, typical_tokens=width * height // area, max_tokens=most), most


def most_windows(tokens: TokenRange, window: int) -> int:
    """A number of windows that no image exceeds, of whatever shape.

    Args:
        tokens: of images, as `native_range` gives it.
        window: side in tokens.
    """
    # Every side may end in a part of a window. Rounded to tokens, a side may be 301 times as long as the other (1.5 times the
    # limit, and one token); rows and columns of a fixed product sum up to most where they differ most.
    longest = 1.5 * MOST_ASPECT + 1
    sides = min(tokens.max_tokens + 1, math.sqrt(longest * tokens.max_tokens) * (1 + 1 / longest) + 2)
    return math.floor(tokens.max_tokens / window**2 + sides / window + 1)
