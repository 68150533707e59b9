"""LLaVA-1.5 as transformers computes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features, clip_features
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune.reference import Choice


class LlavaReference:
    """LLaVA-1.5 in transformers, as a `ReferenceModel`."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        self.dtype, self.image_token_id, self.grid = dtype, model.config.image_token_id, (side, side)
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._feature_layer = model.config.vision_feature_layer

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        values_BCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        return clip_features(
            self._tower, values_BCHW, self._feature_layer, grid=self.grid, projector=self._projector
        )

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        return self._projector(chosen_features(image, choice)), choice.indices_K
