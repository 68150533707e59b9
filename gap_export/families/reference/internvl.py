"""InternVL as transformers computes it, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from gap_export.families.reference import ImageFeatures
from gap_export.families.reference.clip import chosen_features
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import Grid, VisionFeatures
from gap_export.prune.reference import Choice


class InternVLReference:
    """InternVL in transformers, as a `ReferenceModel`."""

    grid = None

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        model: Any = InternVLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        self.dtype, self.image_token_id = dtype, model.config.image_token_id
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self._model, self._projector = model.model, model.model.multi_modal_projector
        self._shrink = model.config.downsample_ratio

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        values_tCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        tower = self._model.vision_tower
        states = tower(values_tCHW, output_hidden_states=True, output_attentions=True)
        last = tower.encoder.layer[-1]
        normed_tTE = last.layernorm_before(states.hidden_states[-2])
        keys_tTE = last.attention.k_norm(last.attention.k_proj(normed_tTE))
        keys_tCD = keys_tTE.float().unflatten(-1, (last.attention.num_heads, -1)).mean(dim=2)[:, 1:]
        attention_tC = states.attentions[-1].float().mean(dim=1)[:, 0, 1:]
        query_tE = last.attention.q_norm(last.attention.q_proj(normed_tTE[:, 0])).double()
        whole_tT = (keys_tTE.double() @ query_tE[..., None] / query_tE.shape[-1] ** 0.5).softmax(dim=1)[
            ..., 0
        ]
        patches_tCE = states.last_hidden_state[:, 1:]
        side = int(patches_tCE.shape[1] ** 0.5)
        squares = self._model.pixel_shuffle(patches_tCE.unflatten(1, (side, side)), scale_factor=self._shrink)
        patches_NE = squares.flatten(0, 2)
        projected_NH, patches = self._projector(patches_NE), round(1 / self._shrink) ** 2
        features = VisionFeatures(
            patches_NE,
            grid=None,
            grids=tuple(Grid(*square.shape[:2]) for square in squares),
            attention=self._over_squares(attention_tC[..., None], side)[..., 0],
            mean_keys=self._over_squares(keys_tCD, side),
            full_width_attention=self._over_squares(whole_tT[:, 1:, None], side)[..., 0] * patches,
            full_width_keys=self._over_squares(keys_tTE[:, 1:].float(), side),
            tile=torch.arange(len(squares)).repeat_interleave(len(patches_NE) // len(squares)),
            projected=projected_NH,
            embeds=projected_NH,
        )
        return [ImageFeatures(features)]

    def _over_squares(self, patches_tCE: Tensor, side: int) -> Tensor:
        """[N, E]: means over the patches of every token, from average pooling."""
        images_tEHW = patches_tCE.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        means_tEHW = torch.nn.functional.avg_pool2d(images_tEHW, round(1 / self._shrink))
        return means_tEHW.permute(0, 2, 3, 1).flatten(0, 2)

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        chosen_KE = chosen_features(image, choice)
        return chosen_KE if choice.patches_KE is not None else self._projector(chosen_KE), choice.indices_K
