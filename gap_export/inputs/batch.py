"""A batch of images as the vision graph takes them: one call for all where they have one size, one call each where they differ.

How many visual tokens an image has before pruning, and how they lie, is known before the tower runs: it follows from the
size of the image alone. Splice and position arithmetic need it, so it travels with the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.inputs import native_resolution, tiles
from gap_export.inputs.images import pixel_values
from gap_export.inputs.layouts import AnyResLayout, Layout, NativeResolutionLayout, SquareLayout
from gap_export.positions import Ids

if TYPE_CHECKING:
    from gap_export.bundle.manifest import ModelSpec

PixelInputs = Mapping[str, NDArray[np.float32] | Ids]
"""Inputs of one call of the vision graph, those about expression and count excepted."""


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
    return ImageBatch(({"pixel_values": pixel_values_BCHW},), tokens_B, tokens_B, one_size=True)


def prepare(
    images: Sequence[Image.Image], preprocessing: Layout, model: ModelSpec, *, per_prompt: int = 1
) -> ImageBatch:
    """Preprocess a batch.

    Args:
        images: RGB, at least one; those of a prompt follow each other.
        preprocessing: of the bundle.
        model: the same.
        per_prompt: I, how many belong to one prompt.

    Raises:
        InputError: an image that cannot be fitted.
    """
    if isinstance(preprocessing, SquareLayout):
        return of_one_size(pixel_values(images, preprocessing), model.visual_tokens)
    if isinstance(preprocessing, NativeResolutionLayout):
        native = [native_resolution.native_image(image, preprocessing) for image in images]
        grids = np.array([image.grid for image in native], np.int64)
        tokens_B = grids.prod(axis=1)
        return ImageBatch(
            tuple(image.inputs for image in native),
            tokens_B,
            tokens_B,
            grids=grids,
            per_prompt=per_prompt,
        )
    if isinstance(preprocessing, AnyResLayout):
        tiled = [tiles.anyres_image(image, preprocessing) for image in images]
    else:
        tiled = [tiles.dynamic_image(image, preprocessing) for image in images]
    return ImageBatch(
        calls=tuple(image.inputs for image in tiled),
        visual_tokens=np.array([image.visual_tokens for image in tiled], np.int64),
        prunable=np.array([image.prunable for image in tiled], np.int64),
        per_prompt=per_prompt,
    )


def seen_size(size: tuple[int, int], preprocessing: Layout) -> tuple[int, int] | None:
    """(width, height) of an image as the model sees it, where it keeps its shape; None where it becomes squares.

    Args:
        size: (width, height) of the image.
        preprocessing: of the bundle.
    """
    if not isinstance(preprocessing, NativeResolutionLayout):
        return None
    return native_resolution.resized(*size, preprocessing)
