"""Where a weight lies in which file, without loading it; and weights that are computed from such.

The safetensors format starts with an eight-byte little-endian header length and a JSON header of
`name -> {dtype, shape, data_offsets}`; that is all an exporter that refers to weights in place needs to read. Files of
torch.save are read by `torch_archive.py`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import CheckpointError

BYTES_PER_ELEMENT = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
_LARGEST_HEADER = 100 * 2**20
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
    for part in parts:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + part.length
        starts[part.name] = start
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + end


def read_header(file: Path) -> dict[str, WeightLocation]:
    """Parse the header of one safetensors file and check it against the file's size.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """

    def broken(message: str) -> CheckpointError:
        return CheckpointError(
            message, subject=str(file), hint="the download is incomplete or damaged: fetch it again"
        )

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise broken(f"is not a safetensors file ({size} bytes)")
        (header_length,) = struct.unpack("<Q", prefix)
        if header_length > min(size - 8, _LARGEST_HEADER):
            raise broken("is truncated or not a safetensors file (its header is longer than the file)")
        try:
            header = json.loads(stream.read(header_length))
        except ValueError as error:
            raise broken("is not a safetensors file (its header is not JSON)") from error
    base = 8 + header_length
    locations: dict[str, WeightLocation] = {}
    try:
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(int(extent) for extent in entry["shape"])
            expected = BYTES_PER_ELEMENT.get(entry["dtype"], 0)
            for extent in shape:
                expected *= extent
            if not 0 <= start <= end:
                raise broken(f"is damaged: {key} lies from byte {start} to byte {end} of its data")
            if end > size - base:
                raise broken(f"is truncated: {key} ends at byte {base + end} of {size}")
            if expected and end - start != expected:
                raise broken(f"is damaged: {key} has {end - start} bytes where its shape needs {expected}")
            locations[key] = WeightLocation(file, entry["dtype"], shape, base + start, end - start)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise broken("is damaged (its header does not describe tensors)") from error
    return locations


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
