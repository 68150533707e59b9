"""Images of every kind against transformers' own processors, and files that are no images."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gap_export.errors import InputError
from gap_export.inputs import images
from gap_export.inputs.images import load_image
from gap_export.inputs.square import SquareLayout, fit, mean_colour, padding, pixel_values

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILTER_NUMBER = {"bicubic": 3, "bilinear": 2, "lanczos": 1}
ODD_SIZES = [
    (1, 37),
    (37, 1),
    (1, 1),
    (3, 2),
    (96, 96),
    (97, 96),
    (335, 337),
    (641, 427),
    (4000, 300),
    (300, 4000),
]


def how(kind: str, size: int = 48, resample: str = "bicubic") -> SquareLayout:
    return SquareLayout.model_validate(
        {
            "size": size,
            "fit": kind,
            "background": mean_colour(MEAN),
            "resample": resample,
            "mean": MEAN,
            "std": STD,
        }
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def transformers_values(image: Image.Image, preprocessing: SquareLayout) -> np.ndarray:
    """The same image through transformers' processor for this fit."""
    transformers = pytest.importorskip("transformers")
    size = preprocessing.size
    settings_ = {
        "image_mean": MEAN,
        "image_std": STD,
        "resample": FILTER_NUMBER[preprocessing.resample],
        "crop_size": {"height": size, "width": size},
    }
    if preprocessing.fit == "stretch":
        processor = transformers.CLIPImageProcessorPil(
            size={"height": size, "width": size}, do_center_crop=False, **settings_
        )
    elif preprocessing.fit == "crop":
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, **settings_)
    else:
        processor = transformers.LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": size}, **settings_
        )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"])


class TestAgainstTransformers:
    @pytest.mark.parametrize("kind", ["pad", "crop", "stretch"])
    @pytest.mark.parametrize("extent", ODD_SIZES)
    @pytest.mark.parametrize("size", [48, 97])
    def test_odd_sizes_are_equal_to_the_last_bit(self, kind: str, extent: tuple[int, int], size: int) -> None:
        image = noise(*extent)
        ours = pixel_values([image], how(kind, size))
        assert ours.dtype == np.float32
        assert ours.shape == (1, 3, size, size)
        np.testing.assert_array_equal(ours, transformers_values(image, how(kind, size)))

    @pytest.mark.parametrize("kind", ["pad", "crop", "stretch"])
    @pytest.mark.parametrize("resample", ["bilinear", "lanczos"])
    def test_other_filters(self, kind: str, resample: str) -> None:
        image = noise(61, 150)
        np.testing.assert_array_equal(
            pixel_values([image], how(kind, 40, resample)),
            transformers_values(image, how(kind, 40, resample)),
        )

    @pytest.mark.parametrize("kind", ["pad", "crop"])
    @pytest.mark.parametrize(
        "mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV", "LAB", "PA", "RGBa"]
    )
    def test_modes(self, kind: str, mode: str) -> None:
        image = noise(50, 31)
        if mode.upper() in ("LA", "RGBA"):
            image.putalpha(noise(50, 31, seed=1).convert("L"))
            image = image.convert(mode.upper())
        image = Image.new(mode, (50, 31)) if mode == "LAB" else image.convert(mode)
        np.testing.assert_array_equal(pixel_values([image], how(kind)), transformers_values(image, how(kind)))

    @pytest.mark.parametrize("kind", ["pad", "crop"])
    def test_palette_with_transparency(self, kind: str, tmp_path: Path) -> None:
        noise(50, 31).convert("P").save(tmp_path / "a.png", transparency=7)
        with Image.open(tmp_path / "a.png") as opened:
            expected = transformers_values(opened, how(kind))
        np.testing.assert_array_equal(pixel_values([load_image(tmp_path / "a.png")], how(kind)), expected)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_rotated_by_exif(self, orientation: int, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise(50, 31).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as opened:
            expected = transformers_values(ImageOps.exif_transpose(opened), how("pad"))
        np.testing.assert_array_equal(pixel_values([load_image(tmp_path / "a.png")], how("pad")), expected)

    def test_a_rounded_background_is_noticed(self) -> None:
        rounded = how("pad").model_copy(update={"background": tuple(round(m * 255) for m in MEAN)})
        assert rounded.background != mean_colour(MEAN)
        image = noise(50, 31)
        assert not np.array_equal(pixel_values([image], rounded), transformers_values(image, how("pad")))

    @settings(max_examples=40, deadline=None)
    @given(
        width=st.integers(1, 90),
        height=st.integers(1, 90),
        size=st.integers(1, 50),
        kind=st.sampled_from(["pad", "crop", "stretch"]),
    )
    def test_any_size(self, width: int, height: int, size: int, kind: str) -> None:
        image = noise(width, height, seed=width)
        np.testing.assert_array_equal(
            pixel_values([image], how(kind, size)), transformers_values(image, how(kind, size))
        )


class TestFit:
    @settings(max_examples=40, deadline=None)
    @given(
        width=st.integers(1, 70),
        height=st.integers(1, 70),
        size=st.integers(1, 40),
        pixels=st.integers(1, 400),
    )
    def test_strips_change_nothing(self, width: int, height: int, size: int, pixels: int) -> None:
        image, side = noise(width, height, seed=height), max(width, height)
        square = Image.new("RGB", (side, side), mean_colour(MEAN))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gap_export.inputs.square.STRIP_PIXELS", pixels)
            fitted = fit(image, how("pad", size))
        np.testing.assert_array_equal(fitted, square.resize((size, size), Image.Resampling.BICUBIC))

    def test_padding_puts_an_odd_remainder_behind(self) -> None:
        assert padding(5, 2) == (5, 0, 1)
        assert padding(2, 5) == (5, 1, 0)
        assert padding(4, 4) == (4, 0, 0)

    def test_mean_colour_truncates(self) -> None:
        assert mean_colour(MEAN) == (122, 116, 104)
        assert mean_colour((0.5, 0.5, 0.5)) == (127, 127, 127)

    def test_batch_keeps_order(self) -> None:
        first, second = noise(20, 30), noise(30, 20, seed=1)
        both = pixel_values([first, second], how("pad"))
        np.testing.assert_array_equal(both[:1], pixel_values([first], how("pad")))
        np.testing.assert_array_equal(both[1:], pixel_values([second], how("pad")))

    def test_empty_batch(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            pixel_values([], how("pad"))

    def test_a_thread_of_pixels_is_refused_by_crop_alone(self) -> None:
        thread = Image.new("RGB", (1, 4000))
        assert pixel_values([thread], how("pad", 336)).shape == (1, 3, 336, 336)
        with pytest.raises(InputError, match="336x1344000"):
            pixel_values([thread], how("crop", 336))


class TestLoadImage:
    def test_upright_for_every_orientation(self, tmp_path: Path) -> None:
        levels = np.asarray(noise(5, 3))
        turned_back = {
            1: levels,
            2: levels[:, ::-1],
            3: levels[::-1, ::-1],
            4: levels[::-1],
            5: levels.transpose(1, 0, 2),
            6: np.rot90(levels, -1),
            7: np.rot90(levels.transpose(1, 0, 2), 2),
            8: np.rot90(levels, 1),
        }
        for orientation, expected in turned_back.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(levels).save(tmp_path / "a.png", exif=exif)
            np.testing.assert_array_equal(load_image(tmp_path / "a.png"), expected, err_msg=str(orientation))

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
    def test_every_source_gives_the_image_as_displayed(self, file_format: str, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / f"a.{file_format.lower()}"
        noise(50, 31).save(path, exif=exif)
        expected = np.asarray(load_image(path))
        assert expected.shape == (50, 31, 3)
        with Image.open(path) as opened:
            for source in (str(path), path.read_bytes(), opened, expected, expected[:, ::-1][:, ::-1]):
                np.testing.assert_array_equal(np.asarray(load_image(source)), expected)

    def test_an_image_in_memory_may_have_any_mode(self) -> None:
        transparent = Image.new("RGBA", (3, 2), (200, 0, 0, 0))
        assert np.asarray(load_image(transparent)).tolist() == np.full((2, 3, 3), 255).tolist()

    def test_16_bit_grey_is_scaled_and_not_clipped(self, tmp_path: Path) -> None:
        samples = np.array([[0, 255, 32896, 65535]], np.uint16)
        for name in ("a.png", "a.tif"):
            Image.fromarray(samples).save(tmp_path / name)
            assert np.asarray(load_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_16_bit_pgm(self, tmp_path: Path) -> None:
        samples = np.array([[0, 255, 32896, 65535]], ">u2")
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + samples.tobytes())
        assert np.asarray(load_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_transparency_is_laid_over_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)

    def test_cmyk_jpeg(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        red, green, blue = np.asarray(load_image(tmp_path / "a.jpg"))[4, 4].tolist()
        assert red > 250
        assert max(green, blue) < 5

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)

    def test_every_format_is_one_that_pillow_opens(self) -> None:
        Image.init()
        assert set(images.FORMATS) <= set(Image.OPEN)

    def test_two_images_in_one_jpeg(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
        first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
        assert load_image(tmp_path / "a.jpg").getpixel((4, 4)) == (255, 255, 255)

    def test_path_may_be_a_string(self, tmp_path: Path) -> None:
        noise(4, 3).save(tmp_path / "a.png")
        assert load_image(str(tmp_path / "a.png")).size == (4, 3)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of under 100 bytes whose header claims an extent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


class TestRefused:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (np.zeros((4, 5, 3), np.float32), r"float32 \[4, 5, 3\]"),
            (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\]"),
            (np.zeros((4, 5), np.uint8), r"uint8 \[4, 5\]"),
            (np.zeros((0, 5, 3), np.uint8), r"uint8 \[0, 5, 3\]"),
            (Image.new("RGB", (0, 5)), "has no pixels"),
            (Image.new("F", (4, 5)), "range is not defined"),
            (b"", "0 bytes"),
            (b"no image", "not an image in a known format"),
            (5, "of type int"),
            (None, "of type NoneType"),
        ],
        ids=[
            "floats",
            "channels first",
            "two axes",
            "no rows",
            "PIL of no width",
            "PIL of floats",
            "empty",
            "text",
            "number",
            "nothing",
        ],
    )
    def test_what_is_no_image_is_told_what_would_be(self, source: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(source)  # type: ignore[arg-type]

    def refusal(self, path: Path | str) -> InputError:
        with pytest.raises(InputError) as caught:
            load_image(path)
        assert caught.value.hint
        assert caught.value.subject == str(path)
        return caught.value

    def test_missing(self, tmp_path: Path) -> None:
        assert "No such file" in self.refusal(tmp_path / "none.png").message

    def test_folder(self, tmp_path: Path) -> None:
        assert "is a folder" in self.refusal(tmp_path).message

    def test_impossible_path(self) -> None:
        self.refusal("a\0b.png")
        self.refusal("a" * 5000)

    def test_zero_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        assert "0 bytes" in self.refusal(tmp_path / "a.png").message

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("<html>not found</html>")
        error = self.refusal(tmp_path / "a.png")
        assert "not an image" in error.message
        assert "PNG" in error.hint

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    def test_cut_short(self, file_format: str, tmp_path: Path) -> None:
        whole = tmp_path / "whole"
        noise(64, 64).save(whole, format=file_format)
        assert load_image(whole).size == (64, 64)
        (tmp_path / "half").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        self.refusal(tmp_path / "half")

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), file_format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    def test_flipped_bytes_give_an_image_or_a_refusal(
        self, data: st.DataObject, file_format: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("flipped") / "a"
        noise(9, 7).save(path, format=file_format)
        content = bytearray(path.read_bytes())
        for _ in range(4):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content))
        with contextlib.suppress(InputError):
            assert load_image(path).mode == "RGB"

    def test_claimed_extent(self, tmp_path: Path) -> None:
        for extent, said in (  # above Pillow's own limit, and between it and ours
            ((60_000, 60_000), "more pixels than Pillow decodes"),
            ((12_000, 12_000), "12000x12000 pixels would take"),
        ):
            (tmp_path / "a.png").write_bytes(png_claiming(*extent))
            assert said in self.refusal(tmp_path / "a.png").message
        (tmp_path / "a.png").write_bytes(png_claiming(40_000, 1))
        assert "40000x1" in self.refusal(tmp_path / "a.png").message

    def test_postscript_is_never_interpreted(self, tmp_path: Path) -> None:
        (tmp_path / "a.eps").write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
        )
        assert "known format" in self.refusal(tmp_path / "a.eps").message

    @pytest.mark.parametrize("dtype", [np.float32, np.int32])
    def test_pixels_without_a_range(self, dtype: type, tmp_path: Path) -> None:
        Image.fromarray(np.ones((3, 3), dtype)).save(tmp_path / "a.tif")
        assert "range is not defined" in self.refusal(tmp_path / "a.tif").message
