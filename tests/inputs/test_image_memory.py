"""Images of any kind, size and damage: bounded memory, one line, no file but a regular one."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from gap_export.errors import InputError
from gap_export.inputs import image_memory, images
from gap_export.inputs.images import image_size, load_image

EXIF = Image.Exif()
EXIF[0x112] = 6
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rgb.png": ("RGB", "PNG", {}),
    "rgba.png": ("RGBA", "PNG", {}),
    "rgb-transparent.png": ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    "grey.png": ("L", "PNG", {}),
    "grey-alpha.png": ("LA", "PNG", {}),
    "grey-16.png": ("I;16", "PNG", {}),
    "bits.png": ("1", "PNG", {}),
    "palette.png": ("P", "PNG", {}),
    "palette-transparent.png": ("P", "PNG", {"transparency": 3}),
    "turned.png": ("RGB", "PNG", {"exif": EXIF}),
    "rgb.jpg": ("RGB", "JPEG", {}),
    "progressive.jpg": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "cmyk.jpg": ("CMYK", "JPEG", {}),
    "turned.jpg": ("RGB", "JPEG", {"exif": EXIF}),
    "rgb.bmp": ("RGB", "BMP", {}),
    "palette.gif": ("P", "GIF", {}),
    "rgb.webp": ("RGB", "WEBP", {"quality": 20, "method": 0}),
    "rgba.webp": ("RGBA", "WEBP", {"quality": 20, "method": 0}),
    "rgba.tif": ("RGBA", "TIFF", {}),
    "cmyk.tif": ("CMYK", "TIFF", {}),
    "lab.tif": ("LAB", "TIFF", {}),
    "packed.tif": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "turned.tif": ("RGB", "TIFF", {"exif": EXIF}),
    "grey-16.tif": ("I;16", "TIFF", {}),
    "rgb.ppm": ("RGB", "PPM", {}),
    "rgb.tga": ("RGB", "TGA", {}),
}


def drawn(mode: str, width: int, height: int) -> Image.Image:
    """Something with edges, in a mode."""
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 4), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200 + 7)
    return (
        image
        if mode == "RGBA"
        else image.convert("RGB").convert(mode)
        if mode != "LA"
        else image.convert("LA")
    )


def written(name: str, folder: Path, width: int, height: int) -> Path:
    mode, file_format, options = KINDS[name]
    path = folder / name
    if mode == "LAB":
        Image.frombytes("LAB", (width, height), drawn("RGB", width, height).tobytes()).save(path, file_format)
    else:
        drawn(mode, width, height).save(path, file_format, **options)
    return path


def at_once(path: Path) -> Image.Image:
    """RGB, without strips and limits: what `load_image` did before it had them."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if image.mode == "I;16":
            return Image.fromarray(
                ((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8)
            ).convert("RGB")
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            layer = upright.convert("RGBA")
            white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, layer).convert("RGB")
        return upright.convert("RGB")


@pytest.mark.parametrize("name", KINDS)
def test_strips_change_no_pixel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(name, tmp_path, 61, 47)
    wanted = np.asarray(at_once(path))
    for pixels in (1, 61 * 5 + 3, 2**20):
        monkeypatch.setattr(images, "_STRIP_PIXELS", pixels)
        made = load_image(path)
        assert (made.mode, made.size) == ("RGB", image_size(path, name=name))
        np.testing.assert_array_equal(np.asarray(made), wanted)


MEASURE = """
import os, resource, sys
from PIL import Image
from gap_export.inputs.images import load_image
from gap_export.inputs import image_memory
for path in sys.argv[1:]:
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_image(path)
        with Image.open(path) as image:
            told = image_memory.bytes_per_pixel(image) * image.width * image.height
        print(path, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), told, flush=True)
        os._exit(0)
    os.wait()
"""


def measured(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Name -> (bytes that loading it took in a process of its own, bytes that were told from its header)."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in found.stdout.splitlines()]
    print(found.stdout)
    return {Path(path).name: (int(taken), int(told)) for path, taken, told in rows}


def test_an_alpha_channel_and_16_bits_take_what_was_told(tmp_path: Path) -> None:
    names = ["rgba.png", "grey-16.png"]
    found = measured([written(name, tmp_path, 2000, 2000) for name in names])
    assert sorted(found) == sorted(names)
    for name, (taken, told) in found.items():
        assert taken < told + 16 * 2**20, name


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_memory_taken_is_what_was_told(name: str, tmp_path: Path) -> None:
    ((taken, told),) = measured([written(name, tmp_path, 4000, 3000)]).values()
    assert taken < told * 1.1 + 24 * 2**20


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_limited_whatever_the_mode(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(name, tmp_path, 40, 30)
    with Image.open(path) as image:
        needed = image_memory.bytes_per_pixel(image) * 40 * 30
    for limit, accepted in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(image_memory, "MEMORY_LIMIT", limit)
        for source in (path, path.read_bytes()):
            if accepted:
                assert load_image(source).width
                continue
            with pytest.raises(InputError, match="of memory, and may take") as caught:
                load_image(source)
            assert "GAP_EXPORT_IMAGE_MEMORY" in caught.value.hint


def test_the_environment_sets_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("rgb.png", tmp_path, 700, 700)
    monkeypatch.setenv(image_memory.VARIABLE, "1")
    with pytest.raises(InputError, match=r"700x700 pixels would take"):
        load_image(path)
    monkeypatch.setenv(image_memory.VARIABLE, "2")
    assert load_image(path).size == (700, 700)
    for wrong in ("", "0", "-1", "2GB", "1e3", "nan", "1_0", "9" * 30, "٣"):
        monkeypatch.setenv(image_memory.VARIABLE, wrong)
        with pytest.raises(InputError, match="no number of MiB"):
            load_image(path)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 2, body: bytes = b"\0") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def frames(file_format: str, count: int) -> bytes:
    made = io.BytesIO()
    pages = [Image.new("P" if file_format == "GIF" else "RGB", (9, 7), i % 250) for i in range(count)]
    pages[0].save(made, file_format, save_all=True, append_images=pages[1:])
    return made.getvalue()


def tiff(tag: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF with one strange entry."""
    entries = [
        (256, 4, 1, 9),
        (257, 4, 1, 7),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 200),
        (279, 4, 1, 63),
    ]
    entries = sorted([*(each for each in entries if each[0] != tag), (tag, kind, count, value)])
    body = b"".join(struct.pack("<HHII", *each) for each in entries)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)).ljust(200, b"\0") + bytes(
        63
    )


def icon(content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def with_exif(garbage: bytes) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (9, 7)).save(made, "JPEG", exif=b"Exif\0\0" + garbage)
    return made.getvalue()


_TEXT_BOMB = b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9)
HOSTILE: dict[str, tuple[Callable[[], bytes], bool | None]] = {
    "claims 60000x60000": (lambda: png(60_000, 60_000), False),
    "claims 12000x12000": (lambda: png(12_000, 12_000), False),
    "claims 9000x9000 with alpha": (lambda: png(9_000, 9_000, colour=6), False),
    "claims 2^31 rows": (lambda: png(1, 2**31 - 1), False),
    "no columns": (lambda: png(0, 5), False),
    "an icon of 12000x12000": (lambda: icon(png(12_000, 12_000)), False),
    "an icon of 9000x9000 with alpha": (lambda: icon(png(9_000, 9_000, colour=6)), False),
    "a profile of 80 MB": (lambda: png(1, 1, chunk(b"iCCP", _TEXT_BOMB), body=bytes(4)), None),
    "a text of 80 MB": (lambda: png(1, 1, chunk(b"zTXt", _TEXT_BOMB), body=bytes(4)), None),
    "thousands of GIF frames": (lambda: frames("GIF", 2000), True),
    "hundreds of TIFF pages": (lambda: frames("TIFF", 400), True),
    "hundreds of WebP frames": (lambda: frames("WEBP", 300), True),
    "a tag of 2^32 values": (lambda: tiff(270, 2, 2**32 - 1, 8), None),
    "2^31 strips": (lambda: tiff(273, 4, 2**31, 8), None),
    "2^32 samples": (lambda: tiff(277, 4, 1, 2**32 - 1), False),
    "a TIFF that points to itself": (lambda: tiff(34665, 4, 1, 8), None),
    "EXIF that is none": (lambda: with_exif(b"garbage" * 9), True),
    "EXIF cut short": (lambda: with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01"), True),
    "an orientation of 99": (
        lambda: with_exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0" + bytes(4)),
        True,
    ),
    "an orientation in words": (
        lambda: with_exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0" + bytes(4)),
        True,
    ),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", False),
    "a PPM of many digits": (lambda: b"P6 " + b"9" * 5000 + b" 1 255\n", False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_an_image_or_one_line(name: str, tmp_path: Path) -> None:
    make, accepted = HOSTILE[name]
    path = tmp_path / "image"
    path.write_bytes(make())
    for read in (
        lambda: load_image(path),
        lambda: load_image(path.read_bytes()),
        lambda: image_size(path, name="i"),
    ):
        refused = None
        try:
            made = read()
        except InputError as error:
            refused = str(error)
        if refused is None:
            assert accepted is not False
            assert isinstance(made, tuple) or made.mode == "RGB"
        else:
            assert accepted is not True, refused
            assert "\n" not in refused


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, tmp_path / "none.png", "a\0b", "a" * 5000):
        for read in (load_image, lambda source: image_size(source, name="i")):
            with pytest.raises(InputError):
                read(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("times", [4, pytest.param(100, marks=pytest.mark.long)])
def test_damaged_files_are_an_image_or_one_line(times: int, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for name in KINDS:
        good = written(name, tmp_path, 33, 21).read_bytes()
        for seed in range(times):
            draw = random.Random(f"{name} {seed}")
            content = bytearray(good)
            for _ in range(draw.choice((1, 5, 40))):
                content[draw.randrange(min(len(content), draw.choice((60, 10**6))))] = draw.randrange(256)
            if draw.random() < 0.3:
                del content[draw.randrange(len(content)) :]
            try:
                assert load_image(bytes(content)).mode == "RGB"
                counts["image"] += 1
            except InputError:
                counts["InputError"] += 1
    print(dict(counts))
    assert min(counts["image"], counts["InputError"]) > times


def test_errors_of_every_kind_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("rgb.png", tmp_path, 4, 3)
    for error in (
        OSError("a\nb"),
        SyntaxError("x"),
        struct.error("x"),
        ValueError(),
        MemoryError(),
        RecursionError("x"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Image, "open", fail)
            with pytest.raises(InputError) as caught:
                load_image(path)
        assert "\n" not in str(caught.value)
        assert caught.value.message.rstrip(": ") not in ("", "cannot be decoded")


def test_control_without_the_check_an_image_is_decoded_whatever_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("rgba.png", tmp_path, 300, 300)
    monkeypatch.setattr(image_memory, "MEMORY_LIMIT", 1000)
    with pytest.raises(InputError):
        load_image(path)
    monkeypatch.setattr(images, "check_memory", lambda *_: None)
    assert load_image(path).size == (300, 300)
