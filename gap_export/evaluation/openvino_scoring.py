"""Logits of a text, as a session in OpenVINO reads it: its first call there, all further ones in ONNX Runtime over the cache that is handed over."""

from __future__ import annotations

from typing import Any

import numpy as np

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.bundle_reports import TEXT_PARITY
from gap_export.evaluation.scoring import BundleScorer, Logits
from gap_export.files import place_file, scratch_folder
from gap_export.graph.every_row import with_every_row
from gap_export.positions import Placement
from gap_export.runtime.backends import Runtime
from gap_export.runtime.openvino_graph import OpenVINOGraph, device_name, open_core


class OpenVINOScorer(BundleScorer):
    """The embedding and the decoder of a bundle, whose tokens all reach the last layer.

    Args:
        bundle: opened and verified; beside its reports the changed graph lies while it is read.
        chosen: device and type of activations.
        threads: of the CPU, in either runtime; 0 lets them choose.

    Raises:
        SessionError: as of a session in OpenVINO.
    """

    def __init__(self, bundle: Bundle, chosen: Runtime, *, threads: int = 0) -> None:
        super().__init__(bundle, threads=threads)
        self.backend = str(chosen)
        named = device_name(chosen.device)
        core = open_core(named, threads)
        # OpenVINO finds weights beside the file of a graph alone, as hard links and not as symbolic ones.
        with scratch_folder(beside=bundle.reports / TEXT_PARITY, purpose="text") as folder:
            for path in bundle.folder.glob("*.safetensors"):
                place_file(path, folder / path.name, copy=False)
            path = folder / "decoder.onnx"
            path.write_bytes(with_every_row(bundle.graph_path("decoder")))
            self._first = OpenVINOGraph(bundle, "decoder", core, named, chosen.hint, path=path)

    def _call(self, embeds: Any, placement: Placement) -> Logits:
        if placement.write_index[0]:
            return super()._call(embeds, placement)
        cache, aliased = self._cache.views(), self._bundle.manifest.graphs["decoder"].spec.aliased
        pasts = {past: np.zeros_like(cache[past]) for past in aliased.values()}
        presents = {present: cache[past] for present, past in aliased.items()}
        found = self._first.run(
            {"inputs_embeds": embeds.numpy(), **placement.decoder_inputs(), **pasts}, presents
        )
        return found["logits"]
