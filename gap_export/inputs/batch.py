"""A batch of pictures as the vision graph takes them: one call for all where they have one size, one call each where they differ.

How many visual tokens a picture has before pruning, and how they lie, is known before the tower runs: it follows from the
size of the picture alone. Splice and position arithmetic need it, so it travels with the pixels.
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
from gap_export.inputs.layouts import AnyPreprocessing, AnyRes, Native, Preprocessing
from gap_export.positions import Ids

if TYPE_CHECKING:
    from gap_export.bundle.manifest import ModelFacts

PixelInputs = Mapping[str, NDArray[np.float32] | Ids]
"""Inputs of one call of the vision graph, those about expression and count excepted."""


@dataclass(frozen=True)
class Pictures:
    """A batch, ready for the vision graph.

    Attributes:
        calls: inputs of every call, in the order of the pictures.
        visual_tokens: [B * I] int64: N of every picture, tokens that are never pruned included.
        prunable: [B * I] int64: the tokens of which a share is kept.
        grids: [B * I, 2] int64 (rows, columns) of the visual tokens, where positions follow the grid; None where they count.
        one_size: whether all pictures of the model have the same number of tokens, and one call takes them all.
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
        """Pictures in one call."""
        return len(self.visual_tokens) // len(self.calls)

    def by_prompt(self, of_pictures: Ids) -> Ids:
        """What is known of every picture, with an axis for the pictures of a prompt where those are several."""
        if self.per_prompt == 1:
            return of_pictures
        return of_pictures.reshape(-1, self.per_prompt, *of_pictures.shape[1:])


def of_one_size(pixel_values_BCHW: NDArray[np.float32], visual_tokens: int) -> Pictures:
    """Pictures that all have N visual tokens, in one call."""
    tokens_B = np.full(len(pixel_values_BCHW), visual_tokens, np.int64)
    return Pictures(({"pixel_values": pixel_values_BCHW},), tokens_B, tokens_B, one_size=True)


def prepare(
    images: Sequence[Image.Image], preprocessing: AnyPreprocessing, model: ModelFacts, *, per_prompt: int = 1
) -> Pictures:
    """Preprocess a batch.

    Args:
        images: RGB, at least one; those of a prompt follow each other.
        preprocessing: of the bundle.
        model: the same.
        per_prompt: I, how many belong to one prompt.

    Raises:
        InputError: a picture that cannot be fitted.
    """
    if isinstance(preprocessing, Preprocessing):
        return of_one_size(pixel_values(images, preprocessing), model.visual_tokens)
    if isinstance(preprocessing, Native):
        native = [native_resolution.native_picture(image, preprocessing) for image in images]
        grids = np.array([picture.grid for picture in native], np.int64)
        tokens_B = grids.prod(axis=1)
        return Pictures(
            tuple(picture.inputs for picture in native),
            tokens_B,
            tokens_B,
            grids=grids,
            per_prompt=per_prompt,
        )
    if isinstance(preprocessing, AnyRes):
        tiled = [tiles.anyres_picture(image, preprocessing) for image in images]
    else:
        tiled = [tiles.dynamic_picture(image, preprocessing) for image in images]
    return Pictures(
        calls=tuple(picture.inputs for picture in tiled),
        visual_tokens=np.array([picture.visual_tokens for picture in tiled], np.int64),
        prunable=np.array([picture.prunable for picture in tiled], np.int64),
        per_prompt=per_prompt,
    )


def seen_size(size: tuple[int, int], preprocessing: AnyPreprocessing) -> tuple[int, int] | None:
    """(width, height) of a picture as the model sees it, where it keeps its shape; None where it becomes squares.

    Args:
        size: (width, height) of the picture.
        preprocessing: of the bundle.
    """
    if not isinstance(preprocessing, Native):
        return None
    return native_resolution.resized(*size, preprocessing)
