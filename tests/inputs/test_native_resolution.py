"""Images at their own shape, against transformers' Pillow-backed processor, and bounds that no image leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.errors import InputError
from gap_export.inputs.batch import PreparedImage
from gap_export.inputs.layouts import NativeResolutionLayout
from gap_export.inputs.native_resolution import (
    MOST_ASPECT,
    most_windows,
    native_image,
    resized,
)

_NORMAL: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
QWEN2 = NativeResolutionLayout(
    patch=14, merge=2, frames=2, min_pixels=3136, max_pixels=1280 * 28 * 28, **_NORMAL
)
QWEN3 = NativeResolutionLayout(
    patch=16,
    merge=2,
    frames=2,
    min_pixels=65536,
    max_pixels=256 * 32 * 32,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


def noise(width: int, height: int) -> Image.Image:
    samples = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(samples)


def flat(image: PreparedImage) -> Any:
    """Patches of all tokens in one row."""
    pixels_NPF = image.inputs["pixel_values"]
    assert pixels_NPF.shape[:2] == (image.grid[0] * image.grid[1], 4)
    return pixels_NPF.reshape(-1, pixels_NPF.shape[-1])


def of_transformers(image: Image.Image, preprocessing: NativeResolutionLayout) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": preprocessing.min_pixels, "longest_edge": preprocessing.max_pixels},
        patch_size=preprocessing.patch,
        merge_size=preprocessing.merge,
        temporal_patch_size=preprocessing.frames,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )
    return processor(images=[image], return_tensors="np")


@pytest.mark.parametrize("preprocessing", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("extent", [(1, 60), (61, 47), (4000, 300), (42, 70), (7, 7), (20, 3999)])
def test_pixels_and_grids_are_those_of_transformers(
    preprocessing: NativeResolutionLayout, extent: tuple[int, int]
) -> None:
    image = noise(*extent)
    ours, theirs = native_image(image, preprocessing), of_transformers(image, preprocessing)
    np.testing.assert_array_equal(flat(ours), theirs["pixel_values"])
    merge = preprocessing.merge
    assert [1, ours.grid[0] * merge, ours.grid[1] * merge] == theirs["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_modes(mode: str) -> None:
    image = noise(61, 40).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.arange(61 * 40, dtype=np.uint8).reshape(40, 61)))
    np.testing.assert_array_equal(
        flat(native_image(image, QWEN2)), of_transformers(image, QWEN2)["pixel_values"]
    )


def test_positions_of_patches_are_those_of_transformers() -> None:
    import torch
    from transformers.vision_utils import get_vision_position_ids

    image = native_image(noise(130, 90), QWEN2)
    rows, columns = image.grid
    theirs = get_vision_position_ids(torch.tensor([[1, 2 * rows, 2 * columns]]), 2)
    np.testing.assert_array_equal(image.inputs["patch_positions"].reshape(-1, 2), theirs.numpy())


@pytest.mark.parametrize("extent", [(130, 90), (224, 224), (190, 1), (1, 60), (500, 340)])
def test_windows_are_those_of_transformers(extent: tuple[int, int]) -> None:
    import torch
    from transformers.vision_utils import get_vision_window_index

    image = native_image(noise(*extent), QWEN2.model_copy(update={"window": 4}))
    grid = torch.tensor([[1, 2 * image.grid[0], 2 * image.grid[1]]])
    order, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
    tokens_WM, slots_N = image.inputs["window_tokens"], image.inputs["token_slots"]
    assert tokens_WM[tokens_WM >= 0].tolist() == order.tolist()
    assert ((tokens_WM >= 0).sum(axis=1).cumsum() * 4).tolist() == ends[1:].tolist()
    assert tokens_WM.flatten()[slots_N].tolist() == list(range(len(slots_N)))


@settings(max_examples=400)
@given(
    st.integers(1, 9000),
    st.integers(1, 9000) | st.integers(1, 45),
    st.sampled_from([4, 64]),
    st.sampled_from([64, 300, 1280]),
)
def test_no_image_has_more_windows(width: int, height: int, fewest: int, most: int) -> None:
    if max(width, height) > MOST_ASPECT * min(width, height):
        return
    limits = {"min_pixels": fewest * 28**2, "max_pixels": most * 28**2, "window": 4}
    preprocessing = QWEN2.model_copy(update=limits)
    tokens, _ = preprocessing.token_range()
    rows, columns = (side // 28 for side in resized(width, height, preprocessing))
    windows = -(-rows // 4) * -(-columns // 4)
    assert 1 <= windows <= most_windows(tokens, 4)


@pytest.mark.parametrize("extent", [(1, 201), (2000, 9)])
def test_too_narrow(extent: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="200 times"):
        native_image(noise(*extent), QWEN2)


@settings(max_examples=200)
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([4, 16, 64]), st.sampled_from([64, 300, 2000])
)
def test_no_image_leaves_the_range(width: int, height: int, fewest: int, most: int) -> None:
    if max(width, height) > MOST_ASPECT * min(width, height):
        return
    limits = {"min_pixels": fewest * 28**2, "max_pixels": most * 28**2}
    preprocessing = QWEN2.model_copy(update=limits)
    tokens, largest = preprocessing.token_range()
    across, down = resized(width, height, preprocessing)
    assert across % 28 == down % 28 == 0
    assert tokens.min_tokens <= across * down // 28**2 <= tokens.max_tokens == largest


def test_a_batch_has_a_call_and_a_grid_for_every_image() -> None:
    batch = QWEN2.prepare([noise(100, 60), noise(60, 200)], visual_tokens=1280)
    assert len(batch.calls) == 2
    assert batch.grids is not None
    assert batch.grids.tolist() == [[2, 4], [7, 2]]
    assert batch.visual_tokens.tolist() == batch.prunable.tolist() == [8, 14]
    assert not batch.one_size
