"""Tensors inside a `.bin` or `.pth` file, found without executing or loading anything.

Such a file is a zip archive with a pickle that describes tensors and their bytes, stored uncompressed, beside it. torch's
restricted unpickler (`weights_only`) reads the description; under a fake mode it tells where in the file the bytes lie, and
leaves them there. A pickle that names anything but tensors and plain containers is refused by it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from gap_export.checkpoint.safetensors import WeightLocation
from gap_export.errors import CheckpointError, first_line

_STORED = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training programs keep the weights, beside optimiser and settings."""

_BEGINNINGS = (b"PK\x03\x04", b"\x80")
"""Of a zip archive, and of the pickles that older versions wrote."""


def read_torch_archive(file: Path) -> dict[str, WeightLocation]:
    """Where the tensors of an archive lie.

    Args:
        file: written by `torch.save`: tensors by name, at the top or under one of `_WRAPPERS`.

    Raises:
        CheckpointError: not such a file, one that would execute code, or tensors stored in a way that cannot be pointed at.
    """
    with file.open("rb") as stream:
        if not stream.read(4).startswith(_BEGINNINGS):
            raise CheckpointError(
                "is not a file of torch.save",
                subject=str(file),
                hint="the download is incomplete or damaged: fetch it again",
            )
    try:
        with FakeTensorMode():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "asks for code to be run, which is refused: it holds more than tensors",
            subject=str(file),
            hint=f"convert it to safetensors where you trust it. torch says: {first_line(error)}",
        ) from error
    except Exception as error:  # torch raises whatever damaged bytes make it raise
        raise CheckpointError(
            f"cannot be read as a file of torch.save: {first_line(error)}",
            subject=str(file),
            hint="the download is incomplete or damaged: fetch it again",
        ) from error
    weights = {key: value for key, value in _tensors(content).items()}
    if not weights:
        raise CheckpointError(
            "holds no tensors by name", subject=str(file), hint="name the file with the model's weights"
        )
    return {key: _location(file, key, tensor) for key, tensor in weights.items()}


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        return {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            return _tensors(content[wrapper])
    return {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def _location(file: Path, key: str, tensor: torch.Tensor) -> WeightLocation:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.dtype not in _STORED or offset is None or not tensor.is_contiguous():
        raise CheckpointError(
            f"stores {key} in a way that cannot be pointed at ({tensor.dtype}, strides {tuple(tensor.stride())})",
            subject=str(file),
            hint="load it with torch.load(..., weights_only=True) and save it as safetensors",
        )
    width = tensor.element_size()
    start = int(offset) + int(tensor.storage_offset()) * width
    length = int(tensor.numel()) * width
    if start + length > file.stat().st_size:
        raise CheckpointError(
            f"is truncated: {key} ends at byte {start + length} of {file.stat().st_size}",
            subject=str(file),
            hint="the download is incomplete: fetch it again",
        )
    return WeightLocation(file, _STORED[tensor.dtype], tuple(tensor.shape), start, length)
