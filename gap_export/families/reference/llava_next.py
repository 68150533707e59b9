"""LLaVA-NeXT as transformers computes it, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features, clip_features
from gap_export.families.reference.lines import grids_of, with_lines
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice

_WHOLE = 0


class LlavaNextReference:
    """LLaVA-NeXT in transformers, as a `ReferenceModel`."""

    grid = None

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        model: Any = LlavaNextForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        self.dtype, self.image_token_id = dtype, model.config.image_token_id
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._newline_H, self._feature_layer = model.model.image_newline, model.config.vision_feature_layer

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        values_tCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        tiles = clip_features(self._tower, values_tCHW, self._feature_layer, grid=None)
        token_index = torch.from_numpy(pixels["token_index"])
        shown = [tile.shown for tile in tiles]
        patches_NE = torch.cat([tile.patches for tile in shown])[token_index]
        features = VisionFeatures(
            patches_NE,
            grid=None,
            grids=grids_of(pixels, len(shown[_WHOLE].patches)),
            attention=_of_tokens([tile.attention for tile in shown], token_index),
            class_token=shown[_WHOLE].class_token,
            mean_keys=_of_tokens([tile.mean_keys for tile in shown], token_index),
            full_width_attention=_of_tokens([tile.full_width_attention for tile in shown], token_index),
            full_width_keys=_of_tokens([tile.full_width_keys for tile in shown], token_index),
            projected=self._projector(patches_NE),
            tile=token_index // len(shown[_WHOLE].patches),
        )
        beside = {
            "normed": torch.cat([tile.beside["normed"] for tile in tiles])[token_index],
            "places": torch.from_numpy(pixels["token_positions"]),
            "lines": torch.from_numpy(pixels["newline_positions"]),
        }
        return [ImageFeatures(features, beside)]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        places, lines = image.beside["places"], image.beside["lines"]
        kept_KH = self._projector(chosen_features(image, choice))
        return with_lines(kept_KH, places.numpy()[choice.indices_K], self._newline_H, lines.numpy())


def _of_tokens(of_tiles: list[Tensor | None], token_index: Tensor) -> Tensor | None:
    """What the tiles show, in the order of the image's tokens."""
    fields = [field for field in of_tiles if field is not None]
    return torch.cat(fields)[token_index] if fields else None
