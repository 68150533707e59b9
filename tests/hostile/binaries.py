"""Damage to weights, graphs, tables, pickles, images and engines that only somebody does who knows the format."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.judge import REFUSED
from tests.hostile.texts import Damage, json_damaged, shown


def safetensors_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Damage to the header of safetensors: 8 bytes of length, JSON, data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def packed(changed: Any, behind: bytes = data) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + behind

    for claimed in (0, 1, length - 1, length + 1, len(content), 2**31, 2**40, 2**64 - 1):
        yield f"a header of {claimed} bytes", struct.pack("<Q", claimed) + content[8:], REFUSED
    for name, damaged, _ in json_damaged(json.dumps(header).encode(), rng, amount):
        yield f"header: {name}", packed(damaged), ""
    first, second = header[names[0]], header[names[1]]
    size = first["data_offsets"][1] - first["data_offsets"][0]
    for name, change in {
        "two tensors over each other": {names[1]: {**second, "data_offsets": first["data_offsets"]}},
        "offsets behind the end": {names[0]: {**first, "data_offsets": [len(data), len(data) + size]}},
        "offsets the other way": {names[0]: {**first, "data_offsets": first["data_offsets"][::-1]}},
        "negative offsets": {names[0]: {**first, "data_offsets": [-size, 0]}},
        "offsets that are floats": {names[0]: {**first, "data_offsets": [0.0, float(size)]}},
        "three offsets": {names[0]: {**first, "data_offsets": [0, 1, 2]}},
        "a shape that is not its size": {names[0]: {**first, "shape": [7, 7, 7]}},
        "a shape of 2^62": {names[0]: {**first, "shape": [2**31, 2**31]}},
        "a negative shape": {names[0]: {**first, "shape": [-1, -size // 4]}},
        "an unknown type": {names[0]: {**first, "dtype": "F4_[/red]"}},
        "a type of another width": {names[0]: {**first, "dtype": "F64"}},
        # all of them: integers that nobody reads are no fault
        "integers": {name: {**header[name], "dtype": "I32"} for name in names},
    }.items():
        yield name, packed({**header, **change}), REFUSED
    yield (
        "a hole between tensors",
        packed({name: each for name, each in header.items() if name != names[0]}),
        "",
    )
    yield "more data than tensors", packed(header, data + bytes(64)), ""
    yield "less data than tensors", packed(header, data[:-4]), REFUSED
    yield "no data", packed(header, b""), REFUSED
    yield "no tensors", packed({"__metadata__": {}}), REFUSED
    yield "not a number anywhere", packed(header, b"\xff" * len(data)), ""
    yield "names exchanged", packed({**header, names[0]: second, names[1]: first}), ""
    doubled = json.dumps(header)[:-1] + f', "{names[0]}": {json.dumps(second)}}}'
    yield "a name that stands twice", packed(doubled.encode()), REFUSED
    yield (
        "20,000 names",
        packed(
            {
                **header,
                **{f"x{each}": {**first, "shape": [0], "data_offsets": [0, 0]} for each in range(20_000)},
            }
        ),
        "",
    )


def table_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Damage to the columns of a parquet file: dropped, renamed, of other types, with nulls, with other values."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(content))

    def packed(changed: Any) -> bytes:
        out = io.BytesIO()
        parquet.write_table(changed, out)
        return out.getvalue()

    rows = table.num_rows
    values: dict[str, Callable[[], Any]] = {
        "nulls": lambda: pyarrow.nulls(rows),
        "texts": lambda: pyarrow.array(["x"] * rows),
        "markup": lambda: pyarrow.array(["[/red]"] * rows),
        "empty texts": lambda: pyarrow.array([""] * rows),
        "numbers": lambda: pyarrow.array([1] * rows),
        "negative numbers": lambda: pyarrow.array([-7] * rows),
        "huge numbers": lambda: pyarrow.array([2**62] * rows),
        "NaN": lambda: pyarrow.array([float("nan")] * rows),
        "infinity": lambda: pyarrow.array([float("inf")] * rows),
        "booleans": lambda: pyarrow.array([True] * rows),
        "empty lists": lambda: pyarrow.array([[]] * rows, pyarrow.list_(pyarrow.float64())),
        "long lists": lambda: pyarrow.array([[1.0] * 9] * rows),
        "lists of texts": lambda: pyarrow.array([["x"]] * rows),
        "lists of null": lambda: pyarrow.array([[None] * 4] * rows, pyarrow.list_(pyarrow.float64())),
        "lists of NaN": lambda: pyarrow.array([[float("nan")] * 4] * rows),
        "objects": lambda: pyarrow.array([{"a": 1}] * rows),
        "bytes": lambda: pyarrow.array([b"\xff\xfe"] * rows),
        "dates": lambda: pyarrow.array([0] * rows, pyarrow.timestamp("s")),
    }
    pairs = [(column, name) for column in table.column_names for name in values]
    for column, name in rng.sample(pairs, min(amount, len(pairs))):
        place = table.column_names.index(column)
        yield f"{column} holds {name}", packed(table.set_column(place, column, values[name]())), ""
    for column in table.column_names:
        yield f"without {column}", packed(table.drop_columns([column])), ""
    yield "a column more", packed(table.append_column("[/red]", pyarrow.nulls(rows))), ""
    yield "a column twice", packed(table.append_column(table.column_names[0], table.column(0))), ""
    yield "no rows", packed(table.slice(0, 0)), ""
    yield "every row twice", packed(pyarrow.concat_tables([table, table])), REFUSED
    yield "the last row alone", packed(table.slice(rows - 1)), ""
    yield "rows in another order", packed(table.take(list(range(rows))[::-1])), ""
    yield "no columns", packed(table.select([])), REFUSED
    footer = bytearray(content)
    footer[-8:-4] = struct.pack("<I", 2**31)
    yield "a footer of 2 GB", bytes(footer), REFUSED


def pickle_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Pickles of other values, and programs in the place of data."""
    value = pickle.loads(content)
    for name, damaged, expect in json_damaged(json.dumps(value).encode(), rng, amount):
        try:
            other = json.loads(damaged.decode("utf-8", "surrogatepass"))
        except ValueError:
            continue
        yield name, pickle.dumps(other, protocol=2), expect
    for name, program in {
        "a call of a function": b"cos\ngetcwd\n(tR.",
        "a builtin": b"cbuiltins\neval\n(S'1'\ntR.",
        "a class": b"ccollections\nOrderedDict\n)R.",
        "an object from elsewhere": b"Pabc\n.",
        "a memo that is not there": b"h\x05.",
        "a stack that is empty": b".",
        "a set of bytes of 2 GB": b"\x80\x04B\xff\xff\xff\x7f.",
        "bytes of 2^63": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "a memo at 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "a frame of 2^62": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x3f.",
        "an unknown protocol": b"\x80\xffN.",
        "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "lists that double 40 times": b"\x80\x02]q\x00"
        + b"".join(
            b"]q" + bytes([n]) + b"(h" + bytes([n - 1]) + b"h" + bytes([n - 1]) + b"e" for n in range(1, 41)
        )
        + b".",
        "a number of 20,000 digits": b"\x80\x02\x8b\x20\x4e\x00\x00" + b"\x7f" * 20_000 + b".",
        "text of Latin-1": b"\x80\x02]U\x04caf\xe9a.",
    }.items():
        yield name, program, REFUSED


def image_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Images of other formats, modes and sizes, and files that claim to be larger than they are."""
    from PIL import Image

    del amount
    image = Image.open(io.BytesIO(content))

    def saved(given: Any, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        given.save(out, kind, **options)
        return out.getvalue()

    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000"):
        try:
            whole = saved(image.convert("RGB"), kind)
        except OSError:
            continue
        yield f"{kind}", whole, ""
        yield f"{kind}, cut in the middle", whole[: len(whole) // 2], ""
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        yield f"{kind}, 20 bytes changed", bytes(damaged), ""
    for mode in ("1", "L", "LA", "P", "RGBA", "I", "I;16", "F", "CMYK", "YCbCr", "LAB", "HSV"):
        for kind in ("PNG", "TIFF"):
            try:
                yield f"mode {mode} in {kind}", saved(image.convert("RGB").convert(mode), kind), ""
            except (OSError, ValueError):
                continue
    for size in ((1, 1), (1, 4000), (4000, 1), (3, 20_000), (6000, 6000)):
        yield f"{size[0]} x {size[1]}", saved(Image.new("RGB", size), "PNG"), ""
    for size in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 5), (2**32 - 1, 1)):
        yield f"a PNG that claims {size[0]} x {size[1]}", _png(*size), REFUSED
    yield "a PNG of 30,000 x 30,000 that packs to little", _png(30_000, 30_000, rows=True), REFUSED
    yield "a PNG with a text of 64 MB", _png_with_text(saved(image.convert("RGB"), "PNG")), ""
    for number in (0, 1, 6, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = number
        yield f"EXIF orientation {number}", saved(image.convert("RGB"), "JPEG", exif=exif.tobytes()), ""
    yield "EXIF that is none", saved(image.convert("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), ""
    frames = [Image.new("P", (500, 500), each % 256) for each in range(300)]
    yield "300 frames", saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), ""
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>", REFUSED
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", REFUSED
    yield "PDF", b"%PDF-1.4\n%%EOF", REFUSED


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *, rows: bool = False) -> bytes:
    """A PNG whose header says so, with all its rows or with a few bytes."""
    if rows:
        compressor = zlib.compressobj(1)
        row = bytes(1 + 3 * width)
        data = b"".join(compressor.compress(row) for _ in range(height // 100)) + compressor.flush()
    else:
        data = zlib.compress(bytes(64))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _png_with_text(content: bytes) -> bytes:
    packed = b"Comment\0\0" + zlib.compress(bytes(64 * 2**20), 1)
    end = content.rindex(b"IEND") - 4
    return content[:end] + _chunk(b"zTXt", packed) + content[end:]


def engine_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Headers of engines with other sizes and versions."""
    for number in range(amount):
        size = rng.choice((0, 1, len(content), 2**63, 2**64 - 1))
        magic = rng.choice((b"ftrt", b"vtrt", b"xxxx", b"\0trt"))
        version = [rng.randrange(256) for _ in range(4)]
        header = struct.pack("<4s12xQ4B", magic, size, *version)
        yield f"header {number}: {shown(magic)}, {size} bytes", header + content[len(header) :], ""
