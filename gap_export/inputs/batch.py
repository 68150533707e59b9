"""What preprocessing gives, and what every layout of images can do; the layouts themselves stand in files of their own.

How many visual tokens an image has before pruning, and how they lie, is known before the tower runs: it follows from the
size of the image alone. Splice and position arithmetic need it, so it travels with the pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gap_export.positions import Ids
from gap_export.records import Record

PixelInputs = Mapping[str, NDArray[np.float32] | Ids]
"""Inputs of one call of the vision graph, those about expression and count excepted."""

Size = tuple[int, int]
"""(width, height) in pixels."""

TYPICAL_SIZE: Size = (640, 480)
"""Of an image that engines are tuned for."""

PIXELS = "pixel_values"
"""The input of the vision graph that every layout has."""

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ImageBatch:
    """A batch, ready for the vision graph.

    Attributes:
        calls: inputs of every call, in the order of the images.
        visual_tokens: [B * I] int64: N of every image, tokens that are never pruned included.
        prunable: [B * I] int64: the tokens of which a share is kept.
        grids: [B * I, 2] int64 (rows, columns) of the visual tokens, where positions follow the grid; None where they count.
        one_size: whether all images of the model have the same number of tokens, and one call takes them all.
        per_prompt: I, how many of them belong to one prompt.
    """

    calls: tuple[PixelInputs, ...]
    visual_tokens: Ids
    prunable: Ids
    grids: Ids | None = None
    one_size: bool = False
    per_prompt: int = 1

    @property
    def rows_per_call(self) -> int:
        """Images in one call."""
        return len(self.visual_tokens) // len(self.calls)

    def by_prompt(self, of_images: Ids) -> Ids:
        """What is known of every image, with an axis for the images of a prompt where those are several."""
        if self.per_prompt == 1:
            return of_images
        return of_images.reshape(-1, self.per_prompt, *of_images.shape[1:])


def of_one_size(pixel_values_BCHW: NDArray[np.float32], visual_tokens: int) -> ImageBatch:
    """Images that all have N visual tokens, in one call."""
    tokens_B = np.full(len(pixel_values_BCHW), visual_tokens, np.int64)
    return ImageBatch(({PIXELS: pixel_values_BCHW},), tokens_B, tokens_B, one_size=True)


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for the vision graph.

    Attributes:
        inputs: of its call, by name.
        visual_tokens: N.
        prunable: the tokens of which a share is kept.
        grid: (rows, columns) of the visual tokens, where positions follow the grid.
    """

    inputs: PixelInputs
    visual_tokens: int
    prunable: int
    grid: tuple[int, int] | None = None


def of_many_sizes(images: Sequence[PreparedImage], per_prompt: int) -> ImageBatch:
    """Images that differ in how many visual tokens they have, in a call each."""
    grids = [image.grid for image in images if image.grid is not None]
    return ImageBatch(
        calls=tuple(image.inputs for image in images),
        visual_tokens=np.array([image.visual_tokens for image in images], np.int64),
        prunable=np.array([image.prunable for image in images], np.int64),
        grids=np.array(grids, np.int64) if grids else None,
        per_prompt=per_prompt,
    )


class TokenRange(Record):
    """How many visual tokens images have, where they differ.

    Attributes:
        min_tokens: of the smallest image, those that are never pruned not counted.
        typical_tokens: of a typical one, counted in the same way.
        max_tokens: of the largest one, counted in the same way.
        never_pruned: most tokens of an image that are never pruned (ends of lines).
    """

    min_tokens: int = Field(ge=1)
    typical_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    never_pruned: int = Field(default=0, ge=0)


class ImageLayout(Record):
    """How an image becomes what a vision tower takes: what every layout says and can do, as the manifest stores it.

    A layout is one file: a class with its own name in a field `kind`, and its place in `layouts.Layout`. What is defined here is
    right where every image becomes squares that the tower sees one by one.

    Attributes:
        resample: Pillow's filter name.
        mean: per channel, after scaling to 0..1.
        std: per channel, after scaling to 0..1.
        takes_max_pixels: whether a build may bound the pixels of an image (`--max-pixels`).
    """

    takes_max_pixels: ClassVar[bool] = False

    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]

    @abstractmethod
    def prepare(
        self, images: Sequence[Image.Image], *, visual_tokens: int, per_prompt: int = 1
    ) -> ImageBatch:
        """Preprocess a batch.

        Args:
            images: of any size and mode, at least one; those of a prompt follow each other.
            visual_tokens: N of the model, where all images have as many.
            per_prompt: I, how many belong to one prompt.

        Raises:
            InputError: an image that cannot be fitted.
        """

    @property
    def pixels_of(self) -> Literal["image", "padded_square"] | None:
        """What the model sees as one grid of pixels: the whole image, or its padded square. None where that is tiles, or a part."""
        return None

    def resized(self, size: Size) -> Size | None:
        """(width, height) of an image as the model sees it, in pixels of the model; None where `pixels_of` is None.

        Args:
            size: (width, height) of the image.

        Raises:
            InputError: an image that cannot be fitted.
        """
        return None

    def token_grid(self, size: Size) -> tuple[int, int] | None:
        """(rows, columns) of the visual tokens of an image of that size; None where the size does not tell: they lie on the
        model's own grid (`ModelSpec.grid`), or on none."""
        return None

    def seen_area(self, size: Size) -> tuple[float, float, float, float]:
        """(left, top, width, height) of the part of an image that its tokens cover, in pixels of the image.

        Padding that the model saw reaches beyond the image; what was cut off is not covered.
        """
        return 0.0, 0.0, float(size[0]), float(size[1])

    def token_range(self) -> tuple[TokenRange, int] | None:
        """(how many visual tokens images have, N of the largest image); None where all have as many."""
        return None
