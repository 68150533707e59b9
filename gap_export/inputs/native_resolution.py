"""Images at their own shape: scaled to whole patches, cut into them, each with its place (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Arithmetic and pixels are those of transformers' Pillow-backed processor (`Qwen2VLImageProcessorPil`). A square of patches becomes
one visual token; patches come square by square, so that those of one token are together.

Source: Qwen2-VL (arXiv 2409.12191), section 2.1, naive dynamic resolution; windows: Qwen2.5-VL (arXiv 2502.13923), section 2.1.1.

Shape letters: N visual tokens, P patches of each, F samples of a patch, W windows, M visual tokens of the largest window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from gap_export.errors import InputError
from gap_export.inputs.batch import (
    PIXELS,
    TYPICAL_SIZE,
    ImageBatch,
    ImageLayout,
    PreparedImage,
    Size,
    TokenRange,
    of_many_sizes,
)
from gap_export.inputs.images import FILTERS, normalised, rgb
from gap_export.positions import PAD, Ids

PATCH_POSITIONS = "patch_positions"
WINDOW_TOKENS, TOKEN_SLOTS = "window_tokens", "token_slots"
"""Names of the vision graph's inputs."""

MOST_ASPECT = 200
"""The longest side may be so many times the shortest, as in transformers."""


class NativeResolutionLayout(ImageLayout):
    """How an image becomes patches at nearly its own size and shape (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

    Attributes:
        kind: tells it from other layouts.
        patch: side of a patch in pixels.
        merge: patches along the side of the square that becomes one visual token.
        frames: equal frames that a patch holds, as if the image were a film.
        window: visual tokens along the side of the squares within which most layers attend; None where all attend to all.
        min_pixels: smaller images are scaled up.
        max_pixels: larger images are scaled down.
    """

    takes_max_pixels: ClassVar[bool] = True

    kind: Literal["native"] = "native"
    patch: int = Field(ge=1)
    merge: int = Field(ge=1)
    frames: int = Field(ge=1)
    window: int | None = Field(default=None, ge=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)

    @property
    def token_side(self) -> int:
        """Of the square that becomes one visual token, in pixels."""
        return self.patch * self.merge

    def prepare(
        self, images: Sequence[Image.Image], *, visual_tokens: int, per_prompt: int = 1
    ) -> ImageBatch:
        """Preprocess a batch of images."""
        return of_many_sizes([native_image(image, self) for image in images], per_prompt)

    @property
    def pixels_of(self) -> Literal["image", "padded_square"] | None:
        """What the model sees as one grid of pixels: the whole image."""
        return "image"

    def resized(self, size: Size) -> Size:
        """(width, height) of an image as the model sees it."""
        return resized(*size, self)

    def token_grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of an image of that size."""
        width, height = self.resized(size)
        return height // self.token_side, width // self.token_side

    def token_range(self) -> tuple[TokenRange, int]:
        """How many visual tokens images have, and N of the largest image; bounds that no image leaves, of whatever shape."""
        smallest, largest = self.min_pixels / self.token_side**2, self.max_pixels / self.token_side**2
        # Scaled up, both sides are rounded up; scaled down, both are rounded down, but to one token at least.
        grown = (math.sqrt(smallest * MOST_ASPECT) + 1) * (math.sqrt(smallest / MOST_ASPECT) + 1)
        narrow = math.sqrt(largest * MOST_ASPECT)
        most = math.floor(max(largest, grown, narrow))
        least = max(1, min(math.ceil(smallest), math.floor(largest / 4)))
        rows, columns = self.token_grid(TYPICAL_SIZE)
        return TokenRange(min_tokens=least, typical_tokens=rows * columns, max_tokens=most), most


def resized(width: int, height: int, layout: NativeResolutionLayout) -> tuple[int, int]:
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
    side = layout.token_side
    # Python rounds halves to the even number; so does the processor.
    nearest_width, nearest_height = round(width / side) * side, round(height / side) * side
    if nearest_width * nearest_height > layout.max_pixels:
        shrink = math.sqrt(width * height / layout.max_pixels)
        return (
            max(side, math.floor(width / shrink / side) * side),
            max(side, math.floor(height / shrink / side) * side),
        )
    if nearest_width * nearest_height < layout.min_pixels:
        grow = math.sqrt(layout.min_pixels / (width * height))
        return math.ceil(width * grow / side) * side, math.ceil(height * grow / side) * side
    return nearest_width, nearest_height


def native_image(image: Image.Image, layout: NativeResolutionLayout) -> PreparedImage:
    """An image as patches.

    Args:
        image: any size and mode.
        layout: of the bundle.

    Returns:
        `inputs` with `pixel_values` [N, P, F] float32, `patch_positions` [N, P, 2] int64 (row, column); with windows
        `window_tokens` [W, M] int64, the tokens of each, and `token_slots` [N] int64, where each token stands among those W * M.

    Raises:
        InputError: an image that cannot be fitted.
    """
    image = rgb(image)
    width, height = resized(*image.size, layout)
    pixels_CHW = normalised(image.resize((width, height), FILTERS[layout.resample]), layout)
    patch, merge = layout.patch, layout.merge
    rows, columns = layout.token_grid(image.size)

    squares = pixels_CHW.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    # An image is a film of equal frames.
    film = np.repeat(squares[:, :, :, :, :, None], layout.frames, axis=5)
    places_2HW = np.indices((rows * merge, columns * merge), dtype=np.int64)
    positions = places_2HW.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0)
    return PreparedImage(
        inputs={
            PIXELS: film.reshape(rows * columns, merge**2, -1),
            PATCH_POSITIONS: np.ascontiguousarray(positions.reshape(rows * columns, merge**2, 2)),
            **_windows(rows, columns, layout.window),
        },
        visual_tokens=rows * columns,
        prunable=rows * columns,
        grid=(rows, columns),
    )


def _windows(rows: int, columns: int, side: int | None) -> dict[str, Ids]:
    """Which tokens share a window; squares from the upper left corner on, cut off at the right and the bottom."""
    if side is None:
        return {}
    down, across = -(-rows // side), -(-columns // side)
    padded = np.full((down * side, across * side), PAD, np.int64)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    tokens_WM = padded.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side**2)
    slots_N = np.empty(rows * columns, np.int64)
    real = np.flatnonzero(tokens_WM >= 0)
    slots_N[tokens_WM.flat[real]] = real
    return {WINDOW_TOKENS: np.ascontiguousarray(tokens_WM), TOKEN_SLOTS: slots_N}


def most_windows(tokens: TokenRange, window: int) -> int:
    """A number of windows that no image exceeds, of whatever shape.

    Args:
        tokens: of images, as `token_range` gives it.
        window: side in tokens.
    """
    # Every side may end in a part of a window. Rounded to tokens, a side may be 301 times as long as the other (1.5 times the
    # limit, and one token); rows and columns of a fixed product sum up to most where they differ most.
    longest = 1.5 * MOST_ASPECT + 1
    sides = min(tokens.max_tokens + 1, math.sqrt(longest * tokens.max_tokens) * (1 + 1 / longest) + 2)
    return math.floor(tokens.max_tokens / window**2 + sides / window + 1)


def typical_windows(tokens: TokenRange, window: int) -> int:
    """Windows of a typical image.

    Args:
        tokens: of images, as `token_range` gives it.
        window: side in tokens.
    """
    width, height = TYPICAL_SIZE
    rows = max(1, round(math.sqrt(tokens.typical_tokens * height / width)))
    columns = -(-tokens.typical_tokens // rows)
    return -(-rows // window) * -(-columns // window)
