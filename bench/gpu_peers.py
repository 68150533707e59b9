"""The peer of bundles on a GPU: the same checkpoint in transformers, as a session, so that it answers the same requests."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gap_export.bundle.folder import Bundle
from gap_export.checkpoint.hub import resolve
from gap_export.positions import PositionPolicy, place
from gap_export.precision import precision
from gap_export.runtime.session import Prefilled, Spliced, VisualTokens


def load_model(bundle: Bundle, checkpoint: Path | None, *, device: str) -> Any:
    """The checkpoint of a bundle in transformers, with sdpa, in the type of the bundle's activations.

    Args:
        bundle: opened.
        checkpoint: folder; by default where the bundle was built from.
        device: of torch.
    """
    from transformers import LlavaForConditionalGeneration

    dtype = getattr(torch, precision(bundle.manifest.precision).activations.dtype)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        checkpoint or resolve(bundle.manifest.checkpoint),
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
    )
    return model.eval().to(device)


class TransformersSession:
    """A model of transformers, nothing pruned: sdpa over a growing cache, or single tokens compiled over a static one.

    Rows of a batch must be equally long.

    Args:
        bundle: for sizes and prompt.
        model: see `load_model`; sessions may share it.
        compiled: whether single tokens are compiled (`reduce-overhead`: on a GPU as CUDA graphs).
    """

    def __init__(self, bundle: Bundle, model: Any, *, compiled: bool) -> None:
        manifest = bundle.manifest
        self.backend = f"transformers {'compile' if compiled else 'sdpa'}"
        self.capacities = manifest.cache_layout.capacities
        self._model, self._compiled = model, compiled
        self._token, self._visual = manifest.prompt.image_token_id, manifest.spec.visual_tokens
        self._step = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward
        self._cache: Any = None
        self._static: dict[tuple[int, int], Any] = {}
        self.turn = nullcontext  # used by one thread

    def encode(self, pixels: Any, **_: Any) -> VisualTokens:
        """Kept for the prompt: transformers runs tower and decoder in one call."""
        values = torch.from_numpy(pixels["pixel_values"]).to(self._model.device, self._model.dtype)
        kept = np.tile(np.arange(self._visual), (len(values), 1))
        return VisualTokens(embeds=values, kept_indices=kept)

    def splice(self, input_ids_BT: Any, visual: VisualTokens) -> Spliced:
        """The placeholder as often as there are visual tokens."""
        before = np.array([int(np.flatnonzero(row == self._token)[0]) for row in input_ids_BT])
        rows = [
            np.r_[row[:at], [self._token] * self._visual, row[at + 1 :]]
            for row, at in zip(input_ids_BT, before, strict=True)
        ]
        placement = place(
            visual.kept_indices,
            text_before=before,
            text_after=input_ids_BT.shape[1] - 1 - before,
            visual_tokens=self._visual,
            policy=PositionPolicy.GAP,
        )
        return Spliced(embeds=(np.stack(rows), visual.embeds), placement=placement)

    # As in transformers' own `generate`: tensors of inference mode and CUDA graphs do not go together everywhere.
    @torch.no_grad()
    def prefill(self, embeds: Any, placement: Any, *, reserve: int | None = None) -> Prefilled:
        """Tower, projector and decoder."""
        ids, pixels = embeds
        self._cache = self._fresh_cache(len(ids), ids.shape[1] + (reserve or 0))
        out = self._model(
            input_ids=torch.from_numpy(ids).to(self._model.device),
            pixel_values=pixels,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefilled(out.logits[:, -1].float().cpu().numpy())

    @torch.no_grad()
    def step(self, token_ids_B: Any, placement: Any) -> Any:
        """One token of every row."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        out = self._step(
            input_ids=torch.from_numpy(token_ids_B[:, None]).to(self._model.device),
            position_ids=torch.from_numpy(placement.position_ids).to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float().cpu().numpy()

    def _fresh_cache(self, rows: int, slots: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            return DynamicCache()
        # CUDA graphs are captured over the addresses of a static cache: one cache for all requests of a shape.
        if (rows, slots) in self._static:
            self._static[rows, slots].reset()
        else:
            self._static[rows, slots] = StaticCache(
                config=self._model.config.text_config, max_cache_len=slots
            )
        return self._static[rows, slots]
