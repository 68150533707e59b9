"""The Qwen-VL models as transformers computes them, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_window_index

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice


class Qwen2VLReference:
    """Qwen2-VL in transformers, as a `ReferenceModel`."""

    grid = None

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        self.dtype, self.image_token_id = dtype, model.config.image_token_id
        self.embedding: nn.Module = model.get_input_embeddings()
        self.language_model: Any = model.model.language_model
        self.lm_head = model.lm_head
        self._tower = model.model.visual

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        patches_PF = torch.from_numpy(pixels["pixel_values"]).flatten(0, 1).to(self.dtype)
        rows, columns = (int(last) + 1 for last in np.max(pixels["patch_positions"], axis=(0, 1)))
        grid_13 = torch.tensor([[1, rows, columns]])
        states = self._tower(patches_PF, grid_thw=grid_13)
        normed_PE = self._normed(states.last_hidden_state)
        tokens_NE = self._in_raster_order(normed_PE.reshape(len(pixels["pixel_values"]), -1), grid_13)
        features = VisionFeatures(tokens_NE, grid=None, projected=states.pooler_output)
        return [ImageFeatures(features, self._beside(states))]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        return self._projected(chosen_features(image, choice)), choice.indices_K

    def _normed(self, hidden_PE: Tensor) -> Tensor:
        normed_PE: Tensor = self._tower.merger.ln_q(hidden_PE)
        return normed_PE

    def _projected(self, tokens_KE: Tensor) -> Tensor:
        projected_KH: Tensor = self._tower.merger.mlp(tokens_KE)
        return projected_KH

    def _in_raster_order(self, tokens_NE: Tensor, grid_13: Tensor) -> Tensor:
        return tokens_NE

    def _beside(self, states: Any) -> dict[str, Tensor]:
        """What else goes into the decoder."""
        return {}


class Qwen25VLReference(Qwen2VLReference):
    """Qwen2.5-VL in transformers; the tower leaves its tokens in the order of its windows."""

    def _in_raster_order(self, tokens_NE: Tensor, grid_13: Tensor) -> Tensor:
        tower = self._tower
        order_N, _ = get_vision_window_index(
            grid_13, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return tokens_NE[order_N.argsort()]


class Qwen3VLReference(Qwen2VLReference):
    """Qwen3-VL in transformers; features of DeepStack lie behind the embedding, [K, (1 + deepstack_levels) * H]."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        super().__init__(checkpoint, dtype, companions)
        deepstack_levels = len(self._tower.deepstack_visual_indexes)
        self.embedding = _WithEmptyLevels(self.embedding, deepstack_levels)
        self.language_model = _Stacked(self.language_model, deepstack_levels)

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        embeds_KH, places_K = super().tokens(image, choice)
        levels = [level for name, level in sorted(image.beside.items()) if name.startswith("level.")]
        kept = [level[torch.from_numpy(choice.indices_K)] for level in levels]
        return torch.cat([embeds_KH, *kept], dim=-1), places_K

    def _normed(self, hidden_PE: Tensor) -> Tensor:
        normed_PE: Tensor = self._tower.merger.norm(hidden_PE)
        return normed_PE

    def _projected(self, tokens_KE: Tensor) -> Tensor:
        merger = self._tower.merger
        projected_KH: Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(tokens_KE)))
        return projected_KH

    def _beside(self, states: Any) -> dict[str, Tensor]:
        return {f"level.{number}": level for number, level in enumerate(states.deepstack_features)}


class _WithEmptyLevels(nn.Module):
    """[T] -> [T, (1 + deepstack_levels) * H]: text has nothing to add between the layers."""

    def __init__(self, embedding: nn.Module, deepstack_levels: int) -> None:
        super().__init__()
        self._embedding, self._levels = embedding, deepstack_levels

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings, and zeros for every level."""
        embeds: Tensor = self._embedding(ids)
        return nn.functional.pad(embeds, (0, self._levels * embeds.shape[-1]))


class _Stacked:
    """The decoder, called as transformers calls it: DeepStack features apart, for the visual tokens alone, found by a mask."""

    def __init__(self, language_model: Any, deepstack_levels: int) -> None:
        self._language_model, self._levels = language_model, deepstack_levels

    def __call__(self, *, inputs_embeds: Tensor, **options: Any) -> Any:
        """Run the decoder on embeddings [B, S, (1 + deepstack_levels) * H]."""
        embeds_BSH, *deepstack_levels = inputs_embeds.chunk(1 + self._levels, dim=-1)
        visual_BS = torch.stack(deepstack_levels).ne(0).any(dim=-1).any(dim=0)
        if visual_BS.any():
            options["visual_pos_masks"] = visual_BS
            options["deepstack_visual_embeds"] = [level[visual_BS] for level in deepstack_levels]
        return self._language_model(inputs_embeds=embeds_BSH, **options)
