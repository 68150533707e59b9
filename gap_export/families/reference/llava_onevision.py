"""LLaVA-OneVision as transformers computes it, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features
from gap_export.families.reference.lines import with_lines
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice


class LlavaOnevisionReference:
    """LLaVA-OneVision in transformers, as a `ReferenceModel`."""

    grid = None

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        self.dtype, self.image_token_id = dtype, model.config.image_token_id
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._newline_H = model.model.image_newline

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        values_tCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        features_tCE = self._tower(values_tCHW, output_hidden_states=True).hidden_states[-1]
        tokens_H = self._projector(features_tCE).flatten(0, 1)
        corners_P4H = tokens_H[torch.from_numpy(pixels["corners"])].float()
        weights_P4 = torch.from_numpy(pixels["corner_weights"])
        projected_NH = (corners_P4H * weights_P4[..., None]).sum(dim=1).to(self.dtype)
        beside = {
            "places": torch.from_numpy(pixels["token_positions"]),
            "lines": torch.from_numpy(pixels["newline_positions"]),
        }
        return [ImageFeatures(VisionFeatures(projected_NH, grid=None, projected=projected_NH), beside)]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        places, lines = image.beside["places"], image.beside["lines"]
        kept_KH = chosen_features(image, choice)
        return with_lines(kept_KH, places.numpy()[choice.indices_K], self._newline_H, lines.numpy())
