"""Whether annotations are of the images at hand: boxes are pixels, and mean nothing on an image of another size.

Two things go wrong with copies of a data set. Images were scaled, and the boxes were not; or boxes were drawn on the pixels as a camera
stored them, and the image is shown upright, as its EXIF orientation says. Either makes every answer a miss, so sizes are compared first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gap_export.boxes.codecs import Size
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.image_source import Source


@dataclass(frozen=True)
class Fitted:
    """Expressions whose boxes are pixels of the images at hand.

    Attributes:
        expressions: as many as there were, in their order.
        rescaled: names of the images whose boxes were scaled.
        stretched: those of them whose shape is another one: they were squashed, or else cropped or padded, which scaling does not mend.
    """

    expressions: tuple[Expression, ...]
    rescaled: tuple[str, ...]
    stretched: tuple[str, ...] = ()


def fitted(expressions: Sequence[Expression], source: Source, *, rescale: bool = False) -> Fitted:
    """Compare the sizes that annotations give with those of the images.

    Args:
        expressions: of a data set; those about images that are not there are taken as they are. Of those without a size no more is
            known than that the box must begin on the image.
        source: of its images, of which at most the headers are read.
        rescale: scale boxes from the annotations' size to the image's, instead of refusing.

    Raises:
        InputError: sizes differ, and are not to be rescaled, or the image is turned; a box outside of the image; an image that
            cannot be read.
    """
    sizes: dict[str, Size | None] = {}
    differing: dict[str, tuple[Size, Size]] = {}
    outside: dict[str, tuple[Size, Expression]] = {}
    found = []
    for each in expressions:
        if each.image not in sizes:
            sizes[each.image] = source.size(each.image) if source.has(each.image) else None
        size = sizes[each.image]
        if each.width is None or each.height is None:
            if size is not None and (each.box[0] >= size[0] or each.box[1] >= size[1]):
                outside.setdefault(each.image, (size, each))
            found.append(each)
            continue
        annotated = each.width, each.height
        if size is not None and size != annotated:
            differing.setdefault(each.image, (size, annotated))
            each = _rescaled(each, size)
        found.append(each)
    if outside:
        raise _outside(outside, len(sizes))
    turned = {name for name, (size, annotated) in differing.items() if _is_turned(size, annotated)}
    if differing and (not rescale or turned):
        _refuse({name: differing[name] for name in turned} if rescale else differing, len(sizes), rescale)
    stretched = (name for name, (size, annotated) in differing.items() if not _is_scaled(size, annotated))
    return Fitted(tuple(found), tuple(differing), tuple(stretched))


def _is_turned(size: Size, annotated: Size) -> bool:
    """Whether width and height are exchanged, in an image that may be scaled too."""
    return not _is_scaled(size, annotated) and _is_scaled(size, annotated[::-1])


def _is_scaled(size: Size, annotated: Size) -> bool:
    """Whether the shape is the same, but for a side rounded to whole pixels."""
    (width, height), (across, down) = size, annotated
    return abs(width - height * across / down) <= 1 or abs(height - width * down / across) <= 1


def _rescaled(each: Expression, size: Size) -> Expression:
    assert each.width is not None
    assert each.height is not None
    across, down = size[0] / each.width, size[1] / each.height
    x1, y1, x2, y2 = each.box
    box = (x1 * across, y1 * down, x2 * across, y2 * down)
    return replace(each, box=box, width=size[0], height=size[1])


def _outside(found: dict[str, tuple[Size, Expression]], images: int) -> InputError:
    """What to say of boxes that begin beyond the edge: the first image by name, and how many there are."""
    name, (size, each) = next(iter(found.items()))
    box = ", ".join(f"{edge:g}" for edge in each.box)
    return InputError(
        f"is {size[0]}x{size[1]} pixels, and the box ({box}) of expression {each.id} lies outside of it; so it is with {len(found)} "
        f"of {images} images, whose annotations do not say how large they were",
        subject=f"image {name}",
        hint="give the images that boxes were drawn on, or annotations with width and height, which --rescale-boxes needs; --ignore-exif "
        "takes images as they are stored, where boxes are of photographs that EXIF turns",
    )


def _refuse(differing: dict[str, tuple[Size, Size]], images: int, rescale: bool) -> None:
    """Name the first image and count all.

    Raises:
        InputError: always.
    """
    name, (size, annotated) = next(iter(differing.items()))
    raise InputError(
        f"is {size[0]}x{size[1]} pixels, and its annotations are of {annotated[0]}x{annotated[1]}; "
        f"sizes differ in {len(differing)} of {images} images",
        subject=f"image {name}",
        hint="width and height are exchanged, which scaling does not mend: --ignore-exif takes photographs as they are stored; where "
        "that is so already, mend the annotations"
        if rescale
        else "--rescale-boxes scales the boxes to images that were scaled; --ignore-exif takes images as they are stored, "
        "where boxes are of photographs that EXIF turns",
    )
