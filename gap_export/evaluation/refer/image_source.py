"""Where the images of a data set come from: a folder, the data set itself, or the generator of scenes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from PIL import Image

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import EmbeddedImages
from gap_export.inputs.images import load_image


class Source(Protocol):
    """Images by name."""

    def has(self, name: str) -> bool:
        """Whether there is an image of that name."""
        ...

    def open(self, name: str) -> Image.Image:
        """The image, upright, RGB.

        Raises:
            InputError: it is there and cannot be read.
        """
        ...


class Folder:
    """Files below a folder, found by the name that annotations give or by the last part of it.

    Args:
        folder: e.g. of COCO's train2014.

    Raises:
        InputError: it is no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(
                "is not a folder", subject=str(folder), hint="give the folder with the images (--images)"
            )
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether the image is there."""
        return self._path(name) is not None

    def open(self, name: str) -> Image.Image:
        """The image, RGB."""
        path = self._path(name)
        if path is None:
            raise InputError("is not there", subject=str(self._folder / name), hint="see --images")
        return load_image(path)

    def _path(self, name: str) -> Path | None:
        """Never outside the folder, whatever an annotation says."""
        last = Path(name).name
        for candidate in (self._folder / name, self._folder / last):
            if candidate.is_file() and candidate.resolve().is_relative_to(self._folder.resolve()):
                return candidate
        return None


class Embedded:
    """Images that lie in the data set.

    Args:
        images: of the data set.
    """

    def __init__(self, images: EmbeddedImages) -> None:
        self._images, self._names = images, frozenset(images.names())

    def has(self, name: str) -> bool:
        """Whether the image is there."""
        return name in self._names

    def open(self, name: str) -> Image.Image:
        """The image, RGB."""
        return load_image(self._images.read(name), name=name)


class InMemory:
    """Images that are there already."""

    def __init__(self, images: Mapping[str, Image.Image]) -> None:
        self._images = images

    def has(self, name: str) -> bool:
        """Whether the image is there."""
        return name in self._images

    def open(self, name: str) -> Image.Image:
        """The image, RGB."""
        return self._images[name]
