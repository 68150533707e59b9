"""Tensors inside a `.bin` or `.pth` file, found without executing or loading anything.

Such a file is a zip archive with a pickle that describes tensors, and their bytes, stored uncompressed, beside it. The pickle is read
by an unpickler that knows how tensors are described, makes plain containers, and puts a stand-in for everything else that torch's own
restricted unpickler (`weights_only`) lets pass; names of anything else are refused. Nothing that it makes is larger than the text that
asks for it: no instruction reserves memory, copies what is there, or looks into keys that are made of others.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from gap_export.checkpoint.safetensors import BITS_PER_ELEMENT, WeightLocation
from gap_export.errors import CheckpointError, first_line, shown
from gap_export.files import kinds, opened

_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""What tensors may be stored in; of others it is said that they cannot be pointed at."""
_WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training programs keep the weights, beside optimiser and settings."""
_MOST_WRAPPERS = 4

_BEGINNINGS = (b"PK\x03\x04", b"\x80")
"""Of a zip archive, and of the pickles that older versions wrote."""
_DESCRIPTION = "data.pkl"
_LARGEST_DESCRIPTION = 32 * 2**20
"""Bytes. Those of 7B models with their optimiser have a thousandth of it, and reading takes a second for some megabytes."""
_LARGEST_LISTING = 64 * 2**20
_LOCAL_HEADER, _LOCAL_LENGTHS = 30, 26
_BAD_DOWNLOAD = "the download is incomplete or damaged: fetch it again"


def read_torch_archive(file: Path) -> dict[str, WeightLocation]:
    """Where the tensors of an archive lie.

    Args:
        file: written by `torch.save`: tensors by name, at the top or under one of `_WRAPPERS`.

    Raises:
        CheckpointError: not such a file, one that would execute code, or tensors stored in a way that cannot be pointed at.
    """
    with opened(file, kinds.WEIGHTS) as stream:
        beginning = stream.read(4)
        stream.seek(0)
        if not beginning.startswith(_BEGINNINGS):
            raise _broken(file, "is not a file of torch.save")
        if beginning.startswith(b"\x80"):
            _described(stream.read(_LARGEST_DESCRIPTION), file)
            raise CheckpointError(
                "is a bare pickle, of a version of torch before 1.6, in which tensors cannot be pointed at",
                subject=str(file),
                hint="load it with torch.load(..., weights_only=True) and save it as safetensors",
            )
        try:
            records, description = _records(stream, file)
        except (
            zipfile.BadZipFile,
            EOFError,
            KeyError,
            NotImplementedError,
            OverflowError,
            ValueError,
            struct.error,
        ) as error:
            raise _broken(file, f"cannot be read as a file of torch.save: {first_line(error)}") from error
    weights = _tensors(_described(description, file))
    if not weights:
        raise CheckpointError(
            "holds no tensors by name", subject=str(file), hint="name the file with the model's weights"
        )
    return {key: _location(file, key, tensor, records) for key, tensor in weights.items()}


# The archive


@dataclass(frozen=True)
class _Record:
    """Where the bytes of a storage lie in the file."""

    offset: int
    length: int


def _records(stream: BinaryIO, file: Path) -> tuple[dict[str, _Record], bytes]:
    """(Storages by name, the pickle that describes tensors).

    Raises:
        CheckpointError: what torch does not write: compressed, overlapping or several descriptions.
        ValueError: and others of its reader, no zip archive.
    """
    size = os.fstat(stream.fileno()).st_size
    listed = zipfile.ZipFile(cast(BinaryIO, _Sparing(stream))).infolist()
    if any(each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 for each in listed):
        raise _broken(file, "is a compressed archive, which torch does not write")
    # Stored as they are, records cannot be larger together than the file; those of archives that unfold to terabytes are.
    if sum(each.file_size for each in listed) > size:
        raise _broken(file, "lists more bytes than it has")
    descriptions = [each for each in listed if each.filename.endswith(f"/{_DESCRIPTION}")]
    if len(descriptions) != 1:
        raise _broken(
            file, f"has {len(descriptions)} times {_DESCRIPTION}, so it is not a file of torch.save"
        )
    description = descriptions[0]
    folder = description.filename.removesuffix(_DESCRIPTION)
    if description.file_size > _LARGEST_DESCRIPTION:
        raise _broken(
            file, f"has a {_DESCRIPTION} of {description.file_size} bytes, which is no description of weights"
        )
    found = {
        each.filename.removeprefix(folder): _Record(_start(stream, each), each.file_size)
        for each in listed
        if each.filename.startswith(folder)
    }
    beyond = [name for name, record in found.items() if record.offset + record.length > size]
    if beyond:
        raise _broken(file, f"is truncated: {shown(beyond[0])} ends behind its end")
    if _content(stream, found.get("byteorder", _Record(0, 0))) == b"big":
        raise CheckpointError(
            "stores numbers with their largest byte first",
            subject=str(file),
            hint="load it with torch.load and save it as safetensors",
        )
    return found, _content(stream, found[_DESCRIPTION])


def _start(stream: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Offset of a record's first byte: behind its own header, whose name and padding may be longer than the listing's."""
    stream.seek(record.header_offset + _LOCAL_LENGTHS)
    name, padding = struct.unpack("<HH", stream.read(4))
    return int(record.header_offset + _LOCAL_HEADER + name + padding)


def _content(stream: BinaryIO, record: _Record) -> bytes:
    stream.seek(record.offset)
    return stream.read(record.length)


class _Sparing:
    """A file of which no large piece is read at once, whatever the archive says that its listing takes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, count: int = -1) -> bytes:
        """Some bytes."""
        if not 0 <= count <= _LARGEST_LISTING:
            at, end = self._stream.tell(), self._stream.seek(0, os.SEEK_END)
            self._stream.seek(at)
            if count > 0 or end - at > _LARGEST_LISTING:
                raise zipfile.BadZipFile("its listing is too long")
        return self._stream.read(count)


# What it describes


@dataclass(frozen=True, slots=True)
class _Storage:
    """What tensors are pieces of."""

    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as described; nothing of it is checked."""

    storage: Any
    dtype: str | None
    offset: Any
    shape: Any
    strides: Any


class _Mapping(dict[Any, Any]):
    """A dict or OrderedDict: made empty, and filled with keys that are plain values alone: hashing others can take for ever."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int | float | bytes | None):
            super().__setitem__(key, value)


class _Other:
    """Stands for what has nothing to do with tensors; takes whatever it is given, and keeps nothing."""

    def __init__(self, *_given: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Of lists."""

    add = extend = append


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_others: Any) -> _Tensor:
    return _Tensor(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *_others: Any) -> _Tensor:
    return _Tensor(storage, None, offset, shape, strides)  # of element types that only newer versions have


def _typed(make: Any, _kind: Any, given: Any, _state: Any) -> Any:
    return make(*given) if make in _TENSORS.values() else _Other()


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_KNOWN: Mapping[str, Any] = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": lambda tensor, *_others: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_others: tensor,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "collections.OrderedDict": _Mapping,
    **{f"torch.{name}": _Storage(dtype, "") for name, dtype in _STORAGES.items()},
}
_PLAIN = re.compile(
    r"torch\.([a-z0-9_]+|[A-Za-z]+Storage|Size|Tensor)|torch\.storage\.\w+Storage|torch\.nn\.parameter\.(Uninitialized)?Parameter"
    r"|torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout"
    r"|collections\.Counter|(builtins|__builtin__)\.(set|complex|bytearray)|_codecs\.encode"
)
"""Names of further things in files of training programs that make no difference: element types, devices, sizes, sets."""


_LEFT_OUT = {
    code[0]
    for code in (
        pickle.BYTEARRAY8,  # reserves what it says
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
        pickle.INST,
        pickle.OBJ,
        pickle.DICT,  # hashes any key
        pickle.FROZENSET,
        pickle.EMPTY_SET,
    )
}
"""Instructions that torch does not write."""


class _Unpickler(
    pickle._Unpickler
):  # (The one in C reserves memory for as many objects as a pickle says that it has.)
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _LEFT_OUT
    }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle."""
        path = f"{module}.{name}"
        if path in _KNOWN:
            return _KNOWN[path]
        if _PLAIN.fullmatch(path):
            return _Other
        raise pickle.UnpicklingError(f"it names {shown(path)}")

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", type, key, location, elements)."""
        kind, stored, key, *_ = pid
        if kind != "storage" or not isinstance(key, str):
            raise ValueError("it refers to something outside of it")
        return _Storage(stored.dtype if isinstance(stored, _Storage) else "", key)

    append: Callable[[Any], None]
    stack: list[Any]

    def _empty(self) -> None:
        self.append(_Mapping())

    def _without_state(self) -> None:
        """Attributes of an object, such as the versions of modules that an OrderedDict of weights has, are dropped."""
        self.stack.pop()

    dispatch[pickle.EMPTY_DICT[0]] = _empty
    dispatch[pickle.BUILD[0]] = _without_state


def _described(description: bytes, file: Path) -> Any:
    """What a pickle holds.

    Raises:
        CheckpointError: more than tensors and plain containers, or damaged.
    """
    try:
        return _Unpickler(BytesIO(description)).load()
    except pickle.UnpicklingError as error:
        if "it names" not in str(error):
            raise _broken(file, f"cannot be read as a file of torch.save: {first_line(error)}") from error
        raise CheckpointError(
            f"asks for code to be run, which is refused: {first_line(error)}, and holds more than tensors",
            subject=str(file),
            hint="convert it to safetensors where you trust it",
        ) from error
    except Exception as error:  # damaged bytes ask for anything of anything
        raise _broken(file, f"cannot be read as a file of torch.save: {first_line(error)}") from error


def _tensors(content: Any) -> dict[str, _Tensor]:
    """Tensors by name, at the top or inside wrappers."""
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(content, dict):
            break
        inside = [content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)]
        if not inside:
            return {str(key): value for key, value in content.items() if isinstance(value, _Tensor)}
        content = inside[0]
    return {}


def _location(file: Path, key: str, tensor: _Tensor, records: Mapping[str, _Record]) -> WeightLocation:
    """Where a tensor's own bytes lie.

    Raises:
        CheckpointError: it is no piece of one storage, row by row, or lies outside of it.
    """
    if not (isinstance(tensor.storage, _Storage) and tensor.dtype and _is_contiguous(tensor)):
        raise CheckpointError(
            f"stores {shown(key)} in a way that cannot be pointed at ({tensor.dtype or 'another element type'}, strides "
            f"{shown(tensor.strides)})",
            subject=str(file),
            hint="load it with torch.load(..., weights_only=True) and save it as safetensors",
        )
    record, width = records.get(f"data/{tensor.storage.key}"), BITS_PER_ELEMENT[tensor.dtype] // 8
    start, length = int(tensor.offset) * width, math.prod(tensor.shape) * width
    if record is None or start + length > record.length:
        raise _broken(file, f"is damaged: {shown(key)} lies outside of what is stored")
    return WeightLocation(file, tensor.dtype, tuple(tensor.shape), record.offset + start, length)


def _is_contiguous(tensor: _Tensor) -> bool:
    """Whether elements follow each other, row by row."""
    if not (
        _are_extents(tensor.shape)
        and _are_extents(tensor.strides)
        and _are_extents((tensor.offset,))
        and len(tensor.shape) == len(tensor.strides)
    ):
        return False
    step = 1
    for extent, stride in reversed([*zip(tensor.shape, tensor.strides, strict=True)]):
        if extent > 1 and stride != step:
            return 0 in tensor.shape
        step *= extent
    return True


def _are_extents(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _broken(file: Path, message: str) -> CheckpointError:
    return CheckpointError(message, subject=str(file), hint=_BAD_DOWNLOAD)
