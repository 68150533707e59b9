"""A bundle in TensorRT or TensorRT-RTX: engines, one stream, one cache, nothing allocated per token.

Position ids and write index are two inputs of the decoder and are copied to the device for every call, as they are. The
cache is one buffer per layer and part, bound as past and as present. Prompts and single tokens run under different
optimisation profiles of the same engine (`engine/profiles.py`), or, where the decoder drops tokens, in two engines over one
cache.

Embeddings stay on the device: `encode` and `splice` hand out `DeviceTensor`s, whose memory goes back to the session's pool
when they are dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import EngineTarget
from gap_export.bundle.spec import DType, GraphName, GraphSpec
from gap_export.engine import messages
from gap_export.engine.buffers import empty_wire, from_wire, plan_buffers, size_of, to_wire
from gap_export.engine.device import Device
from gap_export.engine.inspect import check_engine, open_engine
from gap_export.engine.library import Library, load_library
from gap_export.engine.profiles import choose_profile, profiles_from_spec
from gap_export.errors import SessionError
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.session import (
    KEPT_COUNTS,
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    check_within_bound,
    padded_together,
    splice_inputs,
    vision_inputs,
)

# Tensors that go from one graph to the next without touching the host.
_TRAVELLING: dict[GraphName, tuple[str, ...]] = {
    "vision": ("visual_embeds",),
    "splice": ("visual_embeds", "inputs_embeds"),
    "embed": ("inputs_embeds",),
    "decoder": ("inputs_embeds",),
    "prefill": ("inputs_embeds",),
    "decode": ("inputs_embeds",),
}


class _Pool:
    """Device memory for tensors that come and go with prompts; what was given back is handed out again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: dict[int, list[int]] = {}
        self.is_open = True

    def take(self, nbytes: int) -> int:
        idle = self._idle.get(nbytes)
        return idle.pop() if idle else self._device.allocate(nbytes)

    def give_back(self, address: int, nbytes: int) -> None:
        if self.is_open:
            self._idle.setdefault(nbytes, []).append(address)
        else:
            self._device.free(address)

    def close(self) -> None:
        self.is_open = False
        for addresses in self._idle.values():
            for address in addresses:
                self._device.free(address)
        self._idle.clear()


_TOKENS = "decoder, one token"
"""A second context of the decoder, where single tokens have their own."""


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
        self, shape: Sequence[int], dtype: DType, device: Device, pool: _Pool, *, nbytes: int | None = None
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


class _LoadedGraph:
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
        cache_of: _LoadedGraph | None = None,
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
            travelling: addresses of tensors that bring their own memory.
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

    def copy_first_row(self, rows: int) -> None:
        """Give every row of the cache what the first has. A row is so many bytes, whatever the batch."""
        for name, extents in self._cache_extents.items():
            nbytes = size_of(self._dtypes[name], extents)
            for row in range(1, rows):
                self._device.copy(self._address_of[name] + row * nbytes, self._address_of[name], nbytes)

    def _forget_capture(self) -> None:
        if self._captured:
            self._device.forget(self._captured)
        self._captured, self._ran_as_it_is = 0, False

    def close(self) -> None:
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


class TensorRTSession(Lifetime):
    """A bundle's engines in TensorRT or TensorRT-RTX.

    Args:
        bundle: opened and verified.
        target: whose engines to run: `tensorrt-rtx` or `tensorrt`.
        cuda_graphs: launch the decoder's single-token call as one CUDA graph. It then has a context of its own, since whatever
            changes a context after a capture invalidates that; activations take as much memory again.

    Raises:
        SessionError: the bundle holds no engines for this target.
        EngineError: an engine is damaged, of another library version, or of another graph.
        MissingRequirementError: the library, the CUDA runtime, a GPU, or memory on it is missing.
    """

    def __init__(
        self, bundle: Bundle, *, target: EngineTarget = "tensorrt-rtx", cuda_graphs: bool = False
    ) -> None:
        manifest = bundle.manifest
        engines = manifest.engines.get(target, {})
        names: tuple[GraphName, ...] = tuple(graph.spec.name for graph in manifest.graphs.values())
        absent = [name for name in names if name not in engines]
        if absent:
            raise SessionError(
                f"holds no {target} engine for {', '.join(absent)}",
                subject=str(bundle.folder),
                hint=f"build it with --target {target}",
            )
        self.backend: str = target
        self.capacities = manifest.cache_layout.capacities
        # A decoder that drops tokens is two graphs over one cache.
        self._prompt_graph, self._token_graph = (
            ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
        )
        self._pruning, self._reads_text = manifest.pruning, manifest.text_tower is not None
        library = load_library(target)
        paths = {name: bundle.folder / engines[name].file for name in names}
        for name in names:
            graph_sha256 = manifest.files[manifest.graphs[name].file].sha256
            check_engine(paths[name], engines[name], graph_sha256=graph_sha256, library=library)
        self._device = Device()
        self._pool = _Pool(self._device)
        self._graphs: dict[str, _LoadedGraph] = {}
        self._token_embeds: DeviceTensor | None = None
        try:
            for name in names:
                opened = open_engine(paths[name], library)
                spec = manifest.graphs[name].spec
                cache_of = self._graphs["prefill"] if name == "decode" else None
                self._graphs[name] = _LoadedGraph(
                    spec, opened, library, self._device, cache_of, captures=cuda_graphs and name == "decode"
                )
                if name == "decoder" and cuda_graphs:
                    self._token_graph = _TOKENS
                    self._graphs[_TOKENS] = _LoadedGraph(
                        spec, opened, library, self._device, self._graphs[name], captures=True
                    )
        except BaseException:
            self.close()
            raise

    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """Vision tower, pruner and projector; the embeddings are a `DeviceTensor`, padded to the bound where images differ."""
        vision, pruning = self._graph("vision"), self._pruning
        extra = vision_inputs(
            pruning, reads_text=self._reads_text, text_ids_BL=text_ids_BL, keep_count=keep_count
        )
        vision.prepare({**pixels, **extra})
        embeds = self._tensor(vision, "visual_embeds")
        vision.run({"visual_embeds": embeds.address})
        counts_B = vision.download(KEPT_COUNTS) if pruning.keep_mode == "adaptive" else None
        if counts_B is not None:
            check_within_bound(counts_B, pruning)
        return VisualTokens(embeds=embeds, kept_indices=vision.download("kept_indices"), kept_counts=counts_B)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]."""
        self._check_open()
        return padded_together([[np.asarray(part) for part in row] for row in rows], longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder; the embeddings are a `DeviceTensor`."""
        splice = self._graph("splice")
        seen = self._on_device(splice, "visual_embeds", visual.embeds)
        inputs = splice_inputs(splice.spec, input_ids_BT, visual)
        splice.prepare({**inputs, "visual_embeds": seen})
        embeds = self._tensor(splice, "inputs_embeds")
        splice.run({"visual_embeds": seen.address, "inputs_embeds": embeds.address})
        counters = [tensor.name for tensor in splice.spec.outputs if tensor.name != "inputs_embeds"]
        placement = placement_from_splice({name: splice.download(name) for name in counters})
        return Spliced(embeds=embeds, placement=placement)

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on.

        Raises:
            SessionError: the prompt is longer than the engine or the cache allows, or the batch larger.
        """
        graph = self._graph(self._prompt_graph)
        logits = self._decode(graph, embeds, placement, placement.slots_of_stages)
        kept = [tensor.name for tensor in graph.spec.outputs if tensor.name.startswith("kept_indices.")]
        return Prefilled(logits, tuple(graph.download(name) for name in kept))

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        self._graph(self._prompt_graph).copy_first_row(rows)

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token.

        Raises:
            SessionError: the cache is full.
        """
        embed = self._graph("embed")
        embed.prepare({"input_ids": np.maximum(token_ids_BT, 0)})
        embeds = self._tensor(embed, "inputs_embeds")
        embed.run({"inputs_embeds": embeds.address})
        written = (placement.write_index + placement.last_index + 1,)
        return self._decode(self._graph(self._prompt_graph), embeds, placement, written)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V].

        Raises:
            SessionError: the cache is full.
        """
        embed = self._graph("embed")
        embed.prepare({"input_ids": token_ids_B[:, None]})
        if self._token_embeds is None or self._token_embeds.shape[0] != len(token_ids_B):
            self._token_embeds = None  # its memory first goes back, so that the new one can have it
            self._token_embeds = self._tensor(embed, "inputs_embeds")
        embed.run({"inputs_embeds": self._token_embeds.address})
        written = tuple(slot + 1 for slot in (placement.write_index, *placement.stage_write_index))
        return self._decode(self._graph(self._token_graph), self._token_embeds, placement, written)

    def _free(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._token_embeds = None
        self._pool.close()
        self._device.close()

    def _graph(self, name: str) -> _LoadedGraph:
        self._check_open()
        return self._graphs[name]

    def _decode(
        self, graph: _LoadedGraph, embeds: Buffer, placement: Placement, written: tuple[Ids, ...]
    ) -> NDArray[np.float32]:
        """One call of the decoder, after which `written` slots [B] of every stage are full."""
        for slots, capacity in zip(written, self.capacities, strict=True):
            if slots.max() > capacity:
                raise SessionError(
                    f"has {capacity} slots, this call needs {slots.max()}",
                    subject="the cache",
                    hint="ask for fewer new tokens, or build with a larger capacity",
                )
        fed = self._on_device(graph, "inputs_embeds", embeds)
        taken = {tensor.name for tensor in graph.spec.inputs}
        numbers = {name: value for name, value in placement.decoder_inputs().items() if name in taken}
        graph.prepare({"inputs_embeds": fed, **numbers})
        graph.run({"inputs_embeds": fed.address})
        return graph.download("logits")

    def _tensor(self, graph: _LoadedGraph, name: str) -> DeviceTensor:
        """An output's memory, always of the largest size: prompts of every length can then reuse it."""
        shape, dtype = graph.output_shape(name), graph.dtype(name)
        return DeviceTensor(shape, dtype, self._device, self._pool, nbytes=graph.largest(name))

    def _on_device(self, graph: _LoadedGraph, name: str, value: Buffer) -> DeviceTensor:
        """A tensor of this session as it is; an array, say from another runtime, copied to the device."""
        if isinstance(value, DeviceTensor):
            return value
        array = to_wire(np.asarray(value), graph.dtype(name))
        tensor = DeviceTensor(array.shape, graph.dtype(name), self._device, self._pool)
        self._device.upload(tensor.address, array)
        return tensor


def open_rtx(bundle: Bundle, *, threads: int = 0) -> TensorRTSession:
    """Load the engines of TensorRT-RTX; see `TensorRTSession`. Nothing runs on threads of the CPU."""
    return TensorRTSession(bundle, target="tensorrt-rtx")


def open_tensorrt(bundle: Bundle, *, threads: int = 0) -> TensorRTSession:
    """Load the engines of TensorRT; see `TensorRTSession`. Nothing runs on threads of the CPU."""
    return TensorRTSession(bundle, target="tensorrt")
