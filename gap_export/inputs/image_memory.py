"""How much memory an image takes while it is decoded and converted, told from its header, and the limit on it.

A file of a few bytes can claim to be gigabytes. What counts is bytes, not pixels: with an alpha channel the same pixels take twice as much.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from PIL import ExifTags, Image

from gap_export.errors import InputError
from gap_export.files.file import readable_size

VARIABLE = "GAP_EXPORT_IMAGE_MEMORY"
MEMORY_LIMIT = 512 * 2**20
"""Bytes of one image: a photograph of 134 megapixels, or of 67 that has to be turned or has an alpha channel."""

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Of a pixel in Pillow; all other modes take four, three channels as well."""
_PIXEL_BYTES = 4
_DECODER_BYTES = {"WEBP": 12, "AVIF": 8, "JPEG2000": 20}
"""Of a pixel, that decoders hold beside it."""
_PROGRESSIVE_BYTES = 6
"""The coefficients of a progressive JPEG."""
_ICON, _PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"


def limit() -> int:
    """Bytes that one image may take: `MEMORY_LIMIT`, or as many MiB as the environment's `GAP_EXPORT_IMAGE_MEMORY` says.

    Raises:
        InputError: the variable is no number of MiB.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return MEMORY_LIMIT
    if not (given.isascii() and given.isdecimal() and 0 < len(given) <= 7 and int(given)):
        raise InputError(
            "is no number of MiB", subject=f"{VARIABLE}={given!r}", hint="write 1024 for a gigabyte"
        )
    return int(given) * 2**20


def check_memory(image: Image.Image, subject: str) -> None:
    """Refuse an image before it is decoded, if it would take too much.

    Args:
        image: opened, not decoded.
        subject: for the message.

    Raises:
        InputError: it names the bytes.
    """
    _check(image.size, bytes_per_pixel(image), subject)


def bytes_per_pixel(image: Image.Image) -> int:
    """Bytes that a pixel takes at most while an image is decoded, converted to RGB and turned upright."""
    decoded = _MODE_BYTES.get(image.mode, _PIXEL_BYTES)
    beside = _DECODER_BYTES.get(image.format or "", 0)
    if image.info.get("progressive") or image.info.get("progression"):
        beside += _PROGRESSIVE_BYTES
    if image.format == "TIFF" and image.info.get("compression") != "raw":
        beside += _PIXEL_BYTES  # decoded strip by strip, and a strip may be all of it
    is_ready = image.mode == "RGB" and image.info.get("transparency") is None
    if (
        not is_ready
        or "exif" in image.info
        or getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation, 1) != 1
    ):
        beside = max(beside, _PIXEL_BYTES)  # the decoder is done when the copy is made
    return decoded + beside


def check_icon(file: BinaryIO, subject: str) -> None:
    """Refuse an ICO file that holds a PNG of another size than it says; Pillow decodes it as it opens the file.

    Args:
        file: of any format; its place is as before.
        subject: for the message.

    Raises:
        InputError: it would take too much memory.
    """
    start = file.tell()
    head = file.read(6)
    if head.startswith(_ICON) and len(head) == 6:
        entries = file.read(16 * struct.unpack("<H", head[4:])[0])
        for at in range(12, len(entries) - 3, 16):
            file.seek(start + struct.unpack_from("<I", entries, at)[0])
            content = file.read(24)
            if content.startswith(_PNG) and len(content) == 24:
                _check(struct.unpack(">II", content[16:]), 2 * _PIXEL_BYTES, subject)
    file.seek(start)


def _check(size: tuple[int, ...], pixel_bytes: int, subject: str) -> None:
    width, height = size
    needed, most = width * height * pixel_bytes, limit()
    if needed > most:
        raise InputError(
            f"of {width}x{height} pixels would take {readable_size(needed)} of memory, and may take {readable_size(most)}",
            subject=subject,
            hint=f"scale it down first, the model sees a few hundred pixels a side; or set {VARIABLE} to more MiB",
        )
