"""A bundle in ONNX Runtime on the CPU: bound buffers, one cache for past and present, nothing copied per token."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.spec import TensorSpec
from gap_export.errors import SessionError, first_line
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort_graph import CPU, check_kernels, load_graph
from gap_export.runtime.session import (
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    as_many_as_kept,
    padded_together,
    splice_inputs,
    vision_inputs,
)

_LAYOUTS_KEPT = 8
"""Bound calls are small, and requests of similar length share one."""


@dataclass(frozen=True)
class Layout:
    """Rows of the cache, and slots of every stage."""

    rows: int
    capacities: tuple[int, ...]


@dataclass
class _DecodeBuffers:
    """What a single-token call reads and writes; made once per batch size and prompt.

    Attributes:
        token_ids: [B, 1] int64.
        placed: ids and slots, by the names of the graph's inputs.
        logits: [B, V] float32, overwritten by every call.
    """

    token_ids: Ids
    placed: dict[str, Ids]
    logits: NDArray[np.float32]
    embed: Any
    decoder: Any


class OnnxRuntimeSession(Lifetime):
    """A bundle's graphs in ONNX Runtime.

    Args:
        bundle: opened and verified.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        only: names of the graphs that are loaded; all by default.
        providers: of kernels.

    Raises:
        SessionError: a graph does not load, is another than the manifest says, or its precision has no CPU kernels.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        only: Collection[str] | None = None,
        providers: Sequence[str] = CPU,
    ) -> None:
        manifest = bundle.manifest
        check_kernels(bundle)
        self.capacities = manifest.cache_layout.capacities
        self._bundle = bundle
        self._model = manifest.spec
        self._dtype = np.dtype(_element_type(bundle))
        # A decoder that drops tokens is two graphs over one cache.
        self._prompt_graph, self._token_graph = (
            ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
        )
        self._sessions = {
            name: load_graph(bundle, name, threads, self._model_of, providers)
            for name in only or manifest.graphs
        }
        self._memory: dict[
            str, NDArray[Any]
        ] = {}  # flat, of the largest cache so far; smaller ones use its beginning
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layout = Layout(0, ())
        self._decodes: dict[tuple[Layout, int], _DecodeBuffers] = {}

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
        return as_many_as_kept(embeds.numpy(), kept.numpy(), counts[0].numpy(), manifest.pruning)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]."""
        self._check_open()
        return padded_together([[np.asarray(part.numpy()) for part in row] for row in rows], longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder."""
        self._check_open()
        spec = self._bundle.manifest.graphs["splice"].spec
        embeds, *counters = self._run("splice", splice_inputs(spec, input_ids_BT, visual))
        names = [tensor.name for tensor in spec.outputs[1:]]
        placement = placement_from_splice(
            {name: counter.numpy() for name, counter in zip(names, counters, strict=True)}
        )
        return Spliced(embeds=embeds, placement=placement)

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on."""
        return self._prefill(self.cache_for(placement, reserve), embeds, placement)

    def cache_for(self, placement: Placement, reserve: int | None = None) -> dict[str, NDArray[Any]]:
        """The cache of prompts that another runtime reads; `step` and `extend` continue from what is written into it.

        Args:
            placement: of the prompts.
            reserve: as of `prefill`.

        Returns:
            [B, G, C, D] of every past, by the names of the graph's inputs; the memory is the session's own.
        """
        self._check_open()
        rows: int = placement.position_ids.shape[-2]
        slots = self._bundle.manifest.cache_layout.slots_for(self._slots_needed(placement, reserve))
        self._lay_out(Layout(rows, slots))
        return self._views()

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        self._check_open()
        self._lay_out(Layout(rows, self._layout.capacities))
        for cache in self._views().values():
            cache[1:] = cache[0]

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token."""
        self._check_open()
        return self._extend(self._views(), token_ids_BT, placement)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; the array returned is overwritten by the next call."""
        self._check_open()
        rows = len(token_ids_B)
        decode = self._decodes.get((self._layout, rows))
        if decode is None:
            if len(self._decodes) > _LAYOUTS_KEPT:
                self._decodes.clear()
            decode = self._decodes[self._layout, rows] = self._bind_decode(rows)
        decode.token_ids[:, 0] = token_ids_B
        numbers = placement.decoder_inputs()
        for name, bound in decode.placed.items():
            bound[:] = numbers[name]
        self._execute("embed", decode.embed)
        self._execute(self._token_graph, decode.decoder)
        return decode.logits

    # Rows that come and go

    def open_rows(self, rows: int, slots: int | None = None) -> None:
        """Lay out a cache of so many rows; see `runtime.rows.RowSession`."""
        self._check_open()
        layout = self._bundle.manifest.cache_layout
        if slots is not None and not 1 <= slots <= self.capacities[0]:
            raise SessionError(
                f"are not from 1 to {self.capacities[0]}, which this bundle was built for",
                subject=f"{slots} slots of a row",
                hint="open rows with fewer, or build with a larger --capacity",
            )
        needed = None if slots is None else [max(1, own) for own in layout.lengths_of(slots)]
        self._lay_out(Layout(rows, layout.slots_for(needed)))
        for cache in self._views().values():
            cache[...] = 0

    def prefill_row(self, row: int, embeds: Buffer, placement: Placement) -> Prefilled:
        """Fill a row from slot 0 on, with a prompt."""
        return self._prefill(self.row_for(row, placement), embeds, placement)

    def row_for(self, row: int, placement: Placement) -> dict[str, NDArray[Any]]:
        """A row for a prompt that another runtime reads; as `cache_for`."""
        self._check_open()
        self._check_fits(row, self._slots_needed(placement, 0) or [])
        return self._views(self._row(row))

    def extend_row(self, row: int, token_ids_1T: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed several tokens after what is in a row: logits [1, V]."""
        self._check_open()
        self._check_fits(row, [int(placement.write_index[0]) + token_ids_1T.shape[1]])
        return self._extend(self._views(self._row(row)), token_ids_1T, placement)

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds."""
        self._check_open()
        there, here = self._row(source), self._row(target)
        for cache in self._views().values():
            cache[here] = cache[there]

    def clear_row(self, row: int) -> None:
        """Forget what a row holds."""
        self._check_open()
        for cache in self._views(self._row(row)).values():
            cache[...] = 0

    def _prefill(self, cache: dict[str, NDArray[Any]], embeds: Buffer, placement: Placement) -> Prefilled:
        rows = placement.position_ids.shape[-2]
        logits = np.empty((rows, self._model.vocabulary), np.float32)
        kept = {
            tensor.name: np.empty((rows, *tensor.extents("maximum")[1:]), np.int64)
            for tensor in self._bundle.manifest.graphs[self._prompt_graph].spec.outputs
            if tensor.name.startswith("kept_indices.")
        }
        outputs = {"logits": logits, **kept}
        binding = self._decoder_binding(
            self._prompt_graph, cache, embeds, placement.decoder_inputs(), outputs
        )
        self._execute(self._prompt_graph, binding)
        return Prefilled(logits, tuple(kept.values()))

    def _extend(
        self, cache: dict[str, NDArray[Any]], token_ids_BT: Ids, placement: Placement
    ) -> NDArray[np.float32]:
        (embeds,) = self._run("embed", {"input_ids": np.maximum(token_ids_BT, 0)})
        logits = np.empty((len(token_ids_BT), self._model.vocabulary), np.float32)
        binding = self._decoder_binding(
            self._prompt_graph, cache, embeds, placement.decoder_inputs(), {"logits": logits}
        )
        self._execute(self._prompt_graph, binding)
        return logits

    def _check_fits(self, row: int, needed: Sequence[int]) -> None:
        for slots, there in zip(needed, self._layout.capacities, strict=False):
            if slots > there:
                raise SessionError(
                    f"has {there} slots, and {slots} are needed",
                    subject=f"row {row} of the cache",
                    hint="open rows with more slots",
                )

    def _free(self) -> None:
        self._layout = Layout(0, ())
        for held in (self._decodes, self._memory, self._sessions):
            held.clear()

    def _model_of(self, name: str, options: ort.SessionOptions) -> str | bytes:
        """Path or content of a graph; content needs options that say where its weights lie."""
        return str(self._bundle.graph_path(name))

    def _run(self, name: str, inputs: dict[str, Any]) -> list[Any]:
        """Run a graph once, outputs allocated by the runtime."""
        binding = self._sessions[name].io_binding()
        for key, value in inputs.items():
            binding.bind_ortvalue_input(key, _ort_value(value))
        for output in self._bundle.manifest.graphs[name].spec.outputs:
            binding.bind_output(output.name, "cpu")
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
        written = self._bundle.manifest.cache_layout.lengths_of(placement.position_ids.shape[-1])
        return [
            max(int(slots.max()), own) + reserve
            for slots, own in zip(placement.slots_of_stages, written, strict=True)
        ]

    def _lay_out(self, layout: Layout) -> None:
        """Give the cache so many rows of so many slots; with as many slots as before, what lies in the first row stays."""
        if layout == self._layout:
            return
        self._shapes = self._shapes_of(layout)
        if not self._memory or any(
            math.prod(shape) > self._memory[name].size for name, shape in self._shapes.items()
        ):
            self._memory = self._allocated()
            self._decodes.clear()
        self._layout = layout

    def _row(self, row: int) -> slice:
        if not 0 <= row < self._layout.rows:
            raise SessionError(
                f"is not there: the cache has {self._layout.rows}",
                subject=f"row {row}",
                hint="open as many rows as there are requests",
            )
        return slice(row, row + 1)

    def _views(self, rows: slice | None = None) -> dict[str, NDArray[Any]]:
        """Every past, or some rows of it, in the memory that it shares with those of other layouts."""
        return {
            name: self._memory[name][: math.prod(shape)].reshape(shape)[rows or slice(None)]
            for name, shape in self._shapes.items()
        }

    def _shapes_of(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Of every past."""
        manifest = self._bundle.manifest
        spec = manifest.graphs[self._token_graph].spec
        cached = set(spec.aliased.values())
        extents = {
            "batch": layout.rows,
            **dict(zip(manifest.cache_layout.dims, layout.capacities, strict=False)),
        }
        return {
            tensor.name: tuple(dim if isinstance(dim, int) else extents[dim.name] for dim in tensor.shape)
            for tensor in spec.inputs
            if tensor.name in cached
        }

    def _allocated(self) -> dict[str, NDArray[Any]]:
        """Zeros, because what lies in slots not yet written is multiplied with zero, and must be a number."""
        memory = {
            name: np.zeros(max(math.prod(shape), self._memory[name].size if self._memory else 0), self._dtype)
            for name, shape in self._shapes.items()
        }
        for name, array in self._memory.items():
            memory[name][: array.size] = array
        return memory

    def _decoder_binding(
        self,
        graph: str,
        cache: dict[str, NDArray[Any]],
        embeds: Any,
        numbers: dict[str, Ids],
        outputs: dict[str, NDArray[Any]],
    ) -> Any:
        """Past and present of every layer are one buffer: the cache is updated in place."""
        binding, spec = self._sessions[graph].io_binding(), self._bundle.manifest.graphs[graph].spec
        binding.bind_ortvalue_input("inputs_embeds", _ort_value(embeds))
        for tensor in spec.inputs:
            if tensor.name in numbers:
                binding.bind_ortvalue_input(tensor.name, _ort_value(numbers[tensor.name]))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, _ort_value(array))
        for present, past in spec.aliased.items():
            shared = _ort_value(cache[past])
            binding.bind_ortvalue_input(past, shared)
            binding.bind_ortvalue_output(present, shared)
        return binding

    def _bind_decode(self, batch: int) -> _DecodeBuffers:
        graph = self._token_graph
        token_ids, logits = (
            np.zeros((batch, 1), np.int64),
            np.empty((batch, self._model.vocabulary), np.float32),
        )
        placed = {
            tensor.name: np.zeros(_extents_of_one_token(tensor, batch), np.int64)
            for tensor in self._bundle.manifest.graphs[graph].spec.inputs
            if tensor.dtype == "int64"
        }
        embeds = _ort_value(np.zeros((batch, 1, self._model.embedding_width), self._dtype))
        embed = self._sessions["embed"].io_binding()
        embed.bind_ortvalue_input("input_ids", _ort_value(token_ids))
        embed.bind_ortvalue_output("inputs_embeds", embeds)
        cache = self._views(slice(0, batch))
        decoder = self._decoder_binding(graph, cache, embeds, placed, {"logits": logits})
        return _DecodeBuffers(token_ids, placed, logits, embed, decoder)


def _extents_of_one_token(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """Shape of an input of the decoder in a call with one token per row."""
    extents = {"batch": batch, "sequence": 1}
    return tuple(dim if isinstance(dim, int) else extents[dim.name] for dim in tensor.shape)


def _element_type(bundle: Bundle) -> str:
    return bundle.manifest.graphs["splice"].spec.outputs[0].dtype


def _ort_value(value: Any) -> Any:
    """An OrtValue over the same memory; NumPy arrays on the CPU are not copied."""
    if isinstance(value, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    return value
