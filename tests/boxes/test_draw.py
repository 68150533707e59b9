"""The drawing shows the right patches, a box that can be seen, and the caption."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.boxes.draw import LEAST_LONG_SIDE, draw, patch_edges
from gap_export.inputs.square import SquareLayout, fit

AMBER = (255, 196, 0)


def how(kind: str, size: int = 96) -> SquareLayout:
    return SquareLayout.model_validate(
        {"size": size, "fit": kind, "background": (127, 127, 127), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    )


def drawn(
    image: Image.Image,
    box: tuple[float, float, float, float] | None,
    kept: list[int],
    grid: tuple[int, int] | None = (4, 4),
    kind: str = "pad",
    caption: str = "the red mug",
) -> np.ndarray:
    image = draw(
        image,
        [] if box is None else [box],
        np.array(kept, np.int64),
        grid,
        how(kind),
        visual_tokens=16,
        caption=caption,
    )
    assert image.mode == "RGB"
    return np.asarray(image)


def share_of(levels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((levels == colour).all(axis=-1).mean())


class TestPatches:
    @settings(max_examples=60, deadline=None)
    @given(
        width=st.integers(8, 120),
        height=st.integers(8, 120),
        kind=st.sampled_from(["pad", "crop", "stretch"]),
        grid=st.sampled_from([(4, 4), (8, 2), (3, 3)]),
        data=st.data(),
    )
    def test_edges_are_where_the_model_sees_the_patch(
        self, width: int, height: int, kind: str, grid: tuple[int, int], data: st.DataObject
    ) -> None:
        """A dot is put on the image; the patch it lights up in the model's view is the one the edges name."""
        x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        columns_x, rows_y = patch_edges(width, height, grid, how(kind))
        column = int(np.searchsorted(columns_x, x + 0.5)) - 1
        row = int(np.searchsorted(rows_y, y + 0.5)) - 1

        levels = np.zeros((height, width, 3), np.uint8)
        levels[y, x] = 255
        black = how(kind).model_copy(update={"background": (0, 0, 0)})
        seen = np.asarray(fit(Image.fromarray(levels), black))[..., 0].astype(float)
        if not (0 <= column < grid[1] and 0 <= row < grid[0]):
            # Resampling spreads a dot beside the crop a little into it; one on its edge lies half in it.
            beside_x = x + 1 <= columns_x[0] or x >= columns_x[-1]
            beside_y = y + 1 <= rows_y[0] or y >= rows_y[-1]
            assert not (beside_x or beside_y) or seen.max() < 255
            return
        light = seen.reshape(grid[0], 96 // grid[0], grid[1], 96 // grid[1]).sum(axis=(1, 3))
        clear = min(abs(columns_x - x - 0.5).min(), abs(rows_y - y - 0.5).min()) > 1.0
        if clear:  # a dot on an edge lights two patches
            assert np.unravel_index(light.argmax(), grid) == (row, column)

    def test_kept_patches_keep_their_colour(self) -> None:
        image = Image.new("RGB", (800, 800), (200, 40, 40))
        levels = drawn(image, None, [0, 5])
        for row, column in ((100, 100), (300, 300)):
            assert levels[row, column].tolist() == [200, 40, 40]
        for row, column in ((100, 300), (700, 700)):
            red, green, _ = levels[row, column].tolist()
            assert abs(red - green) < 60

    def test_padding_is_not_part_of_the_image(self) -> None:
        """800x400 lies in rows 1 and 2 of a 4x4 grid; patches of rows 0 and 3 are nowhere on it."""
        image = Image.new("RGB", (800, 400), (200, 40, 40))
        nothing = drawn(image, None, [])[:400]
        np.testing.assert_array_equal(drawn(image, None, [0, 1, 2, 3, 12, 15])[:400], nothing)
        second_row = drawn(image, None, [4])[:400]
        assert second_row[100, 100].tolist() == [200, 40, 40]
        np.testing.assert_array_equal(second_row[:, 200:], nothing[:, 200:])

    def test_what_a_crop_cuts_away_is_faded(self) -> None:
        image = Image.new("RGB", (800, 400), (200, 40, 40))
        levels = drawn(image, None, list(range(16)), kind="crop")[:400]
        assert levels[200, 400].tolist() == [200, 40, 40]
        assert levels[200, 100].tolist() != [200, 40, 40]
        assert levels[200, 700].tolist() != [200, 40, 40]

    def test_patches_of_no_grid_are_not_shaded(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))
        np.testing.assert_array_equal(drawn(image, None, [0, 3], grid=None)[:700], image)

    def test_nothing_is_changed_when_all_is_kept(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))
        np.testing.assert_array_equal(drawn(image, None, list(range(16)))[:700], image)

    @pytest.mark.parametrize("colour", ["white", "black", "gray"])
    def test_kept_and_pruned_differ_on_any_ground(self, colour: str) -> None:
        levels = drawn(Image.new("RGB", (800, 800), colour), None, [0]).astype(int)
        assert abs(levels[100, 100] - levels[700, 700]).max() >= 20

    @pytest.mark.parametrize("kept", [[16], [-1]])
    def test_indices_outside_the_grid(self, kept: list[int]) -> None:
        with pytest.raises(ValueError, match=r"0\.\.15"):
            drawn(Image.new("RGB", (10, 10)), None, kept)


class TestBox:
    @pytest.mark.parametrize("colour", ["white", "black", AMBER])
    def test_the_line_stands_out(self, colour: str | tuple[int, int, int]) -> None:
        image = Image.new("RGB", (800, 800), colour)
        levels = drawn(image, (200, 300, 600, 500), list(range(16)))
        across = levels[400, 180:200].astype(int).sum(axis=1)
        assert across.max() - across.min() > 200

    def test_lies_outside_the_edge(self) -> None:
        image = Image.new("RGB", (800, 800), "white")
        levels = drawn(image, (200, 300, 600, 500), list(range(16)))
        assert (levels[300:500, 200:600] == 255).all()
        amber = (levels[:800] == AMBER).all(axis=-1)
        rows, columns = np.nonzero(amber)
        assert 185 < columns.min() < 200
        assert 600 <= columns.max() < 615
        assert 285 < rows.min() < 300
        assert 500 <= rows.max() < 515

    @pytest.mark.parametrize(
        "box",
        [
            (0, 0, 96, 96),
            (-50, -50, 200, 200),
            (90, 90, 96, 96),
            (40, 40, 40, 40),
            (200, 200, 300, 300),
            (-9, 5, -3, 8),
        ],
    )
    def test_can_always_be_seen(self, box: tuple[float, float, float, float]) -> None:
        levels = drawn(Image.new("RGB", (96, 96), "gray"), box, list(range(16)))
        assert share_of(levels, AMBER) > 0

    def test_follows_the_enlargement(self) -> None:
        levels = drawn(Image.new("RGB", (96, 96), "white"), (10, 20, 30, 40), list(range(16)))
        rows, columns = np.nonzero((levels == AMBER).all(axis=-1))
        assert (columns.min() + columns.max()) / 2 == pytest.approx(20 * 7, abs=2)
        assert (rows.min() + rows.max()) / 2 == pytest.approx(30 * 7, abs=2)

    def test_no_box(self) -> None:
        levels = drawn(Image.new("RGB", (96, 96), "gray"), None, [1])
        assert share_of(levels, AMBER) == 0

    @pytest.mark.parametrize("box", [(float("nan"), 0, 1, 1), (5, 0, 1, 1)])
    def test_unsound(self, box: tuple[float, float, float, float]) -> None:
        with pytest.raises(ValueError, match=r"finite|inverted"):
            drawn(Image.new("RGB", (96, 96)), box, [])


class TestCanvas:
    def test_tiny_images_are_enlarged_pixel_by_pixel(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
        levels = drawn(image, None, list(range(16)))
        assert levels.shape[1] == 672
        np.testing.assert_array_equal(levels[:672], np.asarray(image).repeat(7, axis=0).repeat(7, axis=1))

    @pytest.mark.parametrize(
        "extent", [(1, 1), (96, 96), (300, 200), (200, 300), (640, 428), (1, 400), (1200, 3)]
    )
    def test_size(self, extent: tuple[int, int]) -> None:
        levels = drawn(Image.new("RGB", extent), (0, 0, 1, 1), [0])
        assert max(levels.shape[:2]) >= LEAST_LONG_SIDE

    def test_large_images_keep_their_size(self) -> None:
        levels = drawn(Image.new("RGB", (1600, 1200)), (0, 0, 900, 900), [0])
        assert levels.shape[1] == 1600
        assert levels.shape[0] > 1200

    def test_the_image_given_is_not_changed(self) -> None:
        image = Image.new("RGB", (800, 800), "white")
        drawn(image, (10, 10, 700, 700), [3])
        assert share_of(np.asarray(image), (255, 255, 255)) == 1.0

    def test_caption_is_drawn(self) -> None:
        image = Image.new("RGB", (640, 640))
        one, other = (drawn(image, None, [], caption=text)[640:] for text in ("the red mug", "the blue mug"))
        assert one.shape == other.shape
        assert (one != other).any()
        assert (one > 200).any()

    @pytest.mark.parametrize(
        "caption", ["word " * 200, "x" * 5000, "", "line\nbreak \x1b[31m", "\u732b \U0001f600"]
    )
    def test_any_caption_fits(self, caption: str) -> None:
        levels = drawn(Image.new("RGB", (640, 480)), (0, 0, 9, 9), [0], caption=caption)
        assert levels.shape[1] == 640
        band = levels[480:]
        assert band.shape[0] < 200
        margins = np.concatenate([band[:, :8], band[:, -8:]], axis=1)
        assert (margins == band[0, 0]).all()
