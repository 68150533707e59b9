"""How images become what a vision tower takes: one model per layout, as the manifest stores them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gap_export.records import Record

Positive = Annotated[float, Field(gt=0)]


class SquareLayout(Record):
    """How an image becomes `pixel_values` [B, 3, size, size] float32.

    Attributes:
        kind: tells it from other layouts.
        size: side in pixels.
        fit: `pad` to a square, `crop` the centre of the resized short side, or `stretch`.
        background: RGB 0..255 that padding is filled with.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    kind: Literal["square"] = "square"
    size: int = Field(ge=1)
    fit: Literal["pad", "crop", "stretch"]
    background: tuple[int, int, int]
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class AnyResLayout(Record):
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
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    kind: Literal["anyres"] = "anyres"
    size: int = Field(ge=1)
    side: int = Field(ge=1)
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    max_tiles: int | None = Field(default=None, ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class DynamicTilesLayout(Record):
    """How an image becomes tiles of the grid whose shape is nearest to its own, which it is stretched to fill, with the whole
    image, squashed, as the last tile where there is more than one (InternVL).

    Attributes:
        kind: tells it from other layouts.
        size: side of a tile in pixels.
        tokens: visual tokens of a tile.
        min_tiles: smallest number of tiles in a grid.
        max_tiles: largest number of tiles in a grid.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    kind: Literal["dynamic_tiles"] = "dynamic_tiles"
    size: int = Field(ge=1)
    tokens: int = Field(ge=1)
    min_tiles: int = Field(ge=1)
    max_tiles: int = Field(ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class NativeResolutionLayout(Record):
    """How an image becomes patches at nearly its own size and shape (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

    Attributes:
        kind: tells it from other layouts.
        patch: side of a patch in pixels.
        merge: patches along the side of the square that becomes one visual token.
        frames: equal frames that a patch holds, as if the image were a film.
        window: visual tokens along the side of the squares within which most layers attend; None where all attend to all.
        min_pixels: smaller images are scaled up.
        max_pixels: larger images are scaled down.
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
    """

    kind: Literal["native"] = "native"
    patch: int = Field(ge=1)
    merge: int = Field(ge=1)
    frames: int = Field(ge=1)
    window: int | None = Field(default=None, ge=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


Layout = Annotated[
    SquareLayout | AnyResLayout | DynamicTilesLayout | NativeResolutionLayout, Field(discriminator="kind")
]
"""Whatever a bundle may hold; `kind` tells which."""


class TokenRange(Record):
    """How many visual tokens images have, where they differ.

    Attributes:
        min_tokens: of the smallest image, those that are never pruned not counted.
        typical_tokens: of a usual one, the same way.
        max_tokens: of the largest one, the same way.
        never_pruned: most tokens of an image that are never pruned (ends of lines).
    """

    min_tokens: int = Field(ge=1)
    typical_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    never_pruned: int = Field(default=0, ge=0)
