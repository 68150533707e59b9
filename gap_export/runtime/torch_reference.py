"""The reference: transformers' own model, eager, with explicit ids, an explicit mask and our own decode loop.

Nothing of the export path is used here. Weights are loaded by transformers, class-token attention is read from the full
attention map, rows are run without padding, and ids come from `positions.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from gap_export import prune
from gap_export.bundle import Precision, Pruning
from gap_export.errors import CheckpointError
from gap_export.positions import Ids, Placement, place
from gap_export.runtime.session import PAD, Buffer, Spliced, VisualTokens

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_UNBOUNDED = 2**31


@dataclass
class _Group:
    """Rows of equal prompt length, run together without padding."""

    rows: list[int]
    cache: DynamicCache


class TorchSession:
    """See `Session`.

    Args:
        checkpoint: folder in Hugging Face layout.
        pruning: what to prune and how to number.
        precision: type the weights are loaded in.

    Raises:
        CheckpointError: transformers cannot load it.
    """

    backend = "torch"
    capacity = _UNBOUNDED

    def __init__(self, checkpoint: Path, pruning: Pruning, precision: Precision = "fp32") -> None:
        try:
            self._model = cast(
                LlavaForConditionalGeneration,
                LlavaForConditionalGeneration.from_pretrained(
                    checkpoint, dtype=_DTYPES[precision], attn_implementation="eager", local_files_only=True
                ).eval(),
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"could not be loaded by transformers: {str(error).splitlines()[0]}",
                subject=str(checkpoint),
                hint="the reference needs the checkpoint the bundle was built from",
            ) from error
        self._pruning = pruning
        config = self._model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        self._grid = (side, side)
        self._groups: list[_Group] = []

    @torch.inference_mode()
    def encode(self, pixel_values_BCHW: NDArray[np.float32]) -> VisualTokens:
        """See `Session.encode`."""
        inner = self._model.model
        seen = inner.vision_tower(
            torch.from_numpy(pixel_values_BCHW).to(self._model.dtype),
            output_hidden_states=True,
            output_attentions=True,
        )
        feature = self._model.config.vision_feature_layer
        patches_BNE = seen.hidden_states[feature][:, 1:]
        # hidden_states starts with the embeddings and attentions does not: from the end, both count alike.
        kept_BK, scores_BN = self._select(
            patches_BNE, seen.attentions[feature if feature < 0 else feature - 1]
        )
        if self._pruning.positions.keeps_raster_order:
            kept_BK = np.sort(kept_BK, axis=1)
        rows = torch.arange(len(kept_BK))[:, None]
        embeds_BKH = inner.multi_modal_projector(patches_BNE)[rows, torch.from_numpy(kept_BK)]
        return VisualTokens(embeds=embeds_BKH, kept_indices=kept_BK, scores=scores_BN)

    @torch.inference_mode()
    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """See `Session.splice`; embeddings are a list of unpadded rows [S_b, H]."""
        image_token = self._model.config.image_token_id
        embed = self._model.get_input_embeddings()
        before, after, rows = [], [], []
        for ids_T, visual_KH in zip(input_ids_BT, visual.embeds, strict=True):
            ids_T = ids_T[ids_T != PAD]
            image = int(np.flatnonzero(ids_T == image_token)[0])
            before.append(image)
            after.append(len(ids_T) - image - 1)
            text_TH = embed(torch.from_numpy(ids_T))
            rows.append(torch.cat([text_TH[:image], visual_KH, text_TH[image + 1 :]]))
        placement = place(
            visual.kept_indices,
            text_before=np.array(before),
            text_after=np.array(after),
            visual_tokens=self._grid[0] * self._grid[1],
            policy=self._pruning.positions,
        )
        return Spliced(embeds=rows, placement=placement)

    @torch.inference_mode()
    def prefill(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """See `Session.prefill`."""
        by_length: dict[int, list[int]] = {}
        for row, embeds_SH in enumerate(embeds):
            by_length.setdefault(len(embeds_SH), []).append(row)
        self._groups = [_Group(rows, DynamicCache()) for rows in by_length.values()]
        return self._forward(
            lambda group: (
                torch.stack([embeds[row] for row in group.rows]),
                placement.position_ids[group.rows, : len(embeds[group.rows[0]])],
            )
        )

    @torch.inference_mode()
    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """See `Session.step`; the slot is the length of the row's own cache, by construction."""
        embed = self._model.get_input_embeddings()
        return self._forward(
            lambda group: (
                embed(torch.from_numpy(token_ids_B[group.rows])[:, None]),
                placement.position_ids[group.rows],
            )
        )

    def _forward(self, inputs_of: Any) -> NDArray[np.float32]:
        logits: dict[int, NDArray[np.float32]] = {}
        for group in self._groups:
            embeds_BSH, ids_BS = inputs_of(group)
            seen = group.cache.get_seq_length()
            # Explicit ones: without any mask, transformers would read gaps in the ids as packed sequences.
            mask = torch.ones(len(group.rows), seen + embeds_BSH.shape[1], dtype=torch.int64)
            out = self._model.model.language_model(
                inputs_embeds=embeds_BSH,
                position_ids=torch.from_numpy(np.ascontiguousarray(ids_BS)),
                attention_mask=mask,
                past_key_values=group.cache,
                use_cache=True,
            )
            last_BV = self._model.lm_head(out.last_hidden_state[:, -1]).float().numpy()
            logits.update(zip(group.rows, last_BV, strict=True))
        return np.stack([logits[row] for row in range(len(logits))])

    def _select(self, patches_BNE: Tensor, attention_BATT: Tensor) -> tuple[Ids, NDArray[np.float32] | None]:
        """Kept raster indices [B, K], best first, and the scores [B, N] where there are any."""
        kept = self._pruning.kept
        if self._pruning.pruner == "cls_attention":
            scores_BN = attention_BATT.float().mean(dim=1)[:, 0, 1:].numpy()
            return np.argsort(-scores_BN, axis=1, kind="stable")[:, :kept].astype(np.int64), scores_BN
        features = prune.VisionFeatures(patches_BNE=patches_BNE, grid=self._grid)
        selected_BK = prune.load(self._pruning.pruner).select(features, kept, self._pruning.seed)
        return selected_BK.numpy(), None
