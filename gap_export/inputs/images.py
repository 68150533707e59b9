"""From an image file to 8-bit RGB, and from 8-bit RGB to floats, on Pillow and NumPy alone.

The arithmetic is that of transformers' Pillow-backed processors, to the last bit: scaling by 1/255 in float64, normalising in
float32.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from gap_export.errors import InputError, first_line
from gap_export.files.kinds import IMAGE
from gap_export.files.read import opened
from gap_export.inputs.batch import ImageLayout
from gap_export.inputs.image_memory import check_icon, check_memory

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""What an image can be given as: a path, the content of a file, an image of Pillow, or pixels [height, width, 3] uint8."""

SIDE_LIMIT = 32_768
"""Longest side in pixels. Padding an image to a square takes work in the square of its longer side."""

# Raster formats only: Pillow would also run an external interpreter on PostScript, which an image must not
# trigger.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
T = TypeVar("T")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how an image is turned upright; those from 5 on exchange width and height."""
_STRIP_PIXELS = 2**18
"""Converted at a time, so that copies on the way take little."""
# Pillow's 32-bit mode holds 16-bit samples for these formats; for others its range is unknown.
_WIDE_GREY_FORMATS = ("PPM", "PNG")


# ------------------------------------------------------------------------------------------------------------
# Reading


def load_image(source: ImageSource, *, name: str | None = None, upright: bool = True) -> Image.Image:
    """An image as 8-bit RGB, upright: as it is displayed.

    The EXIF orientation is applied (unless `upright` is False), transparency is laid over white (as transformers' processors do), 16-bit
    grey is scaled to 8 bits, of an animation the first frame is taken. Colour profiles are not applied.

    Args:
        source: path of a file in one of `FORMATS`, the content of one, an image of Pillow, or pixels [height, width, 3] uint8.
        name: for messages; the path, or what kind of source it is, where left out.
        upright: whether the EXIF orientation is applied; pixels are taken as they are stored otherwise (but TIFF files are always
            upright: Pillow turns them itself).

    Returns:
        An RGB image, fully decoded; a file that was opened here is closed.

    Raises:
        InputError: missing, no regular file, empty, truncated, not an image, of more memory than an image may take
            (`image_memory`), of a pixel type without a defined range (floating point, 32-bit integers), or an array of another
            type or shape.
    """
    if isinstance(source, str | os.PathLike):
        return _from_file(source, name or str(source), upright)
    if isinstance(source, bytes):
        name = name or f"image of {len(source)} bytes"
        if not source:
            raise _empty(name)
        return _decoded(io.BytesIO(source), name, upright)
    if isinstance(source, Image.Image):
        name = name or f"image of {source.width}x{source.height} pixels"
        made = _guarded(lambda: _to_8_bit_rgb(source, name, upright), name)
        return made.copy() if made is source else made
    if isinstance(source, np.ndarray):
        return _from_pixels(source, name or "array")
    raise InputError(
        f"is of type {type(source).__name__}, which is no image",
        subject=name or "image",
        hint=f"give {_TAKEN}",
    )


_TAKEN = "a path, the bytes of an image file, an image of Pillow, or a uint8 array [height, width, 3]"


def image_size(source: str | os.PathLike[str] | bytes, *, name: str, upright: bool = True) -> tuple[int, int]:
    """(width, height) of an image file, from its header alone where the format allows it.

    Args:
        source: path, or content of the file.
        name: for messages.
        upright: whether the EXIF orientation is applied.

    Raises:
        InputError: missing, empty, or not an image.
    """

    def measured(file: BinaryIO) -> tuple[int, int]:
        with _opened(file, name) as image:
            _check_size(image, name)
            if image.format == "TIFF":  # Pillow itself turns these, when it decodes them
                image.load()
            exchanged = upright and _orientation(image) >= 5
            return (image.height, image.width) if exchanged else image.size

    if isinstance(source, bytes):
        if not source:
            raise _empty(name)
        return _guarded(lambda: measured(io.BytesIO(source)), name)
    with opened(Path(source), IMAGE) as file:
        _check_not_empty(file, name)
        return _guarded(lambda: measured(file), name)


def _from_file(path: str | os.PathLike[str], name: str, upright: bool) -> Image.Image:
    with opened(Path(path), IMAGE) as file:
        _check_not_empty(file, name)
        return _decoded(file, name, upright)


def _check_not_empty(file: BinaryIO, name: str) -> None:
    if os.fstat(file.fileno()).st_size == 0:
        raise _empty(name)


def _from_pixels(pixels: NDArray[Any], name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(
            f"is {pixels.dtype} {list(pixels.shape)}",
            subject=name,
            hint="give uint8 [height, width, 3], RGB; 0..1 floats: (255 * array).round().astype('uint8')",
        )
    image = Image.fromarray(np.ascontiguousarray(pixels))
    _check_size(image, name)
    return image


def _empty(subject: str) -> InputError:
    return InputError("is empty (0 bytes)", subject=subject, hint="the download or copy failed: get it again")


def _decoded(source: BinaryIO, subject: str, upright: bool) -> Image.Image:
    return _guarded(lambda: _decode(source, subject, upright), subject)


def _guarded(work: Callable[[], T], subject: str) -> T:
    """Decode; whatever goes wrong names the image."""
    try:
        return work()
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            "is not an image in a known format", subject=subject, hint=f"use one of {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"has more pixels than Pillow decodes: {first_line(error)}",
            subject=subject,
            hint="scale it down first; the model sees a few hundred pixels a side",
        ) from error
    except MemoryError as error:
        raise InputError(
            "takes more memory than there is",
            subject=subject,
            hint="scale it down first, or close other programs",
        ) from error
    # Decoders raise whatever the broken bytes make them raise: OSError, SyntaxError, struct.error, zlib.error.
    except Exception as error:
        raise InputError(
            f"cannot be decoded: {first_line(error)}",
            subject=subject,
            hint="the file is damaged or cut short: get it again",
        ) from error


def _decode(file: BinaryIO, subject: str, upright: bool) -> Image.Image:
    with _opened(file, subject) as image:
        return _to_8_bit_rgb(image, subject, upright)


def _opened(file: BinaryIO, subject: str) -> Image.Image:
    check_icon(file, subject)
    Image.init()  # fills Image.OPEN; a Pillow built without one of the formats does not list it
    with warnings.catch_warnings():
        # The limit below is checked before any pixel is decoded; Pillow's own warning would say it twice.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _to_8_bit_rgb(image: Image.Image, subject: str, upright: bool) -> Image.Image:
    _check_size(image, subject)
    _check_range(image, image.format, subject)
    image.load()
    turn = _TURNS.get(_orientation(image)) if upright else None
    made = _to_rgb(image, image.format, subject)
    return made if turn is None else made.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none, or one that cannot be read, which viewers pass over too."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # whatever the broken bytes make the parser raise
        return 1
    return found if isinstance(found, int) else 1


def _check_size(image: Image.Image, subject: str) -> None:
    if not image.width * image.height:
        raise InputError("has no pixels", subject=subject, hint="give an image of at least one pixel")
    _check_long_side(image, subject)
    check_memory(image, subject)


def _check_long_side(image: Image.Image, subject: str) -> None:
    if max(image.size) > SIDE_LIMIT:
        raise InputError(
            f"is {image.width}x{image.height} pixels, and no side may be longer than {SIDE_LIMIT}",
            subject=subject,
            hint="cut it into pieces or scale it down; the model sees a few hundred pixels a side",
        )


def _to_rgb(image: Image.Image, file_format: str | None, subject: str) -> Image.Image:
    """8-bit RGB, transparency over white. `file_format` decides what Pillow's mode "I" means."""
    _check_range(image, file_format, subject)
    if _is_wide_grey(image, file_format):
        return _in_strips(image, _grey_from_16_bits)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _in_strips(image, _over_white)
    return image if image.mode == "RGB" else _in_strips(image, lambda strip: strip.convert("RGB"))


def _is_wide_grey(image: Image.Image, file_format: str | None) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and file_format in _WIDE_GREY_FORMATS)


def _check_range(image: Image.Image, file_format: str | None, subject: str) -> None:
    if image.mode.startswith(("I", "F")) and not _is_wide_grey(image, file_format):
        raise InputError(
            f"has pixels of type {image.mode!r}, whose range is not defined",
            subject=subject,
            hint="save it with 8 or 16 bits a channel",
        )


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB of an image, converted pixel by pixel, some rows at a time."""
    made = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        made.paste(convert(strip), (0, top))
    return made


def _over_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded; Pillow's own conversion clips at 255 and leaves a white image."""
    samples = np.asarray(image).astype(np.uint32)
    grey = ((samples + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, converted as in `load_image`.

    Raises:
        InputError: a side that is too long, or a pixel type without a defined range.
    """
    subject = f"image of {image.width}x{image.height} pixels"
    _check_long_side(image, subject)
    return _to_rgb(image, image.format, subject)


def normalised(image: Image.Image, layout: ImageLayout) -> NDArray[np.float32]:
    """RGB levels 0..255 -> [3, height, width] float32, with mean 0 and deviation 1 by the numbers given."""
    table = _normalised_levels(layout)
    levels_HWC = np.asarray(image)
    return np.stack([table[channel][levels_HWC[..., channel]] for channel in range(3)])


def _normalised_levels(layout: ImageLayout) -> NDArray[np.float32]:
    """[3, 256] float32: what each 8-bit level of each channel becomes. Precisions as in transformers."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(layout.mean, np.float32)[:, None]
    std = np.array(layout.std, np.float32)[:, None]
    return (scaled[None, :] - mean) / std
