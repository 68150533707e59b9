"""A runtime from outside the package: the graphs of a bundle in onnx's reference evaluator, NumPy arrays all the way.

It is the example of `docs/extending.md`: a session, and one row of the table. Slow, and for small
bundles only, whose weights are no hard links (onnx refuses those).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from gap_export.bundle.folder import Bundle
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.backends import Backend
from gap_export.runtime.session import (
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    padded_together,
    splice_inputs,
    vision_inputs,
)

ROW = Backend("onnx-reference", f"{__name__}:ReferenceSession", requirement="onnx")


class ReferenceSession(Lifetime):
    """See `Session`. Decoders that drop tokens between layers, and adaptive pruners, are left out."""

    backend = ROW.name

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self._manifest = bundle.manifest
        self.capacities = bundle.manifest.cache_layout.capacities
        self._graphs = {
            name: ReferenceEvaluator(onnx.load(bundle.graph_path(name))) for name in bundle.manifest.graphs
        }
        self._cache: dict[str, NDArray[Any]] = {}

    def encode(
        self, pixels: PixelInputs, *, text_ids_BL: Ids | None = None, keep_count: int | None = None
    ) -> VisualTokens:
        reads_text = self._manifest.text_tower is not None
        extra = vision_inputs(
            self._manifest.pruning, reads_text=reads_text, text_ids_BL=text_ids_BL, keep_count=keep_count
        )
        outputs = self._run("vision", {**pixels, **extra})
        return VisualTokens(outputs["visual_embeds"], outputs["kept_indices"])

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        return padded_together(rows, longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        spec = self._manifest.graphs["splice"].spec
        outputs = self._run("splice", splice_inputs(spec, input_ids_BT, visual))
        embeds = outputs.pop("inputs_embeds")
        return Spliced(embeds, placement_from_splice(outputs))

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        for tensor in self._manifest.graphs["decoder"].spec.inputs:
            if tensor.name.startswith("past"):
                _, heads, _, width = tensor.extents("maximum")
                self._cache[tensor.name] = np.zeros(
                    (len(embeds), heads, self.capacities[0], width), embeds.dtype
                )
        return Prefilled(self._decode(embeds, placement))

    def fork(self, rows: int) -> None:
        self._cache = {name: array[:1].repeat(rows, axis=0) for name, array in self._cache.items()}

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        embeds = self._run("embed", {"input_ids": np.maximum(token_ids_BT, 0)})["inputs_embeds"]
        return self._decode(embeds, placement)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        return self.extend(token_ids_B[:, None], placement)

    def _decode(self, embeds: NDArray[Any], placement: Placement) -> NDArray[np.float32]:
        spec = self._manifest.graphs["decoder"].spec
        numbers = placement.decoder_inputs()
        fed = {tensor.name: numbers[tensor.name] for tensor in spec.inputs if tensor.name in numbers}
        outputs = self._run("decoder", {"inputs_embeds": embeds, **fed, **self._cache})
        self._cache = {past: outputs[present] for present, past in spec.aliased.items()}
        logits: NDArray[np.float32] = outputs["logits"]
        return logits

    def _run(self, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        self._check_open()
        names = [tensor.name for tensor in self._manifest.graphs[name].spec.outputs]
        return dict(zip(names, self._graphs[name].run(names, inputs), strict=True))

    def _free(self) -> None:
        self._graphs.clear()
        self._cache.clear()
