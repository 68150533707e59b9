"""A box format by its name, for every layout of images: what its numbers are of follows from what the model is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.boxes.codecs import CODECS, Frame, Unparsable, to_pixels
from gap_export.bundle.manifest import BoxFormat
from gap_export.errors import InputError, RecipeError
from gap_export.inputs.layouts import (
    AnyResLayout,
    DynamicTilesLayout,
    ImageLayout,
    NativeResolutionLayout,
    SquareLayout,
)
from gap_export.inputs.square import fit

PLAIN: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
PIXELS = [name for name, codec in CODECS.items() if codec.pixels]
PAD, STRETCH, CROP = (
    SquareLayout(size=96, fit=how, background=(0, 0, 0), **PLAIN)  # type: ignore[arg-type]
    for how in ("pad", "stretch", "crop")
)
NATIVE = NativeResolutionLayout(
    patch=14, merge=2, frames=1, min_pixels=28 * 28, max_pixels=400 * 400, **PLAIN
)
TILES = (
    AnyResLayout(size=28, side=2, grids=((28, 56), (56, 28)), **PLAIN),
    DynamicTilesLayout(size=28, tokens=4, min_tiles=1, max_tiles=4, **PLAIN),
)
PADDED = BoxFormat(codec="llava", frame="padded_square")


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize(("layout", "frame"), [(PAD, "padded_square"), (STRETCH, "image"), (NATIVE, "image")])
@pytest.mark.parametrize("before", ["padded_square", "image"])
def test_pixels_are_of_what_the_model_sees(
    name: str, layout: ImageLayout, frame: Frame, before: Frame
) -> None:
    assert BoxFormat(codec="llava", frame=before).written_as(name, layout).frame == frame


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("layout", [CROP, *TILES])
def test_tiles_and_parts_have_no_pixels_of_an_image(name: str, layout: ImageLayout) -> None:
    assert layout.resized((60, 40)) is None
    with pytest.raises(InputError, match="tiles or a part") as caught:
        PADDED.written_as(name, layout)
    assert caught.value.subject == f"box format {name}"
    assert "bbox_1000" in caught.value.hint
    assert name not in caught.value.hint
    with pytest.raises(RecipeError, match="tiles or a part"):
        PADDED.written_as(name, layout, error=RecipeError)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in PIXELS])
@pytest.mark.parametrize("layout", [PAD, STRETCH, CROP, NATIVE, *TILES, None])
@pytest.mark.parametrize("frame", ["padded_square", "image"])
def test_other_numbers_stay_in_the_frame_of_the_family(
    name: str, layout: ImageLayout | None, frame: Frame
) -> None:
    written = BoxFormat(codec="qwen2_vl", frame=frame).written_as(name, layout)
    assert written == BoxFormat(codec=name, frame=frame)


def test_no_name_changes_nothing_and_another_is_told() -> None:
    assert PADDED.written_as(None, CROP) is PADDED
    with pytest.raises(InputError, match="did you mean 'list_pixels'"):
        PADDED.written_as("list_pixel")


def seen_by(layout: ImageLayout, image: Image.Image) -> np.ndarray:
    """[rows, columns] bool: the pixels that the model sees as bright."""
    if isinstance(layout, SquareLayout):
        return np.asarray(fit(image, layout))[..., 0] > 127
    width, height = layout.resized(image.size) or (0, 0)
    return np.asarray(image.resize((width, height)))[..., 0] > 127


@pytest.mark.parametrize("layout", [PAD, STRETCH, NATIVE])
@pytest.mark.parametrize(("width", "height"), [(192, 96), (96, 192), (190, 131)])
def test_a_box_in_pixels_lies_where_the_model_sees_it(layout: ImageLayout, width: int, height: int) -> None:
    """Independent of the arithmetic: a white rectangle is found in what the model is shown, and that is where the answer says it is."""
    image = np.zeros((height, width, 3), np.uint8)
    image[20:60, 10:50] = 255
    rows, columns = np.nonzero(seen_by(layout, Image.fromarray(image)))
    answer = f"[{columns.min()}, {rows.min()}, {columns.max() + 1}, {rows.max() + 1}]"
    written = PADDED.written_as("list_pixels", layout)
    box = CODECS[written.codec].decode_one(answer, layout.resized((width, height)))
    assert not isinstance(box, Unparsable)
    assert to_pixels(box, written.frame, width, height) == pytest.approx((10, 20, 50, 60), abs=2.5)
