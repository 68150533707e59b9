"""Where a weight lies in which file, without loading it; and weights that are computed from such.

The safetensors format starts with an eight-byte little-endian header length and a JSON header of
`name -> {dtype, shape, data_offsets}`; that is all an exporter that refers to weights in place needs to read. Files of
torch.save are read by `torch_archive.py`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import CheckpointError, shown
from gap_export.files import kinds, opened, parse_json

BITS_PER_ELEMENT = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""The element types of the format."""
_LARGEST_HEADER = 25 * 10**6
"""Bytes, of two hundred thousand tensors. The format's own limit is four times as much, which takes a gigabyte to parse."""
_LARGEST_EXTENT = 2**64
_ENTRY = {"dtype", "shape", "data_offsets"}
FILLER = "alignment."
"""Beginning of the names of tensors that only make others begin at multiples of 64 bytes."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class WeightLocation:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: safetensors' name of the element type (`F32`, `F16`, `BF16`, ...).
        shape: extents.
        offset: first byte, counted from the start of the file.
        length: in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


Rule = Callable[[Sequence[NDArray[Any]], slice], NDArray[np.float32]]
"""Stored tensors and a range of rows of the result -> those rows, float32."""


@dataclass(frozen=True)
class Derived:
    """A weight that is computed from stored ones: a sum, a merge, tensors joined. It is written, its sources are not.

    Attributes:
        shape: extents.
        sources: what it is computed from.
        rule: how, some rows at a time, so that a large one need not be held.
    """

    shape: tuple[int, ...]
    sources: tuple[WeightLocation, ...]
    rule: Rule

    @property
    def file(self) -> Path:
        """The file of its first source, for messages."""
        return self.sources[0].file


@dataclass(frozen=True)
class TensorHeader:
    """A tensor that is to be written into a safetensors file.

    Attributes:
        name: its key.
        dtype: safetensors' name of the element type.
        shape: extents.
        length: in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


def lay_out(parts: Sequence[TensorHeader]) -> tuple[bytes, dict[str, int], int]:
    """Where tensors come to lie in a safetensors file of their own, each at a multiple of 64 bytes.

    Returns:
        (what the file begins with, name -> offset in the file, bytes of the file).
    """
    header: dict[str, object] = {}
    starts: dict[str, int] = {}
    end = 0
    for number, part in enumerate(parts):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if start > end:  # the format knows no holes
            filler = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
            header[f"{FILLER}{number}"] = filler
        end = start + part.length
        starts[part.name] = start
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + end


def read_header(file: Path) -> dict[str, WeightLocation]:
    """Parse the header of one safetensors file and check it against the file's size, as strictly as the format's own package does.

    Raises:
        CheckpointError: not a safetensors file, cut short, or one whose tensors overlap or leave parts of it out.
    """
    with opened(file, kinds.WEIGHTS) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _broken(file, f"is not a safetensors file ({size} bytes)")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise _broken(file, "is truncated or not a safetensors file (its header is longer than the file)")
        if length > _LARGEST_HEADER:
            raise _broken(file, f"has a header of {length} bytes ({_LARGEST_HEADER} at most)")
        text = stream.read(length)
    try:
        header = parse_json(text, str(file), kinds.WEIGHTS)
    except CheckpointError as error:
        raise _broken(file, f"is not a safetensors file (its header {error.message})") from error
    if not isinstance(header, dict) or not text.lstrip().startswith(b"{"):
        raise _broken(file, "is not a safetensors file (its header is no JSON object)")
    described = header.pop("__metadata__", None)
    if not (
        described is None
        or (isinstance(described, dict) and all(isinstance(each, str) for each in described.values()))
    ):
        raise _broken(file, "is damaged: its __metadata__ is more than text by name")
    start = 8 + length
    locations = {key: _location(file, key, entry, start) for key, entry in header.items()}
    _check_covered(file, locations, start, size)
    return locations


def _location(file: Path, key: str, entry: Any, base: int) -> WeightLocation:
    """A tensor, from its entry in the header.

    Raises:
        CheckpointError: the entry describes no tensor.
    """
    if not (isinstance(entry, dict) and set(entry) == _ENTRY):
        raise _broken(file, f"is damaged: {shown(key)} is not described by {', '.join(sorted(_ENTRY))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in BITS_PER_ELEMENT):
        raise _broken(file, f"stores {shown(key)} as {shown(dtype)}, an element type that is not known")
    if not (_are_extents(shape) and _are_extents(offsets) and len(offsets) == 2):
        raise _broken(
            file, f"is damaged: {shown(key)} has the shape {shown(shape)} and lies at {shown(offsets)}"
        )
    bits, (start, end) = BITS_PER_ELEMENT[dtype], offsets
    for extent in shape:
        bits *= extent
        if bits >= 8 * _LARGEST_EXTENT:
            raise _broken(file, f"is damaged: {shown(key)} has the shape {shown(shape)}")
    if start > end or bits != 8 * (end - start):
        raise _broken(
            file,
            f"is damaged: {shown(key)} lies from byte {start} to byte {end} where its shape needs {bits / 8:g} bytes",
        )
    return WeightLocation(file, dtype, tuple(shape), base + start, end - start)


def _check_covered(file: Path, locations: Mapping[str, WeightLocation], start: int, size: int) -> None:
    """Refuse tensors that do not follow each other, without holes and overlaps, from the header to the end of the file.

    Raises:
        CheckpointError: names one.
    """
    end = start
    for key, each in sorted(locations.items(), key=lambda item: (item[1].offset, item[1].length)):
        if each.offset + each.length > size:
            raise _broken(
                file, f"is truncated: {shown(key)} ends at byte {each.offset + each.length} of {size}"
            )
        if each.offset != end:
            fault = "overlaps what lies before it" if each.offset < end else "leaves a hole before it"
            raise _broken(file, f"is damaged: {shown(key)} {fault}")
        end = each.offset + each.length
    if end != size:
        raise _broken(file, f"is damaged: {size - end} bytes at its end belong to no tensor")


def _are_extents(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _LARGEST_EXTENT for value in values
    )


def _broken(file: Path, message: str) -> CheckpointError:
    return CheckpointError(
        message, subject=str(file), hint="the download is incomplete or damaged: fetch it again"
    )


def read_floats(location: WeightLocation) -> NDArray[np.float32] | None:
    """The numbers of a small tensor; None where it is not stored as floating-point numbers."""
    types = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}
    if location.dtype not in types:
        return None
    count = int(np.prod(location.shape, dtype=np.int64))
    stored = np.fromfile(location.file, types[location.dtype], count, offset=location.offset)
    if location.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32).reshape(location.shape)
