"""Images as tiles: pixels against transformers' processors, places of tokens against the packing of its models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.errors import InputError
from gap_export.inputs import tiles
from gap_export.inputs.batch import TYPICAL_SIZE
from gap_export.inputs.images import load_image
from gap_export.inputs.layouts import AnyResLayout, DynamicTilesLayout

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMAL = {"mean": MEAN, "std": STD}
NEXT = AnyResLayout(
    size=336, side=24, grids=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), **NORMAL
)
ONEVISION = AnyResLayout(
    size=384, side=27, max_tiles=9, grids=tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)), **NORMAL
)  # fmt: skip
INTERNVL = DynamicTilesLayout(size=448, tokens=256, min_tiles=1, max_tiles=12, **NORMAL)
ODD_SIZES = [(1, 37), (37, 1), (1, 1), (97, 96), (641, 427), (4000, 300), (300, 4000), (640, 480)]
# Two token grids of a tile that make arithmetic small: grids of up to three tiles a side, bars of every width.
SMALL = AnyResLayout(
    size=8, side=4, grids=tuple((8 * i, 8 * j) for i in range(1, 4) for j in range(1, 4)), **NORMAL
)
SHRUNK = SMALL.model_copy(update={"max_tiles": 2})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smaller(preprocessing: Any) -> Any:
    """The same grids with tiles of 24 pixels, where only the arithmetic matters and not the size."""
    if isinstance(preprocessing, DynamicTilesLayout):
        return preprocessing.model_copy(update={"size": 24})
    grids = tuple(
        (h // preprocessing.size * 24, w // preprocessing.size * 24) for h, w in preprocessing.grids
    )
    return preprocessing.model_copy(update={"size": 24, "grids": grids})


def transformers_pixels(image: Image.Image, preprocessing: Any) -> np.ndarray:
    """The same image through transformers' processor."""
    transformers = pytest.importorskip("transformers")
    common = {"image_mean": list(MEAN), "image_std": list(STD), "resample": 3}
    square = {"height": preprocessing.size, "width": preprocessing.size}
    if isinstance(preprocessing, DynamicTilesLayout):
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        processor = GotOcr2ImageProcessorPil(
            size=square, crop_to_patches=True, min_patches=preprocessing.min_tiles, max_patches=preprocessing.max_tiles, **common
        )  # fmt: skip
        return np.stack(processor(image)["pixel_values"])
    grids = [list(grid) for grid in preprocessing.grids]
    if preprocessing.max_tiles is None:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        size = {"shortest_edge": preprocessing.size}
        processor = LlavaNextImageProcessorPil(
            size=size, crop_size=square, image_grid_pinpoints=grids, **common
        )
    else:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        processor = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=grids, **common)
    assert transformers
    return np.asarray(processor(image)["pixel_values"][0])


def pixels(image: Image.Image, preprocessing: Any) -> np.ndarray:
    if isinstance(preprocessing, DynamicTilesLayout):
        return tiles.dynamic_image(image, preprocessing).inputs["pixel_values"]
    return tiles.anyres_pixels(tiles.rgb(image), preprocessing)


class TestPixels:
    @pytest.mark.parametrize(
        "preprocessing", [NEXT, ONEVISION, INTERNVL], ids=["next", "onevision", "internvl"]
    )
    @pytest.mark.parametrize("extent", ODD_SIZES, ids=str)
    def test_equal_those_of_transformers(self, preprocessing: Any, extent: tuple[int, int]) -> None:
        image, small = noise(*extent), smaller(preprocessing)
        np.testing.assert_array_equal(pixels(image, small), transformers_pixels(image, small))

    @pytest.mark.parametrize(
        "preprocessing", [NEXT, ONEVISION, INTERNVL], ids=["next", "onevision", "internvl"]
    )
    def test_equal_those_of_transformers_at_full_size(self, preprocessing: Any) -> None:
        image = noise(333, 250)
        np.testing.assert_array_equal(pixels(image, preprocessing), transformers_pixels(image, preprocessing))

    @pytest.mark.parametrize("preprocessing", [NEXT, INTERNVL], ids=["next", "internvl"])
    @pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
    def test_other_modes(self, preprocessing: Any, mode: str) -> None:
        image, small = noise(61, 40).convert(mode), smaller(preprocessing)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(np.arange(61 * 40, dtype=np.uint8).reshape(40, 61)))
        np.testing.assert_array_equal(pixels(image, small), transformers_pixels(image, small))

    def test_turned_by_exif(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        noise(90, 30).save(tmp_path / "a.png", exif=exif)
        image, small = load_image(tmp_path / "a.png"), smaller(NEXT)
        assert image.size == (30, 90)
        upright = noise(90, 30).transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(pixels(image, small), transformers_pixels(upright, small))

    @settings(max_examples=25)
    @given(width=st.integers(1, 300), height=st.integers(1, 300))
    def test_dynamic_grids(self, width: int, height: int) -> None:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        expected = get_optimal_tiled_canvas((height, width), (24, 24), 1, 12)
        assert tiles.nearest_grid(width, height, smaller(INTERNVL)) == expected


def packed_by_transformers(
    width: int, height: int, preprocessing: AnyResLayout, tokens_tNH: Any, newline_H: Any
) -> Any:
    """[N, H] image tokens of the unpruned prompt, from the packing of transformers' own models."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    vision = SimpleNamespace(
        image_size=preprocessing.size, patch_size=preprocessing.size // preprocessing.side
    )
    grids = [list(grid) for grid in preprocessing.grids]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=grids))
    sizes = torch.tensor([[height, width]])
    if preprocessing.max_tiles is None:
        packed, _ = LlavaNextModel.pack_image_features(model, [tokens_tNH], sizes, "default", newline_H)  # type: ignore[arg-type]
    else:
        ratio = f"anyres_max_{preprocessing.max_tiles}"
        packed, _ = LlavaOnevisionModel.pack_image_features(model, [tokens_tNH], sizes, newline_H, ratio)  # type: ignore[arg-type]
    return packed[0]


class TestLayout:
    @pytest.mark.parametrize(
        ("preprocessing", "extent", "tokens"),
        [
            (NEXT, (640, 480), 2340),
            (NEXT, (640, 428), 2144),
            (NEXT, (640, 427), 2144),
            (NEXT, (427, 640), 2160),
            (NEXT, (480, 640), 2352),
            (NEXT, (500, 333), 1464),
            (NEXT, (333, 500), 1476),
            (NEXT, (512, 512), 2928),
            (NEXT, (640, 640), 2928),
            (ONEVISION, (640, 480), 2929),
            (ONEVISION, (640, 428), 2709),
            (ONEVISION, (427, 640), 2727),
            (ONEVISION, (500, 333), 1836),
            (ONEVISION, (512, 512), 3699),
        ],
        ids=str,
    )
    def test_known_counts(self, preprocessing: AnyResLayout, extent: tuple[int, int], tokens: int) -> None:
        layout = tiles.anyres_places(*extent, preprocessing)
        assert len(layout[tiles.PLACES]) + len(layout[tiles.NEWLINES]) == tokens

    @pytest.mark.parametrize("preprocessing", [SMALL, SHRUNK], ids=["as it is", "scaled down"])
    @settings(max_examples=60)
    @given(width=st.integers(1, 60), height=st.integers(1, 60))
    def test_tokens_are_where_transformers_packs_them(
        self, preprocessing: AnyResLayout, width: int, height: int
    ) -> None:
        import torch

        grid = tiles.best_grid(width, height, preprocessing.grids)
        count = 1 + grid[0] * grid[1] // preprocessing.size**2
        tokens_tNH = torch.randn(count, preprocessing.side**2, 3, generator=torch.Generator().manual_seed(0))
        newline_H = torch.tensor([7.0, 8.0, 9.0])
        expected_NH = packed_by_transformers(width, height, preprocessing, tokens_tNH, newline_H).numpy()
        try:
            layout = tiles.anyres_places(width, height, preprocessing)
        except InputError:
            rows = len(expected_NH) - preprocessing.side**2
            assert (
                expected_NH[preprocessing.side**2 :] == newline_H.numpy()
            ).all()  # nothing is left but ends of lines
            assert rows == 0 or height > 5 * width
            return
        flat = tokens_tNH.flatten(0, 1).numpy()
        if preprocessing.max_tiles is None:
            tokens_PH = flat[layout[tiles.TOKEN_INDEX]]
        else:
            tokens_PH = (flat[layout[tiles.CORNERS]] * layout[tiles.WEIGHTS][..., None]).sum(1)
        mine_NH = np.full_like(expected_NH, np.nan)
        mine_NH[layout[tiles.PLACES]] = tokens_PH
        mine_NH[layout[tiles.NEWLINES]] = newline_H.numpy()
        np.testing.assert_allclose(mine_NH, expected_NH, atol=1e-6)

    def test_scaling_down_happens(self) -> None:
        assert tiles.shrunk_grid(12, 12, SHRUNK) == (5, 5)
        assert tiles.shrunk_grid(12, 12, SMALL) == (12, 12)

    @pytest.mark.parametrize(
        "preprocessing", [SMALL, SHRUNK, NEXT, ONEVISION], ids=["small", "shrunk", "next", "onevision"]
    )
    def test_no_image_leaves_the_range(self, preprocessing: AnyResLayout) -> None:
        tokens, most = preprocessing.token_range()
        reached = 0
        for width, height in [(w, h) for w in (30, 40, 111, 160, 200) for h in (30, 33, 120, 160, 200)]:
            layout = tiles.anyres_places(width * 10, height * 10, preprocessing)
            prunable, newlines = len(layout[tiles.PLACES]), len(layout[tiles.NEWLINES])
            assert tokens.min_tokens <= prunable <= tokens.max_tokens
            assert 1 <= newlines <= tokens.never_pruned
            assert prunable + newlines <= most
            reached = max(reached, prunable + newlines)
        assert reached > 0.8 * most

    @pytest.mark.parametrize(
        ("extent", "words"), [((4000, 3), "wider than it is high"), ((1, 50), "higher than it is wide")]
    )
    def test_a_thread_is_refused(self, extent: tuple[int, int], words: str) -> None:
        with pytest.raises(InputError, match=words):
            tiles.anyres_image(noise(*extent), SMALL)


def test_dynamic_range() -> None:
    tokens, most = INTERNVL.token_range()
    assert (tokens.min_tokens, tokens.max_tokens, tokens.never_pruned, most) == (256, 13 * 256, 0, 13 * 256)
    image = tiles.dynamic_image(noise(*TYPICAL_SIZE), smaller(INTERNVL))
    assert (
        image.prunable
        == image.visual_tokens
        == tokens.typical_tokens
        == len(image.inputs["pixel_values"]) * 256
    )
