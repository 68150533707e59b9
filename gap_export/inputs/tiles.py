"""Images cut into tiles: which tiles, their pixels, and where the visual tokens of an image lie in them.

Arithmetic and pixels are those of transformers' Pillow-backed processors (`LlavaNextImageProcessorPil`,
`LlavaOnevisionImageProcessorPil`, `GotOcr2ImageProcessorPil` with `crop_to_patches`) and of `pack_image_features` of their models:

    AnyResLayout          scaled to fit, black bars, whole image first; rows of tokens end with a newline (LLaVA-NeXT, -OneVision)
    DynamicTilesLayout    stretched to fill, whole image last (InternVL)

The vision graph encodes tiles and knows nothing of grids. What it must know of an image comes with the pixels: for every visual
token that may be pruned, in the order of the unpruned prompt, where it lies in the tokens of all tiles, and its place among
the image tokens of that prompt.

Shape letters: P visual tokens that may be pruned, R newlines, N = P + R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gap_export.errors import InputError
from gap_export.inputs.batch import (
    PIXELS,
    TYPICAL_SIZE,
    ImageBatch,
    ImageLayout,
    PreparedImage,
    TokenRange,
    of_many_sizes,
)
from gap_export.inputs.images import FILTERS, normalised, rgb
from gap_export.positions import Ids

TOKEN_INDEX, PLACES, NEWLINES = "token_index", "token_positions", "newline_positions"
CORNERS, WEIGHTS = "corners", "corner_weights"
"""Names of the vision graph's inputs."""

_CLEARLY_MORE = 1.1


class AnyResLayout(ImageLayout):
    """How an image becomes tiles of a grid that fits it, with the whole image, squashed, as the first tile (LLaVA-NeXT,
    LLaVA-OneVision).

    The image is scaled to fit one of the grids and padded with black. Rows and columns of visual tokens that see nothing but
    padding are left out; every other row of the grid ends with a token that is never pruned.

    Attributes:
        kind: tells it from other layouts.
        size: side of a tile in pixels.
        side: visual tokens along the side of a tile.
        grids: (height, width) in pixels of the grids to choose from, in the order of choice.
        max_tiles: a grid with clearly more tokens than so many tiles have is scaled down to about as many; None never.
    """

    kind: Literal["anyres"] = "anyres"
    size: int = Field(ge=1)
    side: int = Field(ge=1)
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    max_tiles: int | None = Field(default=None, ge=1)

    def prepare(
        self, images: Sequence[Image.Image], *, visual_tokens: int, per_prompt: int = 1
    ) -> ImageBatch:
        """Preprocess a batch of images."""
        return of_many_sizes([anyres_image(image, self) for image in images], per_prompt)

    def tile_counts(self) -> tuple[int, int]:
        """Tiles of a typical image and of the largest one, the whole image among them."""
        typical = best_grid(*TYPICAL_SIZE, self.grids)
        areas = (typical[0] * typical[1], max(height * width for height, width in self.grids))
        count, largest = (1 + area // self.size**2 for area in areas)
        return count, largest

    def token_range(self) -> tuple[TokenRange, int]:
        """How many visual tokens images have, and N of the largest image."""
        counts = [
            shrunk_grid(rows, columns, self)
            for height, width in self.grids
            for rows, columns in _with_bars(height // self.size * self.side, width // self.size * self.side)
        ]
        base = self.side**2
        tokens = TokenRange(
            min_tokens=base + 1,
            typical_tokens=len(anyres_places(*TYPICAL_SIZE, self)[PLACES]),
            max_tokens=base + max(rows * columns for rows, columns in counts),
            never_pruned=max(rows for rows, _ in counts),
        )
        return tokens, base + max(rows * (columns + 1) for rows, columns in counts)


class DynamicTilesLayout(ImageLayout):
    """How an image becomes tiles of the grid whose shape is nearest to its own, which it is stretched to fill, with the whole
    image, squashed, as the last tile where there is more than one (InternVL).

    Attributes:
        kind: tells it from other layouts.
        size: side of a tile in pixels.
        tokens: visual tokens of a tile.
        min_tiles: smallest number of tiles in a grid.
        max_tiles: largest number of tiles in a grid.
    """

    kind: Literal["dynamic_tiles"] = "dynamic_tiles"
    size: int = Field(ge=1)
    tokens: int = Field(ge=1)
    min_tiles: int = Field(ge=1)
    max_tiles: int = Field(ge=1)

    def prepare(
        self, images: Sequence[Image.Image], *, visual_tokens: int, per_prompt: int = 1
    ) -> ImageBatch:
        """Preprocess a batch of images."""
        return of_many_sizes([dynamic_image(image, self) for image in images], per_prompt)

    def tile_counts(self) -> tuple[int, int]:
        """Tiles of a typical image and of the largest one, the whole image among them."""
        across, down = nearest_grid(*TYPICAL_SIZE, self)
        counts = (across * down, max(across * down for across, down in _grids(self)))
        typical, largest = (count + (count > 1) for count in counts)
        return typical, largest

    def token_range(self) -> tuple[TokenRange, int]:
        """How many visual tokens images have, and N of the largest image."""
        least = min(across * down for across, down in _grids(self))
        typical, largest = (tiles * self.tokens for tiles in self.tile_counts())
        tokens = TokenRange(
            min_tokens=(least + (least > 1)) * self.tokens, typical_tokens=typical, max_tokens=largest
        )
        return tokens, largest


# ------------------------------------------------------------------------------------------------------------
# The grid that fits


def best_grid(width: int, height: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) in pixels of the grid that shows most of an image, and of those the one with the least padding."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - grid[0] * grid[1]

    return max(grids, key=merit)  # the first of equals


def fitted_size(width: int, height: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of an image scaled to fit a grid."""
    scale_x, scale_y = grid[1] / width, grid[0] / height
    if scale_x < scale_y:
        return grid[1], min(math.ceil(height * scale_x), grid[0])
    return min(math.ceil(width * scale_y), grid[1]), grid[0]


def bars(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows above and below, columns left and right) of a grid of tokens that see nothing but padding."""
    # Rounded before it is truncated: 36 may come out as 35.99999999.
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def shrunk_grid(rows: int, columns: int, layout: AnyResLayout) -> tuple[int, int]:
    """(rows, columns) of tokens after a grid that is clearly too large was scaled down."""
    if layout.max_tiles is None:
        return rows, columns
    ratio = math.sqrt(rows * columns / (layout.max_tiles * layout.side**2))
    if ratio <= _CLEARLY_MORE:
        return rows, columns
    return int(rows // ratio), int(columns // ratio)


def anyres_image(image: Image.Image, layout: AnyResLayout) -> PreparedImage:
    """An image as tiles of the grid that fits it.

    Args:
        image: any size and mode.
        layout: of the bundle.

    Returns:
        `inputs` with `token_positions` [P] int64, `newline_positions` [R] int64, and `token_index` [P] int64 into the flattened tile
        tokens; where grids may be scaled down, in the place of the last `corners` [P, 4] int64 and `corner_weights` [P, 4] float32.

    Raises:
        InputError: so much longer one way than the other that no row or no column of tokens is left of it.
    """
    image = rgb(image)
    pixels = anyres_pixels(image, layout)
    places = anyres_places(*image.size, layout)
    return PreparedImage(
        inputs={PIXELS: pixels, **places},
        visual_tokens=len(places[PLACES]) + len(places[NEWLINES]),
        prunable=len(places[PLACES]),
    )


def anyres_pixels(image: Image.Image, layout: AnyResLayout) -> NDArray[np.float32]:
    """[tiles, 3, size, size] float32 of an RGB image: the whole first, then the grid row by row."""
    size, resample = layout.size, FILTERS[layout.resample]
    height, width = best_grid(*image.size, layout.grids)
    fitted = fitted_size(*image.size, (height, width))
    padded = Image.new("RGB", (width, height))
    padded.paste(image.resize(fitted, resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    tiles = [image.resize((size, size), resample), *_cut(padded, size)]
    return np.stack([normalised(tile, layout) for tile in tiles])


def anyres_places(width: int, height: int, layout: AnyResLayout) -> dict[str, NDArray[np.float32] | Ids]:
    """What the vision graph must know of an image of that size; see `anyres_image`."""
    side, base = layout.side, layout.side**2
    grid_height, grid_width = best_grid(width, height, layout.grids)
    tiles_down, tiles_across = grid_height // layout.size, grid_width // layout.size
    above, left = bars(width, height, tiles_down * side, tiles_across * side)
    rows, columns = tiles_down * side - 2 * above, tiles_across * side - 2 * left

    def index_of(row: Ids, column: Ids) -> Ids:
        """Indices of places on the grid without bars into the flattened tile tokens, the whole image being tile 0."""
        row, column = row + above, column + left
        tile = 1 + row // side * tiles_across + column // side
        return tile * base + row % side * side + column % side

    shrunk = shrunk_grid(rows, columns, layout)
    if min(shrunk) < 1:
        longer, shorter = ("wider", "high") if width > height else ("higher", "wide")
        raise InputError(
            f"is so much {longer} than it is {shorter} that no line of visual tokens is left of it",
            subject=f"image of {width}x{height} pixels",
            hint="cut it into pieces",
        )
    line = shrunk[1] + 1
    within = np.arange(shrunk[0] * shrunk[1])
    places = np.concatenate([np.arange(base), base + within + within // shrunk[1]])
    standing: dict[str, NDArray[np.float32] | Ids] = {
        PLACES: places,
        NEWLINES: base + line * (np.arange(shrunk[0]) + 1) - 1,
    }
    if layout.max_tiles is None:
        row, column = np.indices((rows, columns))
        return {TOKEN_INDEX: np.concatenate([np.arange(base), index_of(row, column).ravel()]), **standing}

    first_row, second_row, down = _neighbours(rows, shrunk[0])
    first_column, second_column, across = _neighbours(columns, shrunk[1])
    corners = [
        index_of(row[:, None], column[None, :]).ravel()
        for row in (first_row, second_row)
        for column in (first_column, second_column)
    ]
    weights = [
        (vertical[:, None] * horizontal[None, :]).ravel()
        for vertical in (1 - down, down)
        for horizontal in (1 - across, across)
    ]
    whole_P4 = np.zeros((base, 4), np.float32)
    whole_P4[:, 0] = 1
    return {
        CORNERS: np.concatenate([np.arange(base)[:, None].repeat(4, 1), np.stack(corners, 1)]),
        WEIGHTS: np.concatenate([whole_P4, np.stack(weights, 1)]),
        **standing,
    }


def _with_bars(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """What may be left of a grid after its bars were cut off; they are as wide on either side."""
    yield from ((rows - 2 * bar, columns) for bar in range(rows // 2 + 1))
    yield from ((rows, columns - 2 * bar) for bar in range(columns // 2 + 1))


def _neighbours(extent: int, shrunk: int) -> tuple[Ids, Ids, NDArray[np.float32]]:
    """Along one side of a bilinear scaling: two indices for every new place, and the weight of the second.

    As `torch.nn.functional.interpolate` has it without `align_corners`, in float32.
    """
    scale = np.float32(extent) / np.float32(shrunk)
    half = np.float32(0.5)
    source = np.maximum(scale * (np.arange(shrunk, dtype=np.float32) + half) - half, np.float32(0))
    first = source.astype(np.int64)
    return first, np.minimum(first + 1, extent - 1), source - first.astype(np.float32)


# ------------------------------------------------------------------------------------------------------------
# The grid of nearest shape


def nearest_grid(width: int, height: int, layout: DynamicTilesLayout) -> tuple[int, int]:
    """(tiles across, tiles down) of the grid whose shape is nearest to that of an image.

    Of grids that are as near the larger one is taken, unless the image would have to be scaled up to more than twice its area.
    """
    best, smallest = (1, 1), math.inf
    for across, down in _grids(layout):
        difference = abs(width / height - across / down)
        if difference < smallest:
            best, smallest = (across, down), difference
        elif difference == smallest and width * height > 0.5 * layout.size**2 * across * down:
            best = (across, down)
    return best


def dynamic_image(image: Image.Image, layout: DynamicTilesLayout) -> PreparedImage:
    """An image as tiles of the grid that is nearest to its shape.

    Args:
        image: any size and mode.
        layout: of the bundle.

    Returns:
        `inputs` with `pixel_values` alone: every token of every tile, in this order, is a visual token.
    """
    image = rgb(image)
    size, resample = layout.size, FILTERS[layout.resample]
    across, down = nearest_grid(*image.size, layout)
    tiles = list(_cut(image.resize((size * across, size * down), resample), size))
    if len(tiles) > 1:
        tiles.append(image.resize((size, size), resample))
    tokens = len(tiles) * layout.tokens
    pixels = np.stack([normalised(tile, layout) for tile in tiles])
    return PreparedImage({PIXELS: pixels}, visual_tokens=tokens, prunable=tokens)


def _grids(layout: DynamicTilesLayout) -> list[tuple[int, int]]:
    """(tiles across, tiles down) of all grids, the smallest first."""
    extents = range(1, layout.max_tiles + 1)
    fitting = [
        (across, down)
        for across in extents
        for down in extents
        if layout.min_tiles <= across * down <= layout.max_tiles
    ]
    return sorted(fitting, key=lambda grid: grid[0] * grid[1])


def _cut(image: Image.Image, size: int) -> Iterator[Image.Image]:
    """The tiles of an image, row by row."""
    for top in range(0, image.height, size):
        for left in range(0, image.width, size):
            yield image.crop((left, top, left + size, top + size))
