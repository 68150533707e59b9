"""What an ONNX file says that it takes and gives, and which files its weights lie in, without the `onnx` package and without reading its nodes and weights.

An ONNX file is a message of Protocol Buffers: a row of fields, each with a number and a length. The few that are needed are read; all others
are skipped by their length. Whatever does not add up is refused: a length beyond the message it stands in, a field of another kind, text
that is no UTF-8.

Source: https://protobuf.dev/programming-guides/encoding, and onnx.proto for the numbers of the fields.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gap_export.errors import BundleError
from gap_export.files import kinds
from gap_export.files.read import opened

LARGEST_VALUE = 2**20
"""Bytes of what says name, type and shape of one input or output, or where a weight lies."""
MOST_VALUES = 2**14
"""Inputs and outputs of a graph; a cache has two for each layer."""
MOST_FIELDS = 2**19
"""Nodes, weights and what describes them; decoders have some thousands."""

_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_WEIGHT, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_WEIGHT_ELSEWHERE, _ENTRY_KEY, _ENTRY_VALUE = 13, 1, 2
_LOCATION = b"location"
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR = 1, 2, 1
_TYPES = (1, 4, 5, 7, 8, 9)
"""A tensor, a sequence, a map, something opaque, a sparse tensor, something optional."""
_TENSOR_ELEMENT, _TENSOR_SHAPE, _SHAPE_DIM = 1, 2, 1
_DIM_VALUE, _DIM_NAME = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_WINDOW = 2**16

ELEMENTS = {1: "float32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}
"""Number of an element type in ONNX -> what specs call it."""

Extent = int | str | None
"""Of a graph: a number, the name of what varies, or nothing where the graph does not say."""


@dataclass(frozen=True)
class Tensor:
    """An input or output as a graph itself has it.

    Attributes:
        name: of the tensor.
        dtype: as specs call it; other types by their number in ONNX, `none` for what is no tensor.
        shape: extents; None where the graph does not say how many there are.
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...] | None


@dataclass(frozen=True)
class Interface:
    """What a graph itself says, in its own order.

    Attributes:
        inputs: that it takes.
        outputs: that it gives.
        weight_files: names of the files beside it that weights lie in.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weight_files: frozenset[str] = frozenset()


class _Malformed(Exception):
    """What is wrong with a message."""


def read_interface(path: Path) -> Interface:
    """Inputs, outputs and files of weights of an ONNX file.

    Raises:
        BundleError: it cannot be read, or is no ONNX file.
    """
    try:
        with opened(path, kinds.BUNDLE_GRAPH) as file:
            message = _Message(_Window(file), 0, os.fstat(file.fileno()).st_size)
            parts = list(message.parts((_MODEL_GRAPH, _MODEL_FUNCTION)))
            graphs = [part for number, part in parts if number == _MODEL_GRAPH]
            if len(parts) > len(graphs):
                # Each may call the one before twice: written out, as runtimes do, thirty of them are a billion nodes.
                raise BundleError(
                    "defines functions, as no graph of a bundle does",
                    subject=str(path),
                    hint=kinds.BUNDLE_GRAPH.hint,
                )
            if len(graphs) != 1:
                raise _Malformed(f"it has {len(graphs)} graphs")
            return _interface(graphs[0])
    except _Malformed as reason:
        raise BundleError(
            f"is no ONNX file: {reason}", subject=str(path), hint=kinds.BUNDLE_GRAPH.hint
        ) from reason


def _interface(graph: _Message) -> Interface:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    locations: set[bytes] = set()
    for number, part in graph.parts((_GRAPH_WEIGHT, _GRAPH_INPUT, _GRAPH_OUTPUT)):
        if number == _GRAPH_WEIGHT:
            locations.update(_locations(part))
            continue
        (inputs if number == _GRAPH_INPUT else outputs).append(_tensor(part.read()))
        if len(inputs) + len(outputs) > MOST_VALUES:
            raise _Malformed(f"it has more than {MOST_VALUES} inputs and outputs")
    return Interface(tuple(inputs), tuple(outputs), frozenset(map(_text, locations)))


class _Window:
    """A file of which a small part is in memory: fields are near each other, but for the weights among them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start, self._content = file, 0, b""
        self._fields = 0

    def ahead(self, at: int) -> tuple[bytes, int]:
        """(what is in memory, where in it a place of the file is), with enough for the beginning of a field."""
        self._fields += 1
        if self._fields > MOST_FIELDS:
            raise _Malformed(f"it has more than {MOST_FIELDS} fields")
        offset = at - self._start
        if not 0 <= offset <= len(self._content) - 2 * _LONGEST_VARINT:
            self._file.seek(at)
            self._start, self._content, offset = at, self._file.read(_WINDOW), 0
        return self._content, offset

    def read(self, start: int, end: int) -> bytes:
        """A part of the file."""
        offset = start - self._start
        if offset >= 0 and end - self._start <= len(self._content):
            return self._content[offset : end - self._start]
        self._file.seek(start)
        return self._file.read(end - start)


@dataclass(frozen=True)
class _Message:
    """A message in a file: `parts` moves over it and reads nothing but numbers and lengths."""

    file: _Window
    start: int
    end: int

    def parts(self, wanted: tuple[int, ...]) -> Iterator[tuple[int, _Message]]:
        """The fields of those numbers, which are messages too."""
        at = self.start
        while at < self.end:
            content, began = self.file.ahead(at)
            tag, read = _varint(content, began)
            number, kind, length = tag >> 3, tag & 7, 0
            if kind == _BYTES:
                length, read = _varint(content, read)
            elif kind == _VARINT:
                _, read = _varint(content, read)
            else:
                length = _fixed(kind)
            inner = at + read - began
            at = inner + length
            if at > self.end or number == 0:
                raise _Malformed("it ends within a field")
            if number in wanted:
                if kind != _BYTES:
                    raise _Malformed(f"field {number} is of another kind")
                yield number, _Message(self.file, inner, at)

    def read(self) -> bytes:
        """All of it, which is small."""
        if self.end - self.start > LARGEST_VALUE:
            raise _Malformed(f"what describes a tensor takes {self.end - self.start} bytes")
        return self.file.read(self.start, self.end)


def _locations(weight: _Message) -> Iterator[bytes]:
    """Names of files that a weight lies in, whose own values may be large and are not read."""
    for _, entry in weight.parts((_WEIGHT_ELSEWHERE,)):
        fields = _single(entry.read(), _ENTRY_KEY, _ENTRY_VALUE)
        if fields.get(_ENTRY_KEY) == _LOCATION:
            yield _nested(fields.get(_ENTRY_VALUE, b""))


def _tensor(message: bytes) -> Tensor:
    fields = _single(message, _VALUE_NAME, _VALUE_TYPE)
    name = _text(fields.get(_VALUE_NAME, b""))
    kind = _single(_nested(fields.get(_VALUE_TYPE, b"")), *_TYPES)
    if list(kind) != [_TYPE_TENSOR]:
        return Tensor(name, "none", None)
    tensor = _single(_nested(kind[_TYPE_TENSOR]), _TENSOR_ELEMENT, _TENSOR_SHAPE)
    element = tensor.get(_TENSOR_ELEMENT, 0)
    shape = None
    if _TENSOR_SHAPE in tensor:
        dims = _fields(_nested(tensor[_TENSOR_SHAPE]))
        shape = tuple(_extent(_nested(dim)) for number, dim in dims if number == _SHAPE_DIM)
    return Tensor(
        name, ELEMENTS.get(element, f"type {element}") if isinstance(element, int) else "none", shape
    )


def _extent(message: bytes) -> Extent:
    dim = _single(message, _DIM_VALUE, _DIM_NAME)
    if len(dim) > 1:
        raise _Malformed("an extent is a number and a name")
    if _DIM_NAME in dim:
        return _text(dim[_DIM_NAME]) or None
    value = dim.get(_DIM_VALUE)
    if isinstance(value, bytes):
        raise _Malformed("an extent is of another kind")
    return value if value is None or value < 2**63 else value - 2**64


def _single(message: bytes, *wanted: int) -> dict[int, int | bytes]:
    """Fields of which there is at most one; readers differ in what they make of a second."""
    found: dict[int, int | bytes] = {}
    for number, value in _fields(message):
        if number in wanted:
            if number in found:
                raise _Malformed(f"field {number} stands twice")
            found[number] = value
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of every field of a small message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has no number")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        else:
            length = _fixed(kind)
        if at + length > len(message):
            raise _Malformed("a field ends beyond what it stands in")
        yield number, message[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    for byte in content[at : at + _LONGEST_VARINT]:
        at += 1
        if byte < 0x80:
            return (value | byte << shift) & (2**64 - 1), at
        value |= (byte & 0x7F) << shift
        shift += 7
    raise _Malformed("a number does not end")


def _fixed(kind: int) -> int:
    """Bytes of a field of fixed length."""
    if kind == _FIXED64:
        return 8
    if kind == _FIXED32:
        return 4
    raise _Malformed(f"a field is of kind {kind}")


def _nested(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Malformed("a number stands in the place of a message")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _nested(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Malformed("a name is not UTF-8") from error
