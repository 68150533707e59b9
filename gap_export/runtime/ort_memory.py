"""Where a session of ONNX Runtime keeps its cache, embeddings and ids: in memory of the host, or on an NVIDIA GPU.

A region is a dense tensor in such a memory: a NumPy array on the host, an address on the device. A part of a region is a region too, so one block
serves caches of every size. bfloat16 is uint16 in NumPy.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.spec import DType
from gap_export.engine.buffers import empty_wire, from_wire, size_of, to_wire
from gap_export.engine.device import Device
from gap_export.runtime.onnxruntime_package import ort

Region = Any
"""A tensor in the memory's own form."""

_BFLOAT16 = 16
"""Its number in ONNX."""


class Memory(Protocol):
    """Holds tensors, and binds them to the calls of a session.

    Attributes:
        device: kind of device in bindings: cpu or cuda.
        number: of the device.
        is_host: whether arrays of the host lie in it as they are.
    """

    device: str
    number: int
    is_host: bool

    def zeros(self, shape: Sequence[int], dtype: DType) -> Region:
        """A region of its own. It is full of zeros, for what lies in slots not yet written is multiplied with zero and must be a number."""
        ...

    def part(self, region: Region, shape: Sequence[int], first: int = 0) -> Region:
        """Elements of a region from number `first` on, in another shape; nothing is copied."""
        ...

    def of(self, value: Any, dtype: DType) -> Region:
        """The region that ONNX Runtime gave an output."""
        ...

    def copy(self, to: Region, source: Region) -> None:
        """Within the memory, between regions of as many elements."""
        ...

    def clear(self, region: Region) -> None:
        """Fill with zeros."""
        ...

    def write(self, to: Region, array: NDArray[Any]) -> None:
        """From the host."""
        ...

    def read(self, region: Region) -> NDArray[Any]:
        """To the host, bfloat16 as float32; on the host, the region itself."""
        ...

    def bind(self, binding: Any, region: Region, dtype: DType, *, input: str = "", output: str = "") -> None:
        """Have a call read or write a region, or both."""
        ...

    def close(self) -> None:
        """Give back what is left when the regions are gone."""
        ...


class HostMemory:
    """NumPy arrays."""

    device, number, is_host = "cpu", 0, True

    def zeros(self, shape: Sequence[int], dtype: DType) -> NDArray[Any]:
        """As `Memory.zeros`."""
        array = empty_wire(dtype, shape)
        array[...] = 0
        return array

    def part(self, region: NDArray[Any], shape: Sequence[int], first: int = 0) -> NDArray[Any]:
        """As `Memory.part`."""
        return region.reshape(-1)[first : first + math.prod(shape)].reshape(shape)

    def of(self, value: Any, dtype: DType) -> NDArray[Any]:
        """As `Memory.of`; arrays are taken as they are."""
        if isinstance(value, np.ndarray):
            return value
        if dtype != "bfloat16":
            return np.asarray(value.numpy())
        shape = tuple(value.shape())
        words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
        return np.ctypeslib.as_array(words).reshape(shape).copy()  # which ONNX Runtime has no array for

    def copy(self, to: NDArray[Any], source: NDArray[Any]) -> None:
        """As `Memory.copy`."""
        to[...] = source.reshape(to.shape)

    def clear(self, region: NDArray[Any]) -> None:
        """As `Memory.clear`."""
        region[...] = 0

    def write(self, to: NDArray[Any], array: NDArray[Any]) -> None:
        """As `Memory.write`."""
        to[...] = array

    def read(self, region: NDArray[Any]) -> NDArray[Any]:
        """As `Memory.read`."""
        return region

    def bind(
        self, binding: Any, region: NDArray[Any], dtype: DType, *, input: str = "", output: str = ""
    ) -> None:
        """As `Memory.bind`."""
        value = ort_value(region, dtype)
        if input:
            binding.bind_ortvalue_input(input, value)
        if output:
            binding.bind_ortvalue_output(output, value)

    def close(self) -> None:
        """As `Memory.close`."""


@dataclass(frozen=True)
class CudaRegion:
    """A tensor on a GPU.

    Attributes:
        address: where it lies.
        shape: extents.
        dtype: element type.
        owner: what its memory lives as long as.
    """

    address: int
    shape: tuple[int, ...]
    dtype: DType
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return size_of(self.dtype, self.shape)


class _Block:
    """Memory of a GPU, given back when nothing refers to it any more."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.address = device.allocate(nbytes)
        weakref.finalize(self, device.free, self.address).atexit = False


class CudaMemory:
    """Memory of one GPU. ONNX Runtime computes on a stream of its own, so every copy is over before the method returns.

    Args:
        number: of the GPU.

    Raises:
        MissingRequirementError: there is no such GPU, or no CUDA runtime.
    """

    device, is_host = "cuda", False

    def __init__(self, number: int) -> None:
        self.number = number
        self._gpu = Device(number, _cuda_runtime())

    def zeros(self, shape: Sequence[int], dtype: DType) -> CudaRegion:
        """As `Memory.zeros`."""
        block = _Block(self._gpu, size_of(dtype, shape))
        region = CudaRegion(block.address, tuple(shape), dtype, block)
        self.clear(region)
        return region

    def part(self, region: CudaRegion, shape: Sequence[int], first: int = 0) -> CudaRegion:
        """As `Memory.part`."""
        skipped = first * size_of(region.dtype, ())
        return CudaRegion(region.address + skipped, tuple(shape), region.dtype, region.owner)

    def of(self, value: Any, dtype: DType) -> CudaRegion:
        """As `Memory.of`; an array, say from another runtime, is copied to the GPU."""
        if isinstance(value, CudaRegion):
            return value
        if isinstance(value, np.ndarray):
            region = self.zeros(value.shape, dtype)
            self.write(region, to_wire(value, dtype))
            return region
        return CudaRegion(value.data_ptr(), tuple(value.shape()), dtype, value)

    def copy(self, to: CudaRegion, source: CudaRegion) -> None:
        """As `Memory.copy`."""
        self._gpu.copy(to.address, source.address, source.nbytes)
        self._gpu.synchronize()

    def clear(self, region: CudaRegion) -> None:
        """As `Memory.clear`."""
        self._gpu.clear(region.address, region.nbytes)
        self._gpu.synchronize()

    def write(self, to: CudaRegion, array: NDArray[Any]) -> None:
        """As `Memory.write`."""
        self._gpu.upload(to.address, np.ascontiguousarray(array))
        self._gpu.synchronize()

    def read(self, region: CudaRegion) -> NDArray[Any]:
        """As `Memory.read`."""
        array = empty_wire(region.dtype, region.shape)
        self._gpu.download(array, region.address)
        return from_wire(array, region.dtype)

    def bind(
        self, binding: Any, region: CudaRegion, dtype: DType, *, input: str = "", output: str = ""
    ) -> None:
        """As `Memory.bind`."""
        element = _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
        there = (self.device, self.number, element, region.shape, region.address)
        if input:
            binding.bind_input(input, *there)
        if output:
            binding.bind_output(output, *there)

    def close(self) -> None:
        """As `Memory.close`."""
        self._gpu.close()


def _cuda_runtime() -> Any:
    """The CUDA runtime library of this ONNX Runtime, whose CUDA provider loads it too; None where it has none."""
    major = ort.cuda_version.partition(".")[0]
    if not major:
        return None
    with redirect_stdout(
        StringIO()
    ):  # it prints what it does not find; the provider says so again, as an error
        ort.preload_dlls()
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError:
        return None


def ort_value(array: NDArray[Any], dtype: DType) -> Any:
    """An OrtValue over the same memory: contiguous arrays of the right type are not copied.

    Args:
        array: floats, or uint16 for bfloat16 that is there already.
        dtype: what the graph takes.
    """
    if dtype != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    wire = np.ascontiguousarray(array) if array.dtype == np.uint16 else to_wire(array, dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(wire, _BFLOAT16)
