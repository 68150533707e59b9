"""From an image file to `pixel_values`, on Pillow and NumPy alone.

The arithmetic is that of transformers' Pillow-backed processors (`CLIPImageProcessorPil`,
`LlavaImageProcessorPil` with `do_pad`), to the last bit: 8-bit resampling by Pillow, scaling by 1/255 in
float64, normalising in float32.

    pad      centre on a square of the background colour, then resize       (LLaVA-1.5, Shikra)
    crop     resize the short side, then cut the centre                     (transformers' LLaVA by default)
    stretch  resize width and height independently                          (MiniGPT-v2)

Pillow resizes a square along its rows first, then along its columns, rounding to 8 bits in between. Each pass
sees one row (one column) at a time, so the first can be run on strips with the same result: a 12000x800
panorama is padded and fitted here without ever holding its 12000x12000 square.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from gap_export.errors import InputError
from gap_export.inputs.layouts import SquareLayout

PIXEL_LIMIT = 100_000_000
"""Most pixels of an image that is decoded or made on the way: about 300 MB of RGB. A file of a few bytes can
claim to be far larger."""

SIDE_LIMIT = 32_768
"""Longest side in pixels. Padding an image to a square takes work in the square of its longer side."""

STRIP_PIXELS = 2**22
"""Pixels of the padded square that are held at a time."""

# Raster formats only: Pillow would also run an external interpreter on PostScript, which an image must not
# trigger.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pillow's 32-bit mode holds 16-bit samples for these formats; for others its range is unknown.
_WIDE_GREY_FORMATS = ("PPM", "PNG")


class Normalisation(Protocol):
    """Whatever says by which numbers channels are normalised."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel, after scaling to 0..1."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel, after scaling to 0..1."""
        ...


# ------------------------------------------------------------------------------------------------------------
# Reading


def load_image(path: Path | str) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    The EXIF orientation is applied, transparency is laid over white (as transformers' processors do), 16-bit
    grey is scaled to 8 bits, of an animation the first frame is taken. Colour profiles are not applied.

    Args:
        path: a file in one of `FORMATS`.

    Returns:
        An RGB image, fully decoded; the file is closed.

    Raises:
        InputError: missing, empty, truncated, not an image, too large, or of a pixel type without a defined
            range (floating point, 32-bit integers).
    """
    subject = str(path)
    try:
        if not os.path.isfile(path):
            exists = os.path.exists(path)
            raise InputError(
                "is not a file" if exists else "does not exist",
                subject=subject,
                hint="give the path of an image",
            )
        if os.path.getsize(path) == 0:
            raise _empty(subject)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", subject=subject, hint="check its permissions"
        ) from error
    return _decoded(path, subject)


def image_from_bytes(content: bytes, name: str) -> Image.Image:
    """The same of an encoded image in memory; `name` is for messages."""
    if not content:
        raise _empty(name)
    return _decoded(io.BytesIO(content), name)


def _empty(subject: str) -> InputError:
    return InputError("is empty (0 bytes)", subject=subject, hint="the download or copy failed: get it again")


def _decoded(source: Path | str | BinaryIO, subject: str) -> Image.Image:
    """Decode; whatever goes wrong names the image."""
    try:
        return _decode(source, subject)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            "is not an image in a known format", subject=subject, hint=f"use one of {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(subject) from error
    # Decoders raise whatever the broken bytes make them raise: OSError, SyntaxError, struct.error, zlib.error.
    except Exception as error:
        raise InputError(
            f"cannot be decoded: {error}",
            subject=subject,
            hint="the file is damaged or cut short: get it again",
        ) from error


def _decode(path: Path | str | BinaryIO, subject: str) -> Image.Image:
    Image.init()  # fills Image.OPEN; a Pillow built without one of the formats does not list it
    with warnings.catch_warnings():
        # The limit below is checked before any pixel is decoded; Pillow's own warning would say it twice.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    with opened:
        if opened.width * opened.height > PIXEL_LIMIT:
            raise _too_large(subject)
        _check_long_side(opened, subject)
        opened.load()
        file_format = opened.format
        upright = ImageOps.exif_transpose(opened)
        return _to_rgb(upright, file_format, subject)


def _too_large(subject: str) -> InputError:
    return InputError(
        f"has more than {PIXEL_LIMIT // 10**6} million pixels",
        subject=subject,
        hint="scale it down first; the model sees a few hundred pixels a side",
    )


def _check_long_side(image: Image.Image, subject: str) -> None:
    if max(image.size) > SIDE_LIMIT:
        raise InputError(
            f"is {image.width}x{image.height} pixels, and no side may be longer than {SIDE_LIMIT}",
            subject=subject,
            hint="cut it into pieces or scale it down; the model sees a few hundred pixels a side",
        )


def _to_rgb(image: Image.Image, file_format: str | None, subject: str) -> Image.Image:
    """8-bit RGB, transparency over white. `file_format` decides what Pillow's mode "I" means."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in _WIDE_GREY_FORMATS):
        return _grey_from_16_bits(image).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"has pixels of type {image.mode!r}, whose range is not defined",
            subject=subject,
            hint="save it with 8 or 16 bits a channel",
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert(
            "RGB"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded; Pillow's own conversion clips at 255 and leaves a white image."""
    samples = np.asarray(image).astype(np.uint32)
    grey = ((samples + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey)


# ------------------------------------------------------------------------------------------------------------
# Fitting


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


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, converted as in `load_image`.

    Raises:
        InputError: a side that is too long, or a pixel type without a defined range.
    """
    subject = f"image of {image.width}x{image.height} pixels"
    _check_long_side(image, subject)
    return _to_rgb(image, image.format, subject)


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
    if width * height > PIXEL_LIMIT:
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
        InputError: see `fit`.
        ValueError: an empty batch.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    return np.stack([normalised(fit(image, preprocessing), preprocessing) for image in images])


def normalised(image: Image.Image, preprocessing: Normalisation) -> NDArray[np.float32]:
    """RGB levels 0..255 -> [3, height, width] float32, with mean 0 and deviation 1 by the numbers given."""
    table = _normalised_levels(preprocessing)
    levels_HWC = np.asarray(image)
    return np.stack([table[channel][levels_HWC[..., channel]] for channel in range(3)])


def _normalised_levels(preprocessing: Normalisation) -> NDArray[np.float32]:
    """[3, 256] float32: what each 8-bit level of each channel becomes. Precisions as in transformers."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(preprocessing.mean, np.float32)[:, None]
    std = np.array(preprocessing.std, np.float32)[:, None]
    return (scaled[None, :] - mean) / std
