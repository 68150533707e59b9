"""Where the images of a data set come from: a folder, the data set itself, or the generator of scenes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from PIL import Image

from gap_export.boxes import scenes
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import EmbeddedImages
from gap_export.evaluation.refer.image_folder import FolderIndex
from gap_export.files import is_folder
from gap_export.inputs.images import image_size, load_image


class Source(Protocol):
    """Images by name."""

    def has(self, name: str) -> bool:
        """Whether there is an image of that name."""
        ...

    def open(self, name: str) -> Image.Image:
        """The image, RGB; upright, unless the source was told to take images as they are stored.

        Raises:
            InputError: it is there and cannot be read.
        """
        ...

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the image that `open` gives.

        Raises:
            InputError: it is there and cannot be read.
        """
        ...


class Folder:
    """Files below a folder, found by the name that annotations give, or by as much of its end as there is.

    Args:
        folder: e.g. of COCO's train2014.
        upright: whether EXIF orientations are applied.

    Raises:
        InputError: it is no folder.
    """

    def __init__(self, folder: Path, *, upright: bool = True) -> None:
        if not is_folder(folder):
            raise InputError(
                "is not a folder", subject=str(folder), hint="give the folder with the images (--images)"
            )
        self._folder, self._upright = folder, upright
        self._index = FolderIndex(folder)

    def has(self, name: str) -> bool:
        """Whether the image is there.

        Raises:
            InputError: it may be either of two files, or the file is that of another image.
        """
        return self._index.find(name) is not None

    def open(self, name: str) -> Image.Image:
        """The image, RGB."""
        return load_image(self._there(name), upright=self._upright)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the image."""
        path = self._there(name)
        return image_size(path, name=str(path), upright=self._upright)

    def _there(self, name: str) -> Path:
        path = self._index.find(name)
        if path is None:
            raise InputError("is not there", subject=str(self._folder / name), hint="see --images")
        return path


class Embedded:
    """Images that lie in the data set.

    Args:
        images: of the data set.
        upright: whether EXIF orientations are applied.
    """

    def __init__(self, images: EmbeddedImages, *, upright: bool = True) -> None:
        self._images, self._names, self._upright = images, frozenset(images.names()), upright

    def has(self, name: str) -> bool:
        """Whether the image is there."""
        return name in self._names

    def open(self, name: str) -> Image.Image:
        """The image, RGB."""
        return load_image(self._images.read(name), name=name, upright=self._upright)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the image."""
        return image_size(self._images.read(name), name=name, upright=self._upright)


class Scenes:
    """Held-out scenes, drawn when they are asked for: a worker of a cluster is told how many there are, and nothing else.

    Args:
        count: how many.
    """

    _PREFIX = f"shapes-{scenes.HELD_OUT_SEED}-"

    def __init__(self, count: int) -> None:
        self._count = count

    @classmethod
    def name_of(cls, index: int) -> str:
        """Of a scene."""
        return f"{cls._PREFIX}{index:05d}"

    def has(self, name: str) -> bool:
        """Whether there is such a scene."""
        return self._index(name) is not None

    def open(self, name: str) -> Image.Image:
        """The scene, RGB."""
        index = self._index(name)
        if index is None:
            raise InputError("is no scene", subject=name, hint=f"there are {self._count}")
        return Image.fromarray(scenes.make_scene(scenes.HELD_OUT_SEED, index).pixels)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the scene."""
        return self.open(name).size

    def _index(self, name: str) -> int | None:
        number = name.removeprefix(self._PREFIX)
        if not number.isdecimal() or not int(number) < self._count or self.name_of(int(number)) != name:
            return None
        return int(number)


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

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the image."""
        return self._images[name].size
