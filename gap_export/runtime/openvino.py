"""A bundle in OpenVINO: images and prompts are read there, and answers decoded in ONNX Runtime from the cache that it hands over.

Prompts are where OpenVINO is ahead: large products, in bf16 on processors that have it, on weights of four bits as they are stored. Single
tokens are where ONNX Runtime is: its cache is updated in place. The cache of a bundle is a plain array in which a token's slot and its
position are two numbers, so one runtime decodes from what the other wrote, and rows of different length need nothing more.

Pruners that choose one patch after another do so in a `Scan` over similarities of all patches. OpenVINO ends the process over a loop that reads what lies
outside it, so their towers run in ONNX Runtime, and that is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.spec import GraphName
from gap_export.errors import SessionWarning
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.openvino_graph import OpenVINOGraph, device_name, open_core
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.ort_graph import check_kernels
from gap_export.runtime.session import (
    KEPT_COUNTS,
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    as_many_as_kept,
    kept_of_stages,
    padded_together,
    splice_inputs,
    vision_inputs,
)

_LOOP = "Scan"


class OpenVINOSession(Lifetime):
    """A bundle's graphs in OpenVINO, its decoder's single tokens in ONNX Runtime.

    Args:
        bundle: opened and verified.
        threads: of the CPU, in either runtime; 0 lets them choose.
        device: where images and prompts are read: cpu, gpu, npu, or one of several (`gpu:1`).
        precision_hint: type of activations there: f32, bf16 or f16.
        backend: what reports call it.

    Raises:
        SessionError: a graph is refused, there is no such device, or it does not compute in that type.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        device: str = "cpu",
        precision_hint: str = "f32",
        backend: str = "openvino",
    ) -> None:
        manifest = bundle.manifest
        check_kernels(bundle)
        self.backend = backend
        self.capacities = manifest.cache_layout.capacities
        self._manifest = manifest
        self._prompt_graph: GraphName = "prefill" if manifest.pruning.stages else "decoder"
        named = device_name(device)
        core = open_core(named, threads)
        names: list[GraphName] = ["splice", self._prompt_graph]
        decoding: list[GraphName] = ["embed", "decode" if manifest.pruning.stages else "decoder"]
        self._scans = _LOOP in manifest.graphs["vision"].operators
        (decoding if self._scans else names).append("vision")
        if self._scans:
            warnings.warn(
                f"the tower runs in ONNX Runtime: {manifest.pruning.pruner} chooses patches in a loop that OpenVINO cannot read",
                SessionWarning,
                stacklevel=3,
            )
        self._graphs = {name: OpenVINOGraph(bundle, name, core, named, precision_hint) for name in names}
        self._decoding = OnnxRuntimeSession(bundle, threads=threads, only=decoding)
        self._zeros: NDArray[Any] = np.zeros(0)

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
        if self._scans:
            return self._decoding.encode(pixels, text_ids_BL=text_ids_BL, keep_count=keep_count)
        pruning = self._manifest.pruning
        reads_text = self._manifest.text_tower is not None
        extra = vision_inputs(pruning, reads_text=reads_text, text_ids_BL=text_ids_BL, keep_count=keep_count)
        found = self._graphs["vision"].run({**pixels, **extra})
        embeds, kept = found["visual_embeds"], found["kept_indices"]
        if KEPT_COUNTS not in found:
            return VisualTokens(embeds=embeds, kept_indices=kept)
        return as_many_as_kept(embeds, kept, found[KEPT_COUNTS], pruning)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]."""
        self._check_open()
        return padded_together([[_array(part) for part in row] for row in rows], longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder."""
        self._check_open()
        spec = self._manifest.graphs["splice"].spec
        inputs = splice_inputs(spec, input_ids_BT, visual)
        found = self._graphs["splice"].run({name: _array(value) for name, value in inputs.items()})
        embeds = found.pop("inputs_embeds")
        return Spliced(embeds=embeds, placement=placement_from_splice(found, visual.stage_counts))

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on: OpenVINO computes it, and writes it where ONNX Runtime reads it."""
        self._check_open()
        self.caches_begun += 1
        return self._prefill(self._decoding.cache_for(placement, reserve), embeds, placement)

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies."""
        self._check_open()
        self.caches_begun += 1
        self._decoding.clear(slots)

    def grow(self, slots: Sequence[int]) -> None:
        """Give every row of the cache at least so many slots; what lies in them stays."""
        self._check_open()
        self._decoding.grow(slots)

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings [1, T, H] of text."""
        self._check_open()
        return self._decoding.embed(token_ids_1T)

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in a cache of one row: logits [1, V]; ONNX Runtime reads them, whose cache it is."""
        self._check_open()
        return self._decoding.append(embeds, placement)

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        self._check_open()
        self._decoding.fork(rows)

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token."""
        self._check_open()
        return self._decoding.extend(token_ids_BT, placement)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; the array returned is overwritten by the next call."""
        self._check_open()
        return self._decoding.step(token_ids_B, placement)

    def open_rows(self, rows: int, slots: int | None = None) -> None:
        """Lay out a cache of so many rows; see `runtime.rows.RowSession`."""
        self._check_open()
        self.caches_begun += 1
        self._decoding.open_rows(rows, slots)

    def prefill_row(self, row: int, embeds: Buffer, placement: Placement) -> Prefilled:
        """Fill a row from slot 0 on, with a prompt."""
        self._check_open()
        return self._prefill(self._decoding.row_for(row, placement), embeds, placement)

    def append_row(self, row: int, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what is in a row: logits [1, V]."""
        self._check_open()
        return self._decoding.append_row(row, embeds, placement)

    def extend_row(self, row: int, token_ids_1T: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed several tokens after what is in a row: logits [1, V]."""
        self._check_open()
        return self._decoding.extend_row(row, token_ids_1T, placement)

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds."""
        self._check_open()
        self._decoding.copy_row(source, target)

    def clear_row(self, row: int) -> None:
        """Forget what a row holds."""
        self._check_open()
        self._decoding.clear_row(row)

    def _prefill(self, cache: dict[str, NDArray[Any]], embeds: Buffer, placement: Placement) -> Prefilled:
        aliased = self._manifest.graphs[self._prompt_graph].spec.aliased
        pasts = {past: self._empty(cache[past]) for past in aliased.values()}
        found = self._graphs[self._prompt_graph].run(
            {"inputs_embeds": _array(embeds), **placement.decoder_inputs(), **pasts},
            {present: cache[past] for present, past in aliased.items()},
        )
        logits = found.pop("logits")
        return Prefilled(logits, kept_of_stages(list(found.values()), placement))

    def _empty(self, like: NDArray[Any]) -> NDArray[Any]:
        """Zeros in the shape of a past; those of all layers lie in one memory, which is only read."""
        if self._zeros.dtype != like.dtype or self._zeros.size < like.size:
            self._zeros = np.zeros(like.size, like.dtype)
        return self._zeros[: like.size].reshape(like.shape)

    def _free(self) -> None:
        self._graphs.clear()
        self._decoding.close()
        self._zeros = np.zeros(0)


def _array(buffer: Buffer) -> NDArray[Any]:
    """An array, also of what ONNX Runtime gave."""
    return buffer if isinstance(buffer, np.ndarray) else np.asarray(buffer.numpy())
