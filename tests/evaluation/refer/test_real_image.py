"""A real image with its real expressions, through the way every family looks at images and writes boxes, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gap_export import families
from gap_export.boxes.codecs import CODECS, from_pixels
from gap_export.evaluation.refer.annotations import read_annotations
from gap_export.evaluation.refer.protocols import protocol_of, score
from gap_export.inputs.images import load_image
from gap_export.inputs.layouts import (
    AnyResLayout,
    DynamicTilesLayout,
    Layout,
    NativeResolutionLayout,
    SquareLayout,
)

NAME = "COCO_train2014_000000580957.jpg"
_PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_GRIDS = ((336, 672), (672, 336), (672, 672))
_SQUARE = SquareLayout(size=336, fit="pad", background=(122, 116, 104), **_PLAIN)  # type: ignore[arg-type]
PREPROCESSING: dict[str, Layout] = {
    "llava": _SQUARE,
    "llava_original": _SQUARE,
    "shikra": _SQUARE.model_copy(update={"size": 224, "background": (255, 255, 255)}),
    "minigpt_v2": _SQUARE.model_copy(update={"size": 448, "fit": "stretch"}),
    "llava_next": AnyResLayout(size=336, side=24, grids=_GRIDS, **_PLAIN),  # type: ignore[arg-type]
    "llava_onevision": AnyResLayout(size=336, side=24, grids=_GRIDS, max_tiles=2, **_PLAIN),  # type: ignore[arg-type]
    "internvl": DynamicTilesLayout(size=448, tokens=256, min_tiles=1, max_tiles=12, **_PLAIN),  # type: ignore[arg-type]
    "qwen2_vl": NativeResolutionLayout(
        patch=14, merge=2, frames=2, min_pixels=3136, max_pixels=1003520, **_PLAIN
    ),  # type: ignore[arg-type]
    "qwen2_5_vl": NativeResolutionLayout(
        patch=14, merge=2, frames=2, window=4, min_pixels=3136, max_pixels=1003520, **_PLAIN
    ),  # type: ignore[arg-type]
    "qwen3_vl": NativeResolutionLayout(
        patch=16, merge=2, frames=2, min_pixels=65536, max_pixels=1310720, **_PLAIN
    ),  # type: ignore[arg-type]
}
STEP = {
    "llava": 0.01,
    "shikra": 0.001,
    "minigpt_v2": 0.01,
    "internvl": 0.001,
    "qwen2_vl": 0.001,
    "qwen3_vl": 0.001,
}
"""Of the numbers a model writes, as a share of the frame; Qwen2.5-VL writes pixels."""


def marked(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The image with everything outside of a box made black."""
    pixels = np.array(image)
    x1, y1, x2, y2 = (round(edge) for edge in box)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[y1:y2, x1:x2] = True
    return Image.fromarray(np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, -1))


@pytest.mark.parametrize("family", families.names())
def test_a_box_goes_there_and_back(refcoco: Path, family: str) -> None:
    image = load_image(refcoco.parent / NAME)
    assert image.size == (640, 428)
    about = [each for each in read_annotations(refcoco).expressions if each.image == NAME]
    assert len(about) == 8
    preprocessing = PREPROCESSING[family]
    assert np.isfinite(preprocessing.prepare([image], visual_tokens=576).calls[0]["pixel_values"]).all()
    protocol = protocol_of("unc", families.row(family).box)
    seen = preprocessing.resized(image.size)
    for each in about:
        box = from_pixels(each.box, protocol.frame, *image.size, clamp=True)
        result = score(CODECS[protocol.codec].encode(box, seen), each.box, image.size, protocol, seen=seen)
        assert result.box is not None
        assert result.hit
        span = max(image.size)
        if protocol.codec == "qwen2_5_vl":
            assert seen is not None
            reach = 0.5 * max(image.size[0] / seen[0], image.size[1] / seen[1]) + 1e-6
        else:
            # MiniGPT-v2 cuts digits off, the others round.
            reach = STEP[protocol.codec] * span * (1.0 if protocol.codec == "minigpt_v2" else 0.5) + 1e-6
        assert max(abs(np.subtract(result.box, each.box))) <= reach


@pytest.mark.parametrize("family", ["llava", "shikra", "minigpt_v2"])
def test_the_frame_is_where_the_pixels_are(refcoco: Path, family: str) -> None:
    """Everything but the box is black: what the model sees as bright lies where the normalised box says."""
    image, preprocessing = load_image(refcoco.parent / NAME), PREPROCESSING[family]
    assert isinstance(preprocessing, SquareLayout)
    truth = next(each.box for each in read_annotations(refcoco).expressions if each.image == NAME)
    black = preprocessing.model_copy(update={"background": (0, 0, 0)})
    pixels = black.prepare([marked(image, truth)], visual_tokens=576).calls[0]["pixel_values"][0]
    rows, columns = np.nonzero(pixels.mean(axis=0) > 0)
    bright = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / preprocessing.size
    expected = from_pixels(truth, protocol_of("unc", families.row(family).box).frame, *image.size)
    assert np.abs(bright - expected).max() < 2 / preprocessing.size
