"""The file that an answer is drawn to: checked before the work, written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gap_export.errors import InputError
from gap_export.files import check_output_file, is_folder, write_atomically
from gap_export.inputs.images import FORMATS


def check_drawing(target: Path, *, images: Sequence[Path], bundle: Path) -> None:
    """Refuse a file that cannot be drawn to, before anything is loaded.

    Args:
        target: to be written; an image that is there is replaced, unless it is an input.
        images: that are asked about.
        bundle: that is asked.

    Raises:
        BundleError: something else than an image is there, or an input, or it cannot be written there.
        InputError: its ending is of no image format, or its folder is missing.
    """

    def may_be_replaced(path: Path) -> bool:
        return _is_image(path) and not path.resolve().is_relative_to(bundle.resolve())

    check_output_file(target, inputs=[*images, bundle], closed=[bundle], ours=may_be_replaced, holds="image")
    if not is_folder(target.parent):
        raise InputError(
            "lies in a folder that does not exist", subject=str(target), hint="make the folder first"
        )
    _encoded(Image.new("RGB", (8, 8)), target)


def save_drawing(image: Image.Image, target: Path) -> None:
    """Write an image in the format that the ending of the path asks for.

    Raises:
        InputError: it is of no image format.
        BundleError: it cannot be written.
    """
    write_atomically(target, _encoded(image, target))


def _encoded(image: Image.Image, target: Path) -> bytes:
    Image.init()
    name = Image.EXTENSION.get(target.suffix.lower())
    content = io.BytesIO()
    try:
        if name is None:
            raise ValueError(f"no image format has the ending {target.suffix!r}")
        image.save(content, name)
    except (OSError, ValueError, KeyError) as error:
        reason = f"{name} images can only be read" if isinstance(error, KeyError) else error
        raise InputError(
            f"cannot be written: {reason}",
            subject=str(target),
            hint="give a path that ends with .png or .jpg",
        ) from error
    return content.getvalue()


def _is_image(path: Path) -> bool:
    """By its content, whatever its name."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
