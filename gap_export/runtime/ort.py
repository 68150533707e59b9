"""A bundle in ONNX Runtime: bound buffers, one cache for past and present. Per token nothing is copied on the host, and between the host and a GPU
only ids in and logits out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.spec import DType, GraphName, TensorSpec
from gap_export.errors import SessionError, first_line
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort_cache import Cache, Layout
from gap_export.runtime.ort_graph import check_kernels, load_graph
from gap_export.runtime.ort_memory import CudaMemory, HostMemory, Memory, Region, ort_value
from gap_export.runtime.ort_providers import providers_on
from gap_export.runtime.providers import CPU, Provider
from gap_export.runtime.session import (
    KEPT_SLOTS,
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    as_many_as_kept,
    check_within_bound,
    kept_of_stages,
    splice_inputs,
    vision_inputs,
)

_LAYOUTS_KEPT = 8
"""Bound calls are small, and requests of similar length share one."""


@dataclass
class _DecodeBuffers:
    """What a single-token call reads and writes, in the session's memory; made once per batch size and prompt.

    Attributes:
        token_ids: [B, 1] int64.
        placed: ids and slots, by the names of the graph's inputs.
        embeds: [B, 1, H].
        logits: [B, V] float32, overwritten by every call.
    """

    token_ids: Region
    placed: dict[str, Region]
    embeds: Region
    logits: Region
    embed: Any
    decoder: Any


class OnnxRuntimeSession(Lifetime):
    """A bundle's graphs in ONNX Runtime.

    Args:
        bundle: opened and verified.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        only: names of the graphs that are loaded; all by default.
        device: cpu, cuda, gpu or npu, or one of several (`cuda:1`). With cuda, cache and embeddings lie on that GPU.
        providers: what computes; by default the CPU, with cuda its CUDA provider.
        backend: what reports call it.

    Raises:
        SessionError: a graph does not load, is another than the manifest says, its precision has no CPU kernels, or nodes of the decoder were left to
            the CPU by a provider.
        MissingRequirementError: a GPU, its libraries, a plug-in or memory is missing.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        only: Collection[str] | None = None,
        device: str = "cpu",
        providers: Sequence[Provider] = (),
        backend: str = "onnxruntime",
    ) -> None:
        manifest = bundle.manifest
        computing = providers_on(device, providers)
        if all(each.name == CPU for each in computing):
            check_kernels(bundle)
        self.backend = backend
        self.capacities = manifest.cache_layout.capacities
        self._bundle = bundle
        self._model = manifest.spec
        # A decoder that drops tokens is two graphs over one cache.
        self._prompt_graph, self._token_graph = (
            ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
        )
        kind, _, number = device.partition(":")
        self._memory: Memory = CudaMemory(int(number or 0)) if kind == "cuda" else HostMemory()
        self._sessions = {
            name: load_graph(bundle, name, threads, self._model_of, device, computing)
            for name in only or manifest.graphs
        }
        self._dtypes: dict[str, dict[str, DType]] = {
            name: {tensor.name: tensor.dtype for tensor in (*graph.spec.inputs, *graph.spec.outputs)}
            for name, graph in manifest.graphs.items()
        }
        self._cache = Cache(manifest.graphs[self._token_graph].spec, manifest.cache_layout, self._memory)
        self._decodes: dict[tuple[Layout, int], _DecodeBuffers] = {}

    most_rows: int | None = None

    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """Vision tower, pruner and projector."""
        self._check_open()
        manifest = self._bundle.manifest
        extra = vision_inputs(
            manifest.pruning,
            reads_text=manifest.text_tower is not None,
            text_ids_BL=text_ids_BL,
            keep_count=keep_count,
        )
        embeds, kept, *counts = self._run("vision", {**pixels, **extra})
        if not counts:
            return VisualTokens(embeds=embeds, kept_indices=kept.numpy())
        kept_BK, counts_B = kept.numpy(), counts[0].numpy()
        if self._memory.is_host:
            whole = self._memory.of(embeds, self._dtypes["vision"]["visual_embeds"])
            return as_many_as_kept(whole, kept_BK, counts_B, manifest.pruning)
        check_within_bound(counts_B, kept_BK.shape[1], manifest.pruning)
        if (
            manifest.pruning.keep_mode == "bounded"
        ):  # one image; what is behind its tokens is left out where it lies
            region = self._memory.of(embeds, self._dtypes["vision"]["visual_embeds"])
            count = int(counts_B[0])
            embeds = self._memory.part(region, (1, count, region.shape[-1]), 0)
            kept_BK = kept_BK[:, :count]
        # (All others stay on the device with their padding.)
        return VisualTokens(embeds=embeds, kept_indices=kept_BK, kept_counts=counts_B)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]."""
        self._check_open()
        memory, dtype = self._memory, self._dtypes["splice"]["visual_embeds"]
        width = self._model.embedding_width
        whole = memory.zeros((len(rows), longest, width), dtype)
        for row, parts in enumerate(rows):
            written = row * longest * width
            for part in parts:
                region = memory.of(part, dtype)
                memory.copy(memory.part(whole, region.shape, written), region)
                written += int(np.prod(region.shape))
        return whole

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder."""
        self._check_open()
        spec = self._bundle.manifest.graphs["splice"].spec
        embeds, *counters = self._run("splice", splice_inputs(spec, input_ids_BT, visual))
        names = [tensor.name for tensor in spec.outputs[1:]]
        placement = placement_from_splice(
            {name: counter.numpy() for name, counter in zip(names, counters, strict=True)},
            visual.stage_counts,
        )
        return Spliced(embeds=embeds, placement=placement)

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on."""
        return self._prefill(self.cache_for(placement, reserve), embeds, placement)

    def cache_for(self, placement: Placement, reserve: int | None = None) -> dict[str, Region]:
        """The cache of prompts that another runtime reads; `step` and `extend` continue from what is written into it.

        Args:
            placement: of the prompts.
            reserve: as of `prefill`.

        Returns:
            [B, G, C, D] of every past, by the names of the graph's inputs; the memory is the session's own.
        """
        self._check_open()
        self.caches_begun += 1
        rows: int = placement.position_ids.shape[-2]
        slots = self._bundle.manifest.cache_layout.slots_for(self._slots_needed(placement, reserve))
        self._lay_out(Layout(rows, slots))
        return self._cache.views()

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        self._check_open()
        self._lay_out(Layout(rows, self._cache.layout.capacities))
        for row in range(1, rows):
            self._cache.copy_row(0, row)

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token."""
        self._check_open()
        return self._extend(self._cache.views(), token_ids_BT, placement)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; the array returned is overwritten by the next call."""
        self._check_open()
        rows, layout, memory = len(token_ids_B), self._cache.layout, self._memory
        decode = self._decodes.get((layout, rows))
        if decode is None:
            if len(self._decodes) > max(_LAYOUTS_KEPT, layout.rows):
                self._decodes.clear()
            decode = self._decodes[layout, rows] = self._bind_decode(rows)
        memory.write(decode.token_ids, token_ids_B[:, None])
        numbers = placement.decoder_inputs()
        for name, bound in decode.placed.items():
            memory.write(bound, numbers[name])
        self._execute("embed", decode.embed)
        self._execute(self._token_graph, decode.decoder)
        return memory.read(decode.logits)

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies."""
        self._check_open()
        self.caches_begun += 1
        self._lay_out(Layout(1, self._bundle.manifest.cache_layout.slots_for(slots)))
        self._cache.clear()

    def grow(self, slots: Sequence[int]) -> None:
        """Give every row of the cache at least so many slots; what lies in them stays."""
        self._check_open()
        if self._cache.grow(self._bundle.manifest.cache_layout.slots_for(slots)):
            self._decodes.clear()

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings [1, T, H] of text."""
        self._check_open()
        (embeds,) = self._run("embed", {"input_ids": np.ascontiguousarray(token_ids_1T)})
        return embeds

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in a cache of one row: logits [1, V]."""
        self._check_open()
        return self._call_decoder(self._cache.row(0), embeds, placement)[0]

    def open_rows(self, rows: int, slots: int | None = None) -> None:
        """Lay out a cache of so many rows; see `runtime.rows.RowSession`."""
        self._check_open()
        self.caches_begun += 1
        layout = self._bundle.manifest.cache_layout
        if slots is not None and not 1 <= slots <= self.capacities[0]:
            raise SessionError(
                f"are not from 1 to {self.capacities[0]}, which this bundle was built for",
                subject=f"{slots} slots of a row",
                hint="open rows with fewer, or build with a larger --capacity",
            )
        needed = None if slots is None else [max(1, own) for own in layout.lengths_of(slots)]
        self._lay_out(Layout(rows, layout.slots_for(needed)))
        self._cache.clear()

    def prefill_row(self, row: int, embeds: Buffer, placement: Placement) -> Prefilled:
        """Fill a row from slot 0 on, with a prompt."""
        return self._prefill(self.row_for(row, placement), embeds, placement)

    def row_for(self, row: int, placement: Placement) -> dict[str, Region]:
        """A row for a prompt that another runtime reads; as `cache_for`."""
        self._check_open()
        self._cache.check_fits(row, self._slots_needed(placement, 0) or [])
        return self._cache.row(row)

    def append_row(self, row: int, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what is in a row: logits [1, V]."""
        self._check_open()
        self._cache.check_fits(row, [int(placement.write_index[0]) + placement.position_ids.shape[-1]])
        return self._call_decoder(self._cache.row(row), embeds, placement)[0]

    def extend_row(self, row: int, token_ids_1T: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed several tokens after what is in a row: logits [1, V]."""
        self._check_open()
        self._cache.check_fits(row, [int(placement.write_index[0]) + token_ids_1T.shape[1]])
        return self._extend(self._cache.row(row), token_ids_1T, placement)

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds."""
        self._check_open()
        self._cache.copy_row(source, target)

    def clear_row(self, row: int) -> None:
        """Forget what a row holds."""
        self._check_open()
        self._cache.clear(row)

    def _prefill(self, cache: dict[str, Region], embeds: Buffer, placement: Placement) -> Prefilled:
        logits, kept = self._call_decoder(cache, embeds, placement)
        return Prefilled(logits, kept_of_stages(kept, placement))

    def _extend(
        self, cache: dict[str, Region], token_ids_BT: Ids, placement: Placement
    ) -> NDArray[np.float32]:
        (embeds,) = self._run("embed", {"input_ids": np.maximum(token_ids_BT, 0)})
        return self._call_decoder(cache, embeds, placement)[0]

    def _call_decoder(
        self, cache: dict[str, Region], embeds: Buffer, placement: Placement
    ) -> tuple[NDArray[np.float32], list[Ids]]:
        """Logits [B, V] of each row's last token, after several; and the slots [B, T] that are left in every later stage."""
        memory, graph, rows = self._memory, self._prompt_graph, placement.position_ids.shape[-2]
        outputs = {"logits": memory.zeros((rows, self._model.vocabulary), "float32")}
        if graph == "prefill":
            outputs |= {
                f"{KEPT_SLOTS}{stage}": memory.zeros((rows, length), "int64")
                for stage, length in enumerate(self._lengths(placement)[1:], 1)
            }
        binding = self._decoder_binding(graph, cache, embeds, placement.decoder_inputs(), outputs)
        self._execute(graph, binding)
        logits, *slots = (memory.read(region) for region in outputs.values())
        return logits, slots

    def _free(self) -> None:
        self._decodes.clear()
        self._cache.release()
        self._sessions.clear()
        self._memory.close()

    def _model_of(self, name: str, options: ort.SessionOptions) -> str | bytes:
        """Path or content of a graph; content needs options that say where its weights lie."""
        return str(self._bundle.graph_path(name))

    def _run(self, name: GraphName, inputs: dict[str, Any]) -> list[Any]:
        """Run a graph once, outputs allocated by the runtime: floats where the memory is, ids on the host."""
        binding, dtypes = self._sessions[name].io_binding(), self._dtypes[name]
        for key, value in inputs.items():
            self._bind_input(binding, key, value, dtypes[key])
        for output in self._bundle.manifest.graphs[name].spec.outputs:
            stays = output.dtype not in ("int64", "bool")
            where = (self._memory.device, self._memory.number) if stays else ("cpu", 0)
            binding.bind_output(output.name, *where)
        self._execute(name, binding)
        return list(binding.get_outputs())

    def _execute(self, name: str, binding: Any) -> None:
        try:
            self._sessions[name].run_with_iobinding(binding)
        except Exception as error:
            raise SessionError(
                f"failed in ONNX Runtime: {first_line(error)}",
                subject=f"graph {name}",
                hint="the inputs do not fit the shapes in the manifest; see `gap-export inspect`",
            ) from error

    def _slots_needed(self, placement: Placement, reserve: int | None) -> list[int] | None:
        """Of every stage: what the prompt writes, padding included, or where its tokens end, and the slots reserved after that."""
        if reserve is None:
            return None
        return [
            max(int(slots.max()), own) + reserve
            for slots, own in zip(placement.slots_of_stages, self._lengths(placement), strict=True)
        ]

    def _lengths(self, placement: Placement) -> list[int]:
        """Tokens of a prompt in every stage, padding included."""
        length = placement.position_ids.shape[-1]
        if placement.stage_counts is not None:
            return [length, *map(int, placement.stage_lengths.max(axis=0))]
        return self._bundle.manifest.cache_layout.lengths_of(length)

    def _lay_out(self, layout: Layout) -> None:
        if self._cache.lay_out(layout):
            self._decodes.clear()

    def _bind_input(self, binding: Any, name: str, value: Any, dtype: DType) -> None:
        """What ONNX Runtime gave, an array of the host, or a region."""
        if isinstance(value, ort.OrtValue):
            binding.bind_ortvalue_input(name, value)
        elif isinstance(value, np.ndarray):
            binding.bind_ortvalue_input(name, ort_value(value, dtype))
        else:
            self._memory.bind(binding, value, dtype, input=name)

    def _decoder_binding(
        self,
        graph: str,
        cache: dict[str, Region],
        embeds: Any,
        numbers: dict[str, Any],
        outputs: dict[str, Region],
    ) -> Any:
        """Past and present of every layer are one buffer: the cache is updated in place."""
        binding, spec = self._sessions[graph].io_binding(), self._bundle.manifest.graphs[graph].spec
        dtypes = self._dtypes[graph]
        self._bind_input(binding, "inputs_embeds", embeds, dtypes["inputs_embeds"])
        for tensor in spec.inputs:
            if tensor.name in numbers:
                self._bind_input(binding, tensor.name, numbers[tensor.name], tensor.dtype)
        for name, region in outputs.items():
            self._memory.bind(binding, region, dtypes[name], output=name)
        for present, past in spec.aliased.items():
            self._memory.bind(binding, cache[past], dtypes[past], input=past, output=present)
        return binding

    def _bind_decode(self, batch: int) -> _DecodeBuffers:
        graph, memory = self._token_graph, self._memory
        token_ids = memory.zeros((batch, 1), "int64")
        logits = memory.zeros((batch, self._model.vocabulary), "float32")
        placed = {
            tensor.name: memory.zeros(_extents_of_one_token(tensor, batch), "int64")
            for tensor in self._bundle.manifest.graphs[graph].spec.inputs
            if tensor.dtype == "int64"
        }
        dtype = self._dtypes["embed"]["inputs_embeds"]
        embeds = memory.zeros((batch, 1, self._model.embedding_width), dtype)
        embed = self._sessions["embed"].io_binding()
        memory.bind(embed, token_ids, "int64", input="input_ids")
        memory.bind(embed, embeds, dtype, output="inputs_embeds")
        cache = self._cache.views(0, batch)
        decoder = self._decoder_binding(graph, cache, embeds, placed, {"logits": logits})
        return _DecodeBuffers(token_ids, placed, embeds, logits, embed, decoder)


def _extents_of_one_token(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """Shape of an input of the decoder in a call with one token per row."""
    extents = {"batch": batch, "sequence": 1}
    return tuple(dim if isinstance(dim, int) else extents[dim.name] for dim in tensor.shape)
