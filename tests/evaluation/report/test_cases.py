"""What is laid over images: the shaded part is what was pruned, pixel by pixel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.evaluation.refer.compare import Disagreement
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.report.cases import Album, pruned_path, random_cases, token_grid, worst_cases
from gap_export.evaluation.report.runs import open_runs
from gap_export.inputs.layouts import NativeResolutionLayout

NATIVE = NativeResolutionLayout(
    min_pixels=56 * 56, max_pixels=1000 * 1000, patch=14, merge=2, frames=2, window=None, resample="bicubic",
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip


def manifest_with(tiny_bundle: Callable[..., Bundle], **changes: Any) -> Any:
    """The tiny bundle's, its images fitted in another way."""
    manifest = tiny_bundle().manifest
    if "native" in changes:
        return manifest.model_copy(update={"layout": NATIVE})
    return manifest.model_copy(update={"layout": manifest.layout.model_copy(update=changes)})


def covered(path: str, width: int, height: int) -> NDArray[np.bool_]:
    """[height, width] whether the even-odd rule fills each pixel's middle."""
    inside = np.zeros((height, width), np.int64)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for left, top, right, bottom in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+Z", path):
        across = (x > float(left)) & (x < float(right))
        down = (y > float(top)) & (y < float(bottom))
        inside += down[:, None] & across[None]
    return inside % 2 == 1


def pruned(kept: set[int], width: int, height: int, grid: tuple[int, int], fit: str) -> NDArray[np.bool_]:
    """[height, width] whether the patch that saw each pixel's middle was dropped, or none saw it."""
    rows, columns = grid
    answer = np.ones((height, width), np.bool_)
    for y in range(height):
        for x in range(width):
            u, v = x + 0.5, y + 0.5
            if fit == "pad":
                side = max(width, height)
                u, v = (u + (side - width) // 2) / side, (v + (side - height) // 2) / side
            else:
                u, v = u / width, v / height
            answer[y, x] = int(v * rows) * columns + int(u * columns) not in kept
    return answer


def off_edges(width: int, height: int, grid: tuple[int, int], fit: str) -> NDArray[np.bool_]:
    """[height, width] whether each pixel's middle lies within one patch, and not on an edge, which belongs to either."""
    side = max(width, height)
    spans, margins = (
        ((side, side), ((side - width) // 2, (side - height) // 2))
        if fit == "pad"
        else ((width, height), (0, 0))
    )
    rows, columns = grid
    x = (np.arange(width) + 0.5 + margins[0]) / spans[0] * columns
    y = (np.arange(height) + 0.5 + margins[1]) / spans[1] * rows
    clear_x, clear_y = (np.abs(place - np.round(place)) > 1e-4 for place in (x, y))
    return np.asarray(clear_y[:, None] & clear_x[None])


@settings(max_examples=30)
@given(
    st.sampled_from(["pad", "stretch"]),
    st.integers(5, 40),
    st.integers(5, 40),
    st.sets(st.integers(0, 35), min_size=1, max_size=30),
)
def test_what_is_shaded_was_pruned(
    tiny_bundle: Callable[..., Bundle], fit: str, width: int, height: int, kept: set[int]
) -> None:
    manifest = manifest_with(tiny_bundle, fit=fit)
    shaded = covered(pruned_path(sorted(kept), width, height, manifest), width, height)
    expected = pruned(kept, width, height, (6, 6), fit)
    sure = off_edges(width, height, (6, 6), fit)
    np.testing.assert_array_equal(shaded[sure], expected[sure])


def test_nothing_is_shaded_where_all_is_kept(tiny_bundle: Callable[..., Bundle]) -> None:
    assert pruned_path(range(36), 20, 30, tiny_bundle().manifest) == ""


def test_tokens_that_an_image_does_not_have(tiny_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(InputError, match="keep visual token 36, and an image of 20x30 pixels has 36"):
        pruned_path([1, 36], 20, 30, tiny_bundle().manifest)


def test_grids_follow_the_image_at_native_resolution(tiny_bundle: Callable[..., Bundle]) -> None:
    manifest = manifest_with(tiny_bundle, native=True)
    assert token_grid(280, 560, manifest) == (20, 10)
    shaded = covered(pruned_path([0, 199], 280, 560, manifest), 280, 560)
    expected = np.ones((560, 280), np.bool_)
    expected[:28, :28] = expected[-28:, -28:] = False
    np.testing.assert_array_equal(shaded, expected)


def test_images_without_one_grid_are_not_shaded(tiny_bundle: Callable[..., Bundle]) -> None:
    manifest = tiny_bundle().manifest
    manifest = manifest.model_copy(update={"spec": manifest.spec.model_copy(update={"grid": None})})
    assert pruned_path([1, 2], 20, 30, manifest) == ""


def test_cases(evaluated: Path) -> None:
    reported = open_runs([evaluated / "torch", evaluated / "ort"], "unc")
    album = Album(open_dataset("scenes:3").source)
    first = reported.reference.run.ids[3]
    worst = [Disagreement(id=first, image="x", iou=0.25, reference_hits=True, subject_hits=False)]
    (case,) = worst_cases(reported, album, worst, 5)
    assert case.subject.id == case.reference.id == first
    assert case.image.uri.startswith("data:image/png")
    assert case.pruned
    drawn = random_cases(reported, album, 5)
    assert len({case.subject.id for case in drawn}) == 5
    assert [case.subject.id for case in random_cases(reported, album, 5)] == [c.subject.id for c in drawn]
    assert len({image.key for image in album.images}) == len(album.images) <= 4


def test_a_run_by_itself_shows_what_is_farthest_from_the_truth(evaluated: Path) -> None:
    reported = open_runs([evaluated / "ort"], "unc")
    cases = worst_cases(reported, Album(None), (), 12)
    ious = [case.subject.iou for case in cases]
    assert ious == sorted(ious)
    assert all(case.between is None and case.image.lacks for case in cases)


@pytest.mark.parametrize("missing", [True, False])
def test_an_image_that_is_not_there_has_a_place_all_the_same(evaluated: Path, missing: bool) -> None:
    reported = open_runs([evaluated / "ort"], "unc")
    album = Album(None if missing else open_dataset("scenes:3").source)
    answer = next(iter(reported.subject.answers.values()))
    image = album.shown(answer)
    assert bool(image.lacks) == missing == (image.uri == "")
    assert image.width >= answer.truth[2]
    assert image.height >= answer.truth[3]
