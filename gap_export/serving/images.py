"""Images of requests: from data URLs, or fetched where that is allowed; bounded before anything is decoded.

Nothing here says what a decoder said: whoever sends a broken image learns that it is broken, and nothing of this process.
"""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Callable, Sequence
from typing import Annotated

from PIL import Image
from pydantic import Field

from gap_export.errors import InputError
from gap_export.files import readable_size
from gap_export.inputs import image_memory
from gap_export.inputs.images import FORMATS, load_image
from gap_export.records import Record
from gap_export.serving.remote_images import ImageRefused, RemoteImage, RemoteImages

_DATA = re.compile(r"data:image/[a-z0-9][a-z0-9.+-]{0,60};base64,", re.IGNORECASE | re.ASCII)
_PIECE = 2**16  # of base64, a multiple of four
_PIXEL_BYTES = 3
"""Of a decoded RGB image."""

MOST_IMAGES = 64
"""Of a request, whatever a server is set to take."""

Content = Callable[[], bytes]
"""Gives the content of an image file; raises `ImageRefused`."""


class ImageBounds(Record):
    """What images of a request may be.

    Attributes:
        encoded_bytes: most bytes of one image file.
        pixels: most pixels of one image.
        side: its longest side, pixels.
        min_side: its shortest side, pixels.
        images: most images of a request.
    """

    encoded_bytes: Annotated[int, Field(ge=1, le=2**30, strict=True)] = 10 * 2**20
    pixels: Annotated[int, Field(ge=16, le=10**9, strict=True)] = 40_000_000
    side: Annotated[int, Field(ge=4, le=32_768, strict=True)] = 16_384
    min_side: Annotated[int, Field(ge=1, le=64, strict=True)] = 4
    images: Annotated[int, Field(ge=1, le=MOST_IMAGES, strict=True)] = 8


class RequestImages:
    """Makes images of what requests say of them.

    Args:
        bounds: of images.
        remote: fetches them from allowed domains; None where none is.
    """

    def __init__(self, bounds: ImageBounds, remote: RemoteImages | None = None) -> None:
        self.bounds, self._remote = bounds, remote

    def content(self, url: str, subject: str) -> Content | RemoteImage:
        """Where the bytes of an image are; neither decoded nor fetched.

        Args:
            url: a data URL, or the address of an image.
            subject: the field that it stands in, for messages.

        Raises:
            ImageRefused: it is neither, too large, or may not be fetched.
        """
        if url[:5].lower() == "data:":
            return self._data(url, subject)
        if url[:8].lower().startswith(("http://", "https://")):
            if self._remote is None:
                raise ImageRefused(
                    "is the address of an image, and this server fetches none",
                    subject=subject,
                    hint="send the image itself: data:image/png;base64,...",
                )
            target = self._remote.check(url, subject)
            return RemoteImage(self._remote, target, self.bounds.encoded_bytes, subject)
        raise ImageRefused(
            "is no data URL of an image", subject=subject, hint="send data:image/png;base64,..."
        )

    def open(self, contents: Sequence[Content], subjects: Sequence[str]) -> list[Image.Image]:
        """Decode the images of a request.

        Args:
            contents: of them; those of other servers were fetched.
            subjects: the fields that they stand in.

        Returns:
            RGB, upright; of animations the first frame.

        Raises:
            ImageRefused: one cannot be used, or all together take too much memory.
        """
        images: list[Image.Image] = []
        taken, most = 0, image_memory.limit()
        for content, subject in zip(contents, subjects, strict=True):
            file = content()
            width, height = self._measured(file, subject)
            taken += width * height * _PIXEL_BYTES
            if taken > most:
                raise _unusable(
                    f"and those before it would take {readable_size(taken)}, and may take {readable_size(most)}",
                    subject,
                )
            try:
                images.append(load_image(file, name=subject))
            except InputError:
                raise _unusable("cannot be decoded", subject) from None
        return images

    def _data(self, url: str, subject: str) -> Content:
        head = _DATA.match(url[:100])
        if head is None:
            raise ImageRefused(
                "is no data URL of an image in base64",
                subject=subject,
                hint="send data:image/png;base64,...",
            )
        if (len(url) - head.end()) * 3 // 4 > self.bounds.encoded_bytes + 2:
            raise _too_many_bytes(self.bounds, subject)

        def content() -> bytes:
            file = _from_base64(url, head.end())
            if not file:
                raise ImageRefused(
                    "is not base64",
                    subject=subject,
                    hint="encode the whole file, without line breaks, with its padding",
                )
            if len(file) > self.bounds.encoded_bytes:
                raise _too_many_bytes(self.bounds, subject)
            return file

        return content

    def _measured(self, file: bytes, subject: str) -> tuple[int, int]:
        """(width, height) of an image as it is stored, told from its header."""
        source = io.BytesIO(file)
        try:
            image_memory.check_icon(source, subject)
            Image.init()
            opened = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
        except Exception:  # decoders raise whatever broken bytes make them raise
            raise _unusable("is no image in a known format", subject) from None
        with opened:
            width, height = opened.size
            if min(width, height) < self.bounds.min_side:
                raise _unusable(
                    f"is {width}x{height} pixels, and no side may be shorter than {self.bounds.min_side}",
                    subject,
                )
            if max(width, height) > self.bounds.side:
                raise _unusable(
                    f"is {width}x{height} pixels, and no side may be longer than {self.bounds.side}", subject
                )
            if width * height > self.bounds.pixels:
                raise _unusable(
                    f"is {width}x{height} pixels, and may have {self.bounds.pixels:,} altogether", subject
                )
            try:
                image_memory.check_memory(opened, subject)
            except InputError:
                raise _unusable(f"of {width}x{height} pixels would take too much memory", subject) from None
        return width, height


def _from_base64(text: str, first: int) -> bytes:
    """What a text stands for; nothing where it is not base64.

    Args:
        text: of any length: it is read in pieces, as other threads wait while one is read.
        first: place at which it begins.
    """
    pieces: list[bytes] = []
    if (len(text) - first) % 4:
        return b""  # padding is wanting, or more of it than there may be
    try:
        for start in range(first, len(text), _PIECE):
            if pieces and len(pieces[-1]) % 3:
                return b""  # what follows padding
            pieces.append(binascii.a2b_base64(text[start : start + _PIECE], strict_mode=True))
    except ValueError:
        return b""
    return b"".join(pieces)


def _unusable(message: str, subject: str) -> ImageRefused:
    return ImageRefused(
        message, subject=subject, hint=f"send one of {', '.join(FORMATS)}, whole and scaled down", status=422
    )


def _too_many_bytes(bounds: ImageBounds, subject: str) -> ImageRefused:
    return ImageRefused(
        f"has more than {readable_size(bounds.encoded_bytes)}",
        subject=subject,
        hint="scale it down, the model sees a few hundred pixels a side",
        status=413,
    )
