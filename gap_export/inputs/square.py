"""Images that become one square of one size each: padded, cropped or stretched.

The arithmetic is that of transformers' Pillow-backed processors (`CLIPImageProcessorPil`, `LlavaImageProcessorPil` with
`do_pad`), to the last bit: 8-bit resampling by Pillow.

    pad      centre on a square of the background colour, then resize       (LLaVA-1.5, Shikra)
    crop     resize the short side, then cut the centre                     (transformers' LLaVA by default)
    stretch  resize width and height independently                          (MiniGPT-v2)

Pillow resizes a square along its rows first, then along its columns, rounding to 8 bits in between. Each pass
sees one row (one column) at a time, so the first can be run on strips with the same result: a 12000x800
panorama is padded and fitted here without ever holding its 12000x12000 square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gap_export.errors import InputError
from gap_export.inputs.batch import ImageBatch, ImageLayout, Size, of_one_size
from gap_export.inputs.images import FILTERS, normalised, rgb

STRIP_PIXELS = 2**22
"""Pixels of the padded square that are held at a time."""
SCALED_LIMIT = 100_000_000
"""Most pixels of an image whose short side is scaled up to the model's: a thread of pixels becomes gigabytes."""


class SquareLayout(ImageLayout):
    """How an image becomes `pixel_values` [B, 3, size, size] float32.

    Attributes:
        kind: tells it from other layouts.
        size: side in pixels.
        fit: `pad` to a square, `crop` the centre of the resized short side, or `stretch`.
        background: RGB 0..255 that padding is filled with.
    """

    kind: Literal["square"] = "square"
    size: int = Field(ge=1)
    fit: Literal["pad", "crop", "stretch"]
    background: tuple[int, int, int]

    def prepare(
        self, images: Sequence[Image.Image], *, visual_tokens: int, per_prompt: int = 1
    ) -> ImageBatch:
        """Preprocess a batch of images."""
        return of_one_size(pixel_values(images, self), visual_tokens)

    @property
    def pixels_of(self) -> Literal["image", "padded_square"] | None:
        """What the model sees as one grid of pixels: the stretched image, or its padded square."""
        if self.fit == "crop":
            return None
        return "padded_square" if self.fit == "pad" else "image"

    def resized(self, size: Size) -> Size | None:
        """(width, height) of an image, or of its padded square, as the model sees it."""
        return None if self.pixels_of is None else (self.size, self.size)

    def seen_area(self, size: Size) -> tuple[float, float, float, float]:
        """(left, top, width, height) of the part of an image that its tokens cover, in pixels of the image."""
        width, height = size
        if self.fit == "pad":
            side, left, top = padding(width, height)
            return -float(left), -float(top), float(side), float(side)
        if self.fit == "crop":
            resized_width, resized_height = crop_size(width, height, self.size)
            per_x, per_y = width / resized_width, height / resized_height
            left, top = (resized_width - self.size) // 2, (resized_height - self.size) // 2
            return left * per_x, top * per_y, self.size * per_x, self.size * per_y
        return super().seen_area(size)


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The colour LLaVA pads with: `int(mean * 255)` per channel, truncated and not rounded."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def padding(width: int, height: int) -> tuple[int, int, int]:
    """Where an image lies on its padded square.

    Returns:
        (side of the square, columns to the left, rows above), in pixels; an odd remainder goes right or
        below.
    """
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def crop_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) after the short side was resized to `size`; the long side is truncated, not rounded."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def fit(image: Image.Image, preprocessing: SquareLayout) -> Image.Image:
    """The image as the model sees it, before normalising.

    Args:
        image: any size and mode; other modes than RGB are converted as in `load_image`.
        preprocessing: how.

    Returns:
        RGB, `size` x `size`.

    Raises:
        InputError: too long or too narrow to fit, or a pixel type without a defined range.
    """
    image = rgb(image)
    size, resample = preprocessing.size, FILTERS[preprocessing.resample]
    if preprocessing.fit == "pad":
        return _pad_and_resize(image, size, preprocessing.background, resample)
    if preprocessing.fit == "crop":
        return _resize_and_crop(image, size, resample)
    return image.resize((size, size), resample)


def _pad_and_resize(
    image: Image.Image, size: int, background: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    side, left, top = padding(*image.size)
    narrowed = Image.new("RGB", (size, side), background)
    rows = max(1, STRIP_PIXELS // side)
    for y in range(0, image.height, rows):
        strip = Image.new("RGB", (side, min(rows, image.height - y)), background)
        strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
        narrowed.paste(strip.resize((size, strip.height), resample), (0, top + y))
    return narrowed.resize((size, size), resample)


def _resize_and_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    width, height = crop_size(*image.size, size)
    if width * height > SCALED_LIMIT:
        raise InputError(
            f"would be {width}x{height} pixels with its short side scaled to {size}",
            subject=f"image of {image.width}x{image.height} pixels",
            hint="cut it to a shape closer to a square: nearly all of it lies outside the centre crop",
        )
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def pixel_values(images: Sequence[Image.Image], preprocessing: SquareLayout) -> NDArray[np.float32]:
    """Model input of a batch of images.

    Args:
        images: at least one.
        preprocessing: size, fit, mean and standard deviation.

    Returns:
        [B, 3, size, size] float32.

    Raises:
        InputError: an image that cannot be fitted.
        ValueError: an empty batch.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    return np.stack([normalised(fit(image, preprocessing), preprocessing) for image in images])
