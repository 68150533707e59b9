"""Which device buffers a session needs and how NumPy arrays look on the wire: sizes, aliases, element types.

Everything here is arithmetic on specs, so that it can be checked without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.spec import DType, GraphSpec


@dataclass(frozen=True)
class BufferPlan:
    """Buffers of one graph that live as long as the session.

    Attributes:
        nbytes: buffer name -> size, for the largest call an engine serves.
        buffer_of: tensor name -> buffer name. Aliased outputs share the buffer of their input.
    """

    nbytes: Mapping[str, int]
    buffer_of: Mapping[str, str]

    @property
    def total(self) -> int:
        """Bytes of all buffers."""
        return sum(self.nbytes.values())


def plan_buffers(spec: GraphSpec, *, travelling: Collection[str] = ()) -> BufferPlan:
    """Buffers for the inputs and outputs of a graph.

    Args:
        spec: of the graph.
        travelling: tensors that come from another graph or go to one, and bring their own memory.

    Scalars that are extents of other tensors get none: TensorRT reads them on the host.
    """
    nbytes: dict[str, int] = {}
    buffer_of: dict[str, str] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        if tensor.name in travelling or tensor.extent_of is not None:
            continue
        owner = spec.aliased.get(tensor.name, tensor.name)
        buffer_of[tensor.name] = owner
        nbytes[owner] = max(nbytes.get(owner, 0), size_of(tensor.dtype, tensor.extents("maximum")))
    return BufferPlan(nbytes=nbytes, buffer_of=buffer_of)


def size_of(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * _wire(dtype).itemsize


def _wire(dtype: DType) -> np.dtype[Any]:
    """NumPy has no bfloat16; it travels as the upper half of a float32."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def to_wire(array: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """A contiguous array with the bytes an engine expects; the same array where nothing has to change.

    bfloat16 is rounded to the nearest, ties to even.
    """
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=_wire(dtype))
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(bits.view(np.float32)), quiet_nan, rounded).astype(np.uint16)


def empty_wire(dtype: DType, shape: Sequence[int]) -> NDArray[Any]:
    """An array to download a tensor into."""
    return np.empty(tuple(shape), dtype=_wire(dtype))


def from_wire(array: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """What a downloaded tensor says: floats as float32, everything else as it is."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False) if dtype == "float16" else array
