"""What reads the expression in the reference: transformers' own CLIP text tower, or the decoder's token embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError, first_line
from gap_export.families.reference import ImageFeatures, ReferenceModel, quiet_loading
from gap_export.inputs.prompt import TextTower
from gap_export.modeling.config_fields import check_values
from gap_export.positions import Ids


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
        check_values(open_checkpoint(checkpoint))
        try:
            with quiet_loading():  # it would report what else a CLIP checkpoint holds
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
        except Exception as error:  # transformers raises what it meets
            raise CheckpointError(
                f"could not be loaded by transformers: {first_line(error)}",
                subject=str(checkpoint),
                hint="the reference needs the text tower the bundle was built with",
            ) from error

    def embedded(self, text_ids_BL: Ids, model: ReferenceModel) -> Tensor:
        """[B, P]: every expression by itself, without padding."""
        rows = []
        for ids_L in text_ids_BL:
            end = int(np.flatnonzero(ids_L == ids_L[-1])[0])
            rows.append(self._model(input_ids=torch.from_numpy(ids_L[None, : end + 1])).text_embeds[0])
        return torch.stack(rows)

    def aligned(self, image: ImageFeatures) -> Tensor:
        """[N, P]: patches after the vision tower's last norm."""
        aligned_NP: Tensor = image.beside["normed"].float() @ self._visual_projection_PE.T
        return aligned_NP


class EmbeddingReference:
    """The decoder's token embedding as what reads the expression."""

    aligned_inversely = False

    def embedded(self, text_ids_BL: Ids, model: ReferenceModel) -> Tensor:
        """[B, H]: direction of the mean embedding of every expression by itself, without padding."""
        means = []
        for ids_L in text_ids_BL:
            embeds_LX = model.embedding(torch.from_numpy(ids_L[ids_L >= 0])[None])[0].double()
            means.append(embeds_LX.mean(dim=0)[: self._width(model)])
        return _directions(torch.stack(means))

    def aligned(self, image: ImageFeatures) -> Tensor:
        """[N, H]: directions of the projected tokens."""
        projected_NH = image.shown.projected
        assert projected_NH is not None
        return _directions(projected_NH.double())

    @staticmethod
    def _width(model: ReferenceModel) -> int:
        """Of the decoder: behind an embedding may lie levels of DeepStack."""
        head: Any = model.lm_head
        width: int = head.weight.shape[1]
        return width


def _directions(vectors: Tensor) -> Tensor:
    """Vectors of length one."""
    directions: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return directions


TextReader = TextReference | EmbeddingReference
