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
from gap_export.families.reference.lines import grids_of, with_lines
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
        states = self._tower(values_tCHW, output_hidden_states=True, output_attentions=True)
        corners_P4, weights_P4 = (torch.from_numpy(pixels[name]) for name in ("corners", "corner_weights"))

        def blended(tokens_tCE: Tensor) -> Tensor:
            """[N, E] of the image's tokens."""
            return (tokens_tCE.flatten(0, 1)[corners_P4].float() * weights_P4[..., None]).sum(dim=1)

        projected_NH = blended(self._projector(states.hidden_states[-1])).to(self.dtype)
        last = self._tower.encoder.layers[-1]
        normed_tCE = last.layer_norm1(states.hidden_states[-2])
        query_tCE, keys_tCE = last.self_attn.q_proj(normed_tCE), last.self_attn.k_proj(normed_tCE)
        whole_tCC = (query_tCE.double() @ keys_tCE.double().mT / keys_tCE.shape[-1] ** 0.5).softmax(dim=-1)
        attention_tC, whole_tC = states.attentions[-1].float().mean(dim=(1, 2)), whole_tCC.mean(dim=1)
        tile_tC1 = torch.arange(len(keys_tCE))[:, None, None].expand(-1, keys_tCE.shape[1], 1)
        heaviest_P = corners_P4.gather(1, weights_P4.argmax(dim=1, keepdim=True))[:, 0]
        features = VisionFeatures(
            projected_NH,
            grid=None,
            grids=grids_of(pixels, keys_tCE.shape[1]),
            attention=blended(attention_tC[..., None])[:, 0],
            mean_keys=blended(keys_tCE.unflatten(-1, (last.self_attn.num_heads, -1)).mean(dim=2)),
            full_width_attention=blended(whole_tC[..., None])[:, 0],
            full_width_keys=blended(keys_tCE),
            projected=projected_NH,
            tile=tile_tC1.flatten()[heaviest_P],
        )
        beside = {
            "places": torch.from_numpy(pixels["token_positions"]),
            "lines": torch.from_numpy(pixels["newline_positions"]),
        }
        return [ImageFeatures(features, beside)]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        places, lines = image.beside["places"], image.beside["lines"]
        kept_KH = chosen_features(image, choice)
        return with_lines(kept_KH, places.numpy()[choice.indices_K], self._newline_H, lines.numpy())
