"""The reference: transformers' own model, eager, with explicit ids, an explicit mask and our own decode loop.

Nothing of the export path is used here. Weights are loaded by transformers, class-token attention is read from the full
attention map, the selection is that of `prune/reference/` (float64, one picture at a time), rows are run without padding, and
ids come from `positions.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModelWithProjection, DynamicCache, LlavaForConditionalGeneration
from transformers.utils import logging

from gap_export import prune
from gap_export.bundle import Precision, Pruning, TextTower
from gap_export.errors import CheckpointError
from gap_export.positions import Ids, Placement, place
from gap_export.prune import reference
from gap_export.runtime.session import (
    PAD,
    Buffer,
    Prefilled,
    Spliced,
    VisualTokens,
    require_within_bound,
    vision_inputs,
)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_UNBOUNDED = 2**31


@dataclass
class _Group:
    """Rows of equal prompt length, run together without padding."""

    rows: list[int]
    cache: DynamicCache


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hold back what transformers writes while it loads: progress, which would spoil the caller's own display, and reports."""
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class TextReference:
    """transformers' own text tower of a CLIP checkpoint, and its projection of patches.

    Args:
        checkpoint: folder of the CLIP checkpoint.
        facts: from the bundle's manifest.

    Raises:
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, checkpoint: Path, facts: TextTower) -> None:
        self.aligned_inversely = facts.aligned_inversely
        try:
            with _quiet_loading():  # it would report what else a CLIP checkpoint holds
                self._model = CLIPTextModelWithProjection.from_pretrained(
                    checkpoint, attn_implementation="eager", local_files_only=True
                ).eval()
            files = sorted(checkpoint.glob("*.safetensors"))
            (self._visual_projection_PE,) = (
                stored.get_tensor("visual_projection.weight").float()
                for file in files
                for stored in [safe_open(file, framework="pt")]
                if "visual_projection.weight" in stored.keys()  # noqa: SIM118  (not a dict)
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"could not be loaded by transformers: {str(error).splitlines()[0]}",
                subject=str(checkpoint),
                hint="the reference needs the text tower the bundle was built with",
            ) from error

    def embedded(self, text_ids_BL: Ids) -> Tensor:
        """[B, P]: every expression by itself, without padding."""
        rows = []
        for ids_L in text_ids_BL:
            end = int(np.flatnonzero(ids_L == ids_L[-1])[0])
            rows.append(self._model(input_ids=torch.from_numpy(ids_L[None, : end + 1])).text_embeds[0])
        return torch.stack(rows)

    def aligned(self, normed_BNE: Tensor) -> Tensor:
        """[B, N, E] patches after the vision tower's last norm -> [B, N, P]."""
        aligned_BNP: Tensor = normed_BNE.float() @ self._visual_projection_PE.T
        return aligned_BNP


class TorchSession:
    """See `Session`.

    Args:
        checkpoint: folder in Hugging Face layout.
        pruning: what to prune and how to number.
        precision: type the weights are loaded in.
        text_tower: for pruners that look at the expression.

    Raises:
        CheckpointError: transformers cannot load it.
    """

    backend = "torch"

    def __init__(
        self,
        checkpoint: Path,
        pruning: Pruning,
        precision: Precision = "fp32",
        *,
        text_tower: TextReference | None = None,
    ) -> None:
        try:
            with _quiet_loading():
                self._model = cast(
                    LlavaForConditionalGeneration,
                    LlavaForConditionalGeneration.from_pretrained(
                        checkpoint,
                        dtype=_DTYPES[precision],
                        attn_implementation="eager",
                        local_files_only=True,
                    ).eval(),
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"could not be loaded by transformers: {str(error).splitlines()[0]}",
                subject=str(checkpoint),
                hint="the reference needs the checkpoint the bundle was built from",
            ) from error
        self._pruning, self._text_tower = pruning, text_tower
        self.capacities = (_UNBOUNDED,) * max(1, len(pruning.stages))
        config = self._model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        self._grid = (side, side)
        self._groups: list[_Group] = []

    @torch.inference_mode()
    def encode(
        self,
        pixel_values_BCHW: NDArray[np.float32],
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """See `Session.encode`; embeddings are a list of rows [K_b, H] where pictures differ."""
        inner = self._model.model
        pruning = self._pruning
        vision_inputs(
            pruning, reads_text=self._text_tower is not None, text_ids_BL=text_ids_BL, keep_count=keep_count
        )
        seen = inner.vision_tower(
            torch.from_numpy(pixel_values_BCHW).to(self._model.dtype),
            output_hidden_states=True,
            output_attentions=True,
        )
        # Hidden states are numbered from the embeddings on, so layer `run - 1` turns state `run - 1` into state `run`.
        layers = inner.vision_tower.encoder.layers
        feature = self._model.config.vision_feature_layer
        run = feature if feature >= 0 else len(layers) + 1 + feature
        into_BTE, out_BTE = seen.hidden_states[run - 1], seen.hidden_states[run]
        patches_BNE = out_BTE[:, 1:]
        scoring = layers[run - 1].self_attn
        keys_BTE = scoring.k_proj(layers[run - 1].layer_norm1(into_BTE))
        above_BTE = layers[run].layer_norm1(out_BTE) if run < len(layers) else None
        shown = {
            "patches_NE": patches_BNE,
            "attention_N": seen.attentions[run - 1].float().mean(dim=1)[:, 0, 1:],
            "class_token_E": out_BTE[:, 0],
            "keys_ND": keys_BTE.float().unflatten(-1, (scoring.num_heads, -1)).mean(dim=2)[:, 1:],
            "following_query_E": None if above_BTE is None else layers[run].self_attn.q_proj(above_BTE[:, 0]),
            "following_keys_TE": None if above_BTE is None else layers[run].self_attn.k_proj(above_BTE),
            "projected_NH": inner.multi_modal_projector(patches_BNE),
        }
        if self._text_tower is not None and text_ids_BL is not None:
            shown["aligned_NP"] = self._text_tower.aligned(inner.vision_tower.post_layernorm(patches_BNE))
            shown["text_P"] = self._text_tower.embedded(text_ids_BL)
        choices = [self._choose(shown, row, keep_count) for row in range(len(patches_BNE))]
        embeds = []
        for choice, patches_NE in zip(choices, patches_BNE, strict=True):
            if choice.patches_KE is None:
                tokens_KE = patches_NE[torch.from_numpy(choice.indices_K)]
            else:
                tokens_KE = torch.from_numpy(choice.patches_KE).to(patches_NE.dtype)
            embeds.append(inner.multi_modal_projector(tokens_KE))
        adaptive = pruning.counting == "adaptive"
        if adaptive:
            require_within_bound(np.array([choice.needed for choice in choices]), pruning)
        counts_B = np.array([len(choice.indices_K) for choice in choices], np.int64)
        kept_BK = np.full((len(choices), counts_B.max()), prune.NO_TOKEN, np.int64)
        for row, choice in enumerate(choices):
            kept_BK[row, : counts_B[row]] = choice.indices_K
        by_score = pruning.pruner == "cls_attention"
        return VisualTokens(
            embeds=embeds if adaptive else torch.stack(embeds),
            kept_indices=kept_BK,
            kept_counts=counts_B if adaptive else None,
            scores=shown["attention_N"].numpy() if by_score else None,
            margins=None if by_score else np.array([choice.margin for choice in choices]),
        )

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
            merged=self._pruning.merged,
            stages=tuple(stage.kept for stage in self._pruning.stages[1:]),
        )
        return Spliced(embeds=rows, placement=placement)

    @torch.inference_mode()
    def prefill(self, embeds: Buffer, placement: Placement) -> Prefilled:
        """See `Session.prefill`."""
        by_length: dict[int, list[int]] = {}
        for row, embeds_SH in enumerate(embeds):
            by_length.setdefault(len(embeds_SH), []).append(row)
        self._groups = [_Group(rows, DynamicCache()) for rows in by_length.values()]
        return Prefilled(
            self._forward(
                lambda group: (
                    torch.stack([embeds[row] for row in group.rows]),
                    placement.position_ids[group.rows, : len(embeds[group.rows[0]])],
                )
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

    def _choose(self, shown: dict[str, Tensor | None], row: int, keep_count: int | None) -> reference.Choice:
        """What is kept of one picture, in the order in which it enters the decoder."""
        pruning = self._pruning
        pruner = "none" if pruning.stages else pruning.pruner
        parts = {
            name: np.empty(0) if part is None else part[row].double().numpy() for name, part in shown.items()
        }
        inversely = self._text_tower is None or self._text_tower.aligned_inversely
        seen = reference.Seen(grid=self._grid, aligned_inversely=inversely, **parts)
        if pruning.counting == "adaptive":
            choice = reference.choose_adaptive(
                pruning.pruner, seen, pruning.most, merged_id=pruning.merged_id
            )
        else:
            choice = reference.choose(
                pruner,
                seen,
                pruning.kept if keep_count is None or pruning.stages else keep_count,
                seed=pruning.seed,
                merged_id=pruning.merged_id,
            )
        if not pruning.positions.keeps_raster_order:
            return choice
        order = np.argsort(choice.indices_K, kind="stable")
        patches_KE = None if choice.patches_KE is None else choice.patches_KE[order]
        return replace(choice, indices_K=choice.indices_K[order], patches_KE=patches_KE)
