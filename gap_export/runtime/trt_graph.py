"""One engine on the GPU, its tensors, and the memory that they come from.

Tensors that go from one graph to the next stay on the device: they are `DeviceTensor`s, whose memory goes back to its pool when they are
dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.spec import DType, GraphName, GraphSpec
from gap_export.engine import messages
from gap_export.engine.buffers import empty_wire, from_wire, plan_buffers, size_of, to_wire
from gap_export.engine.device import Device
from gap_export.engine.library import Library
from gap_export.engine.profiles import choose_profile, profiles_from_spec
from gap_export.errors import SessionError

# Tensors that go from one graph to the next without touching the host.
_TRAVELLING: dict[GraphName, tuple[str, ...]] = {
    "vision": ("visual_embeds",),
    "splice": ("visual_embeds", "inputs_embeds"),
    "embed": ("inputs_embeds",),
    "decoder": ("inputs_embeds",),
    "prefill": ("inputs_embeds",),
    "decode": ("inputs_embeds",),
}


_ALIGNMENT = 256
"""Bytes that addresses of an engine's tensors are multiples of, as device memory begins at one."""


class Pool:
    """Device memory for tensors that come and go with prompts; what was given back is handed out again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: dict[int, list[int]] = {}
        self.is_open = True

    def take(self, nbytes: int) -> int:
        """Address of so many bytes; their content is anything.

        Raises:
            MissingRequirementError: the GPU has no more.
        """
        idle = self._idle.get(nbytes)
        return idle.pop() if idle else self._device.allocate(nbytes)

    def give_back(self, address: int, nbytes: int) -> None:
        """Have what was taken handed out again, or freed where the pool is closed."""
        if self.is_open:
            self._idle.setdefault(nbytes, []).append(address)
        else:
            self._device.free(address)

    def close(self) -> None:
        """Free what is idle, and from now on what is given back."""
        self.is_open = False
        for addresses in self._idle.values():
            for address in addresses:
                self._device.free(address)
        self._idle.clear()


class DeviceTensor:
    """A tensor on the GPU. `np.asarray` copies it to the host, as float32 where it is a float.

    Attributes:
        shape: extents.
        dtype: element type on the device.
        address: where it lies.

    Args:
        shape: extents.
        dtype: element type.
        device: that it lies on.
        pool: that its memory comes from.
        nbytes: how much of it; by default just enough.
    """

    def __init__(
        self, shape: Sequence[int], dtype: DType, device: Device, pool: Pool, *, nbytes: int | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self._device, self._pool = device, pool
        nbytes = nbytes or size_of(dtype, self.shape)
        self.address = pool.take(nbytes)
        # Everything runs on one stream: memory given back while a kernel still reads it is next written after that kernel.
        weakref.finalize(self, pool.give_back, self.address, nbytes).atexit = False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if not self._pool.is_open:
            raise SessionError(
                "belongs to a session that is closed",
                subject="a tensor on the GPU",
                hint="copy it with np.asarray before the session is closed",
            )
        host = empty_wire(self.dtype, self.shape)
        self._device.download(host, self.address)
        return from_wire(host, self.dtype).astype(dtype, copy=False) if dtype else from_wire(host, self.dtype)


class LoadedGraph:
    """One engine with its context and its buffers.

    Args:
        spec: of the graph.
        engine: opened.
        library: that opened it.
        device: that it runs on.
        cache_of: a graph whose cache this one continues to write.
        captures: whether calls of one shape become a CUDA graph: the first is executed as it is, the second captured.
    """

    def __init__(
        self,
        spec: GraphSpec,
        engine: Any,
        library: Library,
        device: Device,
        cache_of: LoadedGraph | None = None,
        *,
        captures: bool = False,
    ) -> None:
        self.spec = spec
        self._library = library
        self._device = device
        self._engine = engine  # a context is valid as long as its engine
        self._dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
        self._cache_extents = {
            tensor.name: tensor.extents("maximum")[1:]
            for tensor in spec.inputs
            if tensor.name in spec.aliased.values()
        }
        self._row_bytes = {
            name: size_of(self._dtypes[name], extents) for name, extents in self._cache_extents.items()
        }
        self._profiles = profiles_from_spec(spec)
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._travelling: Mapping[str, int] = {}
        self._addresses_set = False
        self._captures, self._captured, self._ran_as_it_is = captures, 0, False
        self._context = self._created_context()
        plan = plan_buffers(spec, travelling=_TRAVELLING[spec.name])
        shared = {name: cache_of.address(name) for name in self._cache_extents} if cache_of else {}
        self._buffers: dict[str, int] = {}
        for name, nbytes in plan.nbytes.items():
            if name not in shared:
                self._buffers[name] = device.allocate(nbytes)
                # A masked slot counts for nothing in attention unless it holds NaN, as fresh memory may: 0 * NaN is NaN.
                device.clear(self._buffers[name], nbytes)
        buffers = self._buffers | shared
        self._address_of = {tensor: buffers[buffer] for tensor, buffer in plan.buffer_of.items()}
        # Scalars that are extents of other tensors: TensorRT reads them on the host, before anything is launched.
        self._on_host = {
            tensor.name: np.zeros((), np.int64) for tensor in spec.inputs if tensor.extent_of is not None
        }
        self._address_of |= {name: scalar.ctypes.data for name, scalar in self._on_host.items()}

    def prepare(self, inputs: Mapping[str, NDArray[Any] | DeviceTensor]) -> None:
        """Choose the profile, set shapes, copy host arrays to the device.

        Args:
            inputs: every input but the cache, batch first.
        """
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        if any(self._shapes.get(name) != shape for name, shape in shapes.items()):
            batch = next(iter(shapes.values()))[0]
            self._set_shapes(
                shapes | {past: (batch, *extents) for past, extents in self._cache_extents.items()}
            )
        for name, scalar in self._on_host.items():
            scalar[...] = inputs[name]
            self._must(
                self._context.set_tensor_address(name, self._address_of[name]),
                f"input {name}",
                "take its value",
            )
        for name, value in inputs.items():
            if isinstance(value, np.ndarray) and name not in self._on_host:
                self._device.upload(self._address_of[name], to_wire(value, self._dtypes[name]))

    def run(self, travelling: Mapping[str, int]) -> None:
        """Run what was prepared.

        Args:
            travelling: addresses of tensors that lie in other memory than the graph's own for this call.
        """
        if not self._addresses_set or travelling != self._travelling:
            for name, address in {**self._address_of, **travelling}.items():
                self._must(
                    self._context.set_tensor_address(name, address), f"tensor {name}", "take its buffer"
                )
            self._addresses_set, self._travelling = True, dict(travelling)
            self._forget_capture()
        if self._captures and self._ran_as_it_is:
            # A context settles with its first call of a shape; what is captured before that would not be what runs.
            self._captured = self._captured or self._device.capture(self._execute)
            self._device.launch(self._captured)
        else:
            self._execute()
            self._ran_as_it_is = True

    def _execute(self) -> None:
        with self._library.log.collecting() as log:
            if not self._context.execute_async_v3(self._device.stream):
                raise messages.error_from_complaints(
                    messages.complaints_of_log(log),
                    subject=f"graph {self.spec.name}",
                    library=self._library.title,
                    doing="run the engine",
                )

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output for the inputs that were prepared."""
        shape = tuple(int(extent) for extent in self._context.get_tensor_shape(name))
        self._must(all(extent >= 0 for extent in shape), f"output {name}", "tell its shape")
        return shape

    def address(self, name: str) -> int:
        """Where an input or output lies that is not travelling."""
        return self._address_of[name]

    def dtype(self, name: str) -> DType:
        """Element type of an input or output."""
        return self._dtypes[name]

    def largest(self, name: str) -> int:
        """Bytes of an output at its largest."""
        tensor = next(tensor for tensor in self.spec.outputs if tensor.name == name)
        return size_of(tensor.dtype, tensor.extents("maximum"))

    def download(self, name: str) -> NDArray[Any]:
        """Copy an output to the host, after the run."""
        host = empty_wire(self._dtypes[name], self.output_shape(name))
        self._device.download(host, self._address_of[name])
        return from_wire(host, self._dtypes[name])

    @property
    def most_rows(self) -> int:
        """Rows of its cache; 1 where another row would begin at an address that engines do not take."""
        rows = min(
            (
                tensor.extents("maximum")[0]
                for tensor in self.spec.inputs
                if tensor.name in self._cache_extents
            ),
            default=1,
        )
        return rows if all(nbytes % _ALIGNMENT == 0 for nbytes in self._row_bytes.values()) else 1

    def row_addresses(self, row: int) -> dict[str, int]:
        """Where one row of the cache lies, past and present, as a cache of one row. A row is so many bytes, whatever the batch."""
        aliased = [(past, past) for past in self._cache_extents] + list(self.spec.aliased.items())
        return {name: self._address_of[past] + row * self._row_bytes[past] for name, past in aliased}

    def copy_row(self, source: int, target: int) -> None:
        """Give a row of the cache what another has."""
        if source != target:
            for name, nbytes in self._row_bytes.items():
                base = self._address_of[name]
                self._device.copy(base + target * nbytes, base + source * nbytes, nbytes)

    def clear_row(self, row: int) -> None:
        """Fill a row of the cache with zeros."""
        for name, nbytes in self._row_bytes.items():
            self._device.clear(self._address_of[name] + row * nbytes, nbytes)

    def _forget_capture(self) -> None:
        if self._captured:
            self._device.forget(self._captured)
        self._captured, self._ran_as_it_is = 0, False

    def close(self) -> None:
        """Free its buffers, and let the engine go."""
        self._forget_capture()
        for address in self._buffers.values():
            self._device.free(address)
        self._buffers.clear()
        self._context = self._engine = None

    def _created_context(self) -> Any:
        with self._library.log.collecting() as log:
            context = self._engine.create_execution_context()
            if context is None:
                raise messages.error_from_complaints(
                    messages.complaints_of_log(log),
                    subject=f"graph {self.spec.name}",
                    library=self._library.title,
                    doing="prepare the engine",
                )
        return context

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        index = choose_profile(self.spec, self._profiles, shapes)
        if index != self._profile:
            switched = self._context.set_optimization_profile_async(index, self._device.stream)
            self._must(switched, f"profile {self._profiles[index].name}", "be selected")
            self._profile = index
            self._addresses_set = False
        for (
            name,
            shape,
        ) in shapes.items():  # all of them: a context forgets its shapes when the profile changes
            self._must(
                self._context.set_input_shape(name, shape), f"input {name}", f"take the shape {list(shape)}"
            )
        self._shapes = shapes
        self._forget_capture()

    def _must(self, done: Any, what: str, doing: str) -> None:
        if not done:
            raise SessionError(
                f"{self._library.title} did not let it {doing}",
                subject=f"graph {self.spec.name}, {what}",
                hint="the engine and the manifest do not belong together: build the bundle again",
            )
