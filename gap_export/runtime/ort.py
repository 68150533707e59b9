"""A bundle in ONNX Runtime on the CPU: bound buffers, one cache for past and present, nothing copied per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.errors import SessionError
from gap_export.positions import Ids, Placement
from gap_export.runtime.session import (
    KEPT_COUNTS,
    Buffer,
    Spliced,
    VisualTokens,
    require_within_bound,
    vision_inputs,
)

_NUMPY = {"float32": np.float32, "float16": np.float16}

# Fusions that put rotary into attention read only the first position id (see docs/positions.md).
_FORBIDDEN_FUSIONS = ["GroupQueryAttentionFusion"]


@dataclass
class _DecodeBuffers:
    """What a single-token call reads and writes; made once per batch size and prompt.

    Attributes:
        token_ids: [B, 1] int64.
        position_ids: [B, 1] int64.
        write_index: [B] int64.
        logits: [B, V] float32, overwritten by every call.
    """

    token_ids: Ids
    position_ids: Ids
    write_index: Ids
    logits: NDArray[np.float32]
    embed: Any
    decoder: Any


class OnnxRuntimeSession:
    """See `Session`.

    Args:
        bundle: opened and verified.
        threads: intra-op threads; 0 lets ONNX Runtime choose.

    Raises:
        SessionError: a graph does not load, or its precision has no CPU kernels.
    """

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        manifest = bundle.manifest
        if manifest.precision not in ("fp32", "fp16"):
            raise SessionError(
                f"{manifest.precision} graphs have no CPU kernels in ONNX Runtime",
                subject=str(bundle.folder),
                hint="run it with TensorRT, or build with --precision fp32",
            )
        self.capacity = manifest.capacity
        self._bundle = bundle
        self._model = manifest.model
        self._dtype = _NUMPY[_element_type(bundle)]
        self._threads = threads
        self._sessions = {name: self._load(name) for name in ("vision", "splice", "embed", "decoder")}
        self._cache: dict[str, Any] = {}
        self._batch = 0
        self._decode: _DecodeBuffers | None = None

    def encode(
        self,
        pixel_values_BCHW: NDArray[np.float32],
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """See `Session.encode`."""
        manifest = self._bundle.manifest
        extra = vision_inputs(
            manifest.pruning,
            reads_text=manifest.text_tower is not None,
            text_ids_BL=text_ids_BL,
            keep_count=keep_count,
        )
        embeds, kept, *counts = self._run("vision", {"pixel_values": pixel_values_BCHW, **extra})
        if not counts:
            return VisualTokens(embeds=embeds, kept_indices=kept.numpy())
        counts_B = counts[0].numpy()
        require_within_bound(counts_B, manifest.pruning)
        longest = int(counts_B.max())  # the decoder need not run over padding that no row uses
        return VisualTokens(
            embeds=embeds.numpy()[:, :longest],
            kept_indices=kept.numpy()[:, :longest],
            kept_counts=counts_B,
        )

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """See `Session.splice`."""
        offered = {
            "input_ids": input_ids_BT,
            "visual_embeds": visual.embeds,
            "kept_indices": visual.kept_indices,
            KEPT_COUNTS: visual.kept_counts,
        }
        taken = {tensor.name for tensor in self._bundle.manifest.graphs["splice"].spec.inputs}
        embeds, position_ids, next_position, next_slot = self._run(
            "splice", {name: value for name, value in offered.items() if name in taken}
        )
        slots = next_slot.numpy()
        placement = Placement(
            position_ids=position_ids.numpy(),
            write_index=np.zeros_like(slots),
            last_index=slots - 1,
            next_position=next_position.numpy(),
            next_slot=slots,
        )
        return Spliced(embeds=embeds, placement=placement)

    def prefill(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """See `Session.prefill`."""
        batch = placement.position_ids.shape[0]
        if batch != self._batch:
            self._allocate(batch)
        logits = np.empty((batch, self._model.vocabulary), np.float32)
        binding = self._decoder_binding(
            embeds, placement.position_ids, placement.write_index, placement.last_index, logits
        )
        self._execute("decoder", binding)
        return logits

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """See `Session.step`; the array returned is overwritten by the next call."""
        if self._decode is None:
            self._decode = self._bind_decode(self._batch)
        decode = self._decode
        decode.token_ids[:, 0] = token_ids_B
        decode.position_ids[:] = placement.position_ids
        decode.write_index[:] = placement.write_index
        self._execute("embed", decode.embed)
        self._execute("decoder", decode.decoder)
        return decode.logits

    def _load(self, name: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        path = self._bundle.graph_path(name)
        try:
            return ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_FORBIDDEN_FUSIONS
            )
        except Exception as error:  # pybind exceptions of ONNX Runtime share no public base class
            raise SessionError(
                f"was refused by ONNX Runtime {ort.__version__}: {_first_line(error)}",
                subject=str(path),
                hint="check the bundle with `gap-export inspect --verify`, or build it again with this version",
            ) from error

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
                f"failed in ONNX Runtime: {_first_line(error)}",
                subject=f"graph {name}",
                hint="the inputs do not fit the shapes in the manifest; see `gap-export inspect`",
            ) from error

    def _allocate(self, batch: int) -> None:
        shape = (batch, self._model.kv_heads, self.capacity, self._model.head_dim)
        spec = self._bundle.manifest.graphs["decoder"].spec
        self._cache = {past: _ort_value(np.zeros(shape, self._dtype)) for past in spec.aliased.values()}
        self._batch = batch
        self._decode = None

    def _decoder_binding(
        self, embeds: Any, position_ids: Ids, write_index: Ids, last_index: Ids, logits: NDArray[np.float32]
    ) -> Any:
        """Past and present of every layer are one buffer: the cache is updated in place."""
        binding = self._sessions["decoder"].io_binding()
        binding.bind_ortvalue_input("inputs_embeds", _ort_value(embeds))
        binding.bind_ortvalue_input("position_ids", _ort_value(position_ids))
        binding.bind_ortvalue_input("write_index", _ort_value(write_index))
        binding.bind_ortvalue_input("last_index", _ort_value(last_index))
        binding.bind_ortvalue_output("logits", _ort_value(logits))
        for present, past in self._bundle.manifest.graphs["decoder"].spec.aliased.items():
            binding.bind_ortvalue_input(past, self._cache[past])
            binding.bind_ortvalue_output(present, self._cache[past])
        return binding

    def _bind_decode(self, batch: int) -> _DecodeBuffers:
        token_ids, position_ids = np.zeros((batch, 1), np.int64), np.zeros((batch, 1), np.int64)
        write_index, logits = np.zeros(batch, np.int64), np.empty((batch, self._model.vocabulary), np.float32)
        embeds = _ort_value(np.zeros((batch, 1, self._model.hidden_size), self._dtype))
        embed = self._sessions["embed"].io_binding()
        embed.bind_ortvalue_input("input_ids", _ort_value(token_ids))
        embed.bind_ortvalue_output("inputs_embeds", embeds)
        decoder = self._decoder_binding(embeds, position_ids, write_index, np.zeros(batch, np.int64), logits)
        return _DecodeBuffers(token_ids, position_ids, write_index, logits, embed, decoder)


def _element_type(bundle: Bundle) -> str:
    return bundle.manifest.graphs["splice"].spec.outputs[0].dtype


def _ort_value(value: Any) -> Any:
    """An OrtValue over the same memory; NumPy arrays on the CPU are not copied."""
    if isinstance(value, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
