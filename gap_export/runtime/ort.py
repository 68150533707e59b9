"""A bundle in ONNX Runtime on the CPU: bound buffers, one cache for past and present, nothing copied per token."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.interface import interface_fault
from gap_export.bundle.onnx_header import Interface, Tensor
from gap_export.bundle.spec import TensorSpec
from gap_export.errors import GapExportError, SessionError, first_line, in_one_line
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.precision import precision
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.session import (
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

_FATAL = 4
"""ONNX Runtime's level of logging at which it says nothing of what it raises."""

_LAYOUTS_KEPT = 8
"""Bound calls are small, and requests of similar length share one."""

# Fusions that put rotary into attention read only the first position id (see docs/positions.md).
_FORBIDDEN_FUSIONS = ["GroupQueryAttentionFusion"]

_ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
"""What ONNX Runtime calls an element type -> what specs call it."""


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

    Raises:
        SessionError: a graph does not load, is another than the manifest says, or its precision has no CPU kernels.
    """

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int = 0, only: Collection[str] | None = None) -> None:
        manifest = bundle.manifest
        check_kernels(bundle)
        self.capacities = manifest.cache_layout.capacities
        self._bundle = bundle
        self._model = manifest.spec
        self._dtype = np.dtype(_element_type(bundle))
        self._threads = threads
        # A decoder that drops tokens is two graphs over one cache.
        self._prompt_graph, self._token_graph = (
            ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
        )
        self._sessions = {name: self._load(name) for name in only or manifest.graphs}
        self._memory: dict[
            str, NDArray[Any]
        ] = {}  # flat, of the largest cache so far; smaller ones use its beginning
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._cache: dict[str, Any] = {}
        self._layout = Layout(0, ())
        self._decode: _DecodeBuffers | None = None
        self._decodes: dict[Layout, _DecodeBuffers] = {}

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
        counts_B = counts[0].numpy()
        check_within_bound(counts_B, manifest.pruning)
        longest = int(counts_B.max())  # the decoder need not run over padding that no row uses
        return VisualTokens(
            embeds=embeds.numpy()[:, :longest],
            kept_indices=kept.numpy()[:, :longest],
            kept_counts=counts_B,
        )

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
        self._check_open()
        batch = self._lay_out_for(placement, reserve)
        logits = np.empty((batch, self._model.vocabulary), np.float32)
        kept = {
            tensor.name: np.empty((batch, *tensor.extents("maximum")[1:]), np.int64)
            for tensor in self._bundle.manifest.graphs[self._prompt_graph].spec.outputs
            if tensor.name.startswith("kept_indices.")
        }
        binding = self._decoder_binding(
            self._prompt_graph, embeds, placement.decoder_inputs(), {"logits": logits, **kept}
        )
        self._execute(self._prompt_graph, binding)
        return Prefilled(logits, tuple(kept.values()))

    def cache_for(self, placement: Placement, reserve: int | None = None) -> dict[str, NDArray[Any]]:
        """The cache of prompts that another runtime reads; `step` and `extend` go on from what is written into it.

        Args:
            placement: of the prompts.
            reserve: as of `prefill`.

        Returns:
            [B, G, C, D] of every past, by the names of the graph's inputs; the memory is the session's own.
        """
        self._check_open()
        self._lay_out_for(placement, reserve)
        return {name: self._view(name) for name in self._shapes}

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        self._check_open()
        self._lay_out(Layout(rows, self._layout.capacities))
        for name in self._shapes:
            cache = self._view(name)
            cache[1:] = cache[0]

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token."""
        self._check_open()
        (embeds,) = self._run("embed", {"input_ids": np.maximum(token_ids_BT, 0)})
        logits = np.empty((len(token_ids_BT), self._model.vocabulary), np.float32)
        binding = self._decoder_binding(
            self._prompt_graph, embeds, placement.decoder_inputs(), {"logits": logits}
        )
        self._execute(self._prompt_graph, binding)
        return logits

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; the array returned is overwritten by the next call."""
        self._check_open()
        if self._decode is None:
            self._decode = self._bind_decode(self._layout.rows)
            self._decodes[self._layout] = self._decode
        decode = self._decode
        decode.token_ids[:, 0] = token_ids_B
        numbers = placement.decoder_inputs()
        for name, bound in decode.placed.items():
            bound[:] = numbers[name]
        self._execute("embed", decode.embed)
        self._execute(self._token_graph, decode.decoder)
        return decode.logits

    def _free(self) -> None:
        self._decode, self._layout = None, Layout(0, ())
        for held in (self._decodes, self._cache, self._memory, self._sessions):
            held.clear()

    def _load(self, name: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        if self._threads > (os.cpu_count() or 1):
            # Threads that wait spin for a while, and keep those from running that they wait for.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What goes wrong is raised too; what the runtime says beside it, of sessions and of its allocators, is in colours.
        options.log_severity_level = _FATAL
        ort.set_default_logger_severity(_FATAL)
        # Four-bit weights are multiplied with activations of eight bits, block by block, instead of being unpacked.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        try:
            model = self._model_of(name, options)
            session = ort.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_FORBIDDEN_FUSIONS,
            )
        except GapExportError:
            raise
        except Exception as error:  # pybind exceptions of ONNX Runtime share no public base class
            raise SessionError(
                f"was refused by ONNX Runtime {ort.__version__}: {first_line(error)}",
                subject=str(self._bundle.graph_path(name)),
                hint="check the bundle with `gap-export inspect --verify`, or build it again with this version",
            ) from error
        # What was given as content was changed on purpose, to be looked into.
        fault = (
            interface_fault(self._bundle.manifest.graphs[name].spec, _interface_of(session))
            if isinstance(model, str)
            else None
        )
        if fault is not None:
            raise SessionError(
                in_one_line(fault),
                subject=str(self._bundle.graph_path(name)),
                hint="graph and manifest do not belong together: build the bundle again",
            )
        return session

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

    def _lay_out_for(self, placement: Placement, reserve: int | None) -> int:
        """Rows of the prompts, for which there is a cache then."""
        rows: int = placement.position_ids.shape[-2]
        slots = self._bundle.manifest.cache_layout.slots_for(self._slots_needed(placement, reserve))
        self._lay_out(Layout(rows, slots))
        return rows

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
        if len(self._decodes) > _LAYOUTS_KEPT:
            self._decodes.clear()
        self._cache = {name: _ort_value(self._view(name)) for name in self._shapes}
        self._layout = layout
        self._decode = self._decodes.get(layout)

    def _view(self, name: str) -> NDArray[Any]:
        """A past, in the memory that it shares with those of other layouts."""
        shape = self._shapes[name]
        return self._memory[name][: math.prod(shape)].reshape(shape)

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
        self, graph: str, embeds: Any, numbers: dict[str, Ids], outputs: dict[str, NDArray[Any]]
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
            binding.bind_ortvalue_input(past, self._cache[past])
            binding.bind_ortvalue_output(present, self._cache[past])
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
        decoder = self._decoder_binding(graph, embeds, placed, {"logits": logits})
        return _DecodeBuffers(token_ids, placed, logits, embed, decoder)


def check_kernels(bundle: Bundle) -> None:
    """Refuse a bundle whose precision ONNX Runtime has no CPU kernels for.

    Raises:
        SessionError: it has none.
    """
    chosen = bundle.manifest.precision
    if not precision(chosen).cpu:
        raise SessionError(
            f"{chosen} graphs have no CPU kernels in ONNX Runtime",
            subject=str(bundle.folder),
            hint="run it with TensorRT, or build with --precision fp32",
        )


def _extents_of_one_token(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """Shape of an input of the decoder in a call with one token per row."""
    extents = {"batch": batch, "sequence": 1}
    return tuple(dim if isinstance(dim, int) else extents[dim.name] for dim in tensor.shape)


def _interface_of(session: ort.InferenceSession) -> Interface:
    """What the loaded graph itself takes and gives."""
    inputs, outputs = (
        tuple(Tensor(value.name, _ELEMENTS.get(value.type, value.type), tuple(value.shape)) for value in side)
        for side in (session.get_inputs(), session.get_outputs())
    )
    return Interface(inputs, outputs)


def _element_type(bundle: Bundle) -> str:
    return bundle.manifest.graphs["splice"].spec.outputs[0].dtype


def _ort_value(value: Any) -> Any:
    """An OrtValue over the same memory; NumPy arrays on the CPU are not copied."""
    if isinstance(value, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    return value
