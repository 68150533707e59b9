"""Logits of a text, fed as it stands (teacher forcing): by a bundle, and by the PyTorch model that it was built from.

Both take the first tokens in one call and the following ones one by one, over one cache: a fault of long calls shows in the first alone.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.cache_layout import in_slot_steps
from gap_export.bundle.folder import Bundle
from gap_export.families.reference import ReferenceModel
from gap_export.graph.every_row import with_every_row
from gap_export.positions import Ids, Placement
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.ort_cache import Layout
from gap_export.runtime.providers import Provider

Renumber = Callable[[Ids], Ids]
"""Position ids [T] -> others, for negative controls."""

Logits = NDArray[np.float32]


class Scorer(Protocol):
    """Something that reads a text."""

    def start(self, tokens: int) -> None:
        """Forget what was read; `tokens` will be read at most."""
        ...

    def read(self, token_ids_T: Ids, first: int) -> Logits:
        """Read some tokens, the first of which is number `first` of the text.

        Returns:
            [T, V]: after every one of them.
        """
        ...


class BundleScorer(OnnxRuntimeSession):
    """The embedding and the decoder of a bundle in ONNX Runtime; a decoder that drops tokens takes one token per call.

    Args:
        bundle: opened and verified.
        threads: of ONNX Runtime; 0 lets it choose.
        device: that it computes on.
        providers: that compute there.
        renumber: what position ids become, for negative controls.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        device: str = "cpu",
        providers: Sequence[Provider] = (),
        renumber: Renumber | None = None,
    ) -> None:
        decoder = "decode" if bundle.manifest.pruning.stages else "decoder"
        super().__init__(bundle, threads=threads, only=("embed", decoder), device=device, providers=providers)
        self.renumber = renumber

    def start(self, tokens: int) -> None:
        """Lay out a cache; nothing reads what lies in it."""
        layout = self._bundle.manifest.cache_layout
        slots = layout.capacities if layout.static else (in_slot_steps(tokens),) * len(layout.runs)
        self._lay_out(Layout(1, slots))

    def read(self, token_ids_T: Ids, first: int) -> Logits:
        """As `Scorer.read`."""
        (embeds,) = self._run("embed", {"input_ids": token_ids_T[None]})
        return self._call(embeds, self._placed(first, len(token_ids_T)))

    def _placed(self, first: int, count: int) -> Placement:
        """Ids and slots of so many tokens, from number `first` of the text on."""
        manifest = self._bundle.manifest
        ids_T = np.arange(first, first + count, dtype=np.int64)
        ids_BS = (ids_T if self.renumber is None else self.renumber(ids_T))[None]
        slot = np.array([first], np.int64)
        return Placement(
            position_ids=np.stack([ids_BS] * 3) if manifest.spec.position_rows == 3 else ids_BS,
            write_index=slot,
            last_index=np.array([count - 1], np.int64),
            next_position=slot + count,
            next_slot=slot + count,
            image_slots=np.zeros((1, manifest.prompt.images, 2), np.int64),
            stage_write_index=(slot,) * max(0, len(manifest.pruning.stages) - 1),
        )

    def _call(self, embeds: Any, placement: Placement) -> Logits:
        """Call the decoder once: [T, V], of all its tokens."""
        memory, shape = self._memory, (placement.position_ids.shape[-1], self._model.vocabulary)
        logits = memory.zeros(shape, "float32")
        binding = self._decoder_binding(
            self._token_graph, self._cache.views(), embeds, placement.decoder_inputs(), {"logits": logits}
        )
        self._execute(self._token_graph, binding)
        return memory.read(logits)

    def _model_of(self, name: str, options: ort.SessionOptions) -> str | bytes:
        if name != "decoder":
            return super()._model_of(name, options)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.folder)
        )
        return with_every_row(self._bundle.graph_path(name))


class ReferenceScorer:
    """The PyTorch model of a checkpoint, in fp32.

    Args:
        model: of the family.
        position_rows: 3 for M-RoPE.
    """

    def __init__(self, model: ReferenceModel, *, position_rows: int = 1) -> None:
        self._model, self._rows = model, position_rows
        self._cache: Any = None

    def start(self, tokens: int) -> None:
        """Begin with an empty cache."""
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def read(self, token_ids_T: Ids, first: int) -> Logits:
        """As `Scorer.read`."""
        import torch

        from gap_export.runtime.torch.session import as_loaded

        count = len(token_ids_T)
        with torch.inference_mode():
            ids_BS = torch.arange(first, first + count)[None]
            as_loaded(self._model.language_model)
            out = self._model.language_model(
                inputs_embeds=self._model.embedding(torch.from_numpy(token_ids_T)[None]),
                position_ids=ids_BS.expand(3, 1, -1) if self._rows == 3 else ids_BS,
                attention_mask=torch.ones(1, first + count, dtype=torch.int64),
                past_key_values=self._cache,
                use_cache=True,
            )
            logits_TV: Logits = self._model.lm_head(out.last_hidden_state[0]).float().numpy()
        return logits_TV
