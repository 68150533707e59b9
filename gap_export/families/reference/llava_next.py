"""LLaVA-NeXT as transformers computes it, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from gap_export.families.reference import Shown
from gap_export.families.reference.clip import chosen_features, shown_by_clip
from gap_export.families.reference.lines import with_lines
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune.reference import Choice

_OF_PATCHES = ("patches_NE", "attention_N", "keys_ND", "normed_NE", "following_attention_N")
_WHOLE = 0


class LlavaNextReference:
    """See `ReferenceModel`."""

    grid = None

    def __init__(self, checkpoint: Path, dtype: torch.dtype, parts: Mapping[str, Path]) -> None:
        model: Any = LlavaNextForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        self.dtype, self.image_token_id = dtype, model.config.image_token_id
        self.embedding = model.get_input_embeddings()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._newline_H, self._feature_layer = model.model.image_newline, model.config.vision_feature_layer

    def see(self, pixels: PixelInputs) -> list[Shown]:
        """See `ReferenceModel.see`."""
        values_tCHW = torch.from_numpy(pixels["pixel_values"]).to(self.dtype)
        tiles = shown_by_clip(self._tower, values_tCHW, self._feature_layer)
        for tile in tiles:
            tile["following_attention_N"] = _following_attention(tile)
        cells = torch.from_numpy(pixels["cells"])
        image: Shown = {name: _of_cells(tiles, name, cells) for name in _OF_PATCHES}
        keys_NE = _of_cells(
            [{"keys": None if (keys := tile["following_keys_TE"]) is None else keys[1:]} for tile in tiles],
            "keys",
            cells,
        )
        whole_keys_TE = tiles[_WHOLE]["following_keys_TE"]
        if keys_NE is not None and whole_keys_TE is not None:
            image["following_keys_TE"] = torch.cat([whole_keys_TE[:1], keys_NE])
        image["class_token_E"] = tiles[_WHOLE]["class_token_E"]
        image["projected_NH"] = self._projector(image["patches_NE"])
        image["tile_N"] = cells // len(tiles[_WHOLE]["patches_NE"])  # type: ignore[arg-type]
        image["places"] = torch.from_numpy(pixels["cell_positions"])
        image["lines"] = torch.from_numpy(pixels["newline_positions"])
        return [image]

    def tokens(self, shown: Shown, choice: Choice) -> tuple[Tensor, Ids]:
        """See `ReferenceModel.tokens`."""
        places, lines = shown["places"], shown["lines"]
        assert places is not None
        assert lines is not None
        kept_KH = self._projector(chosen_features(shown, choice.indices_K, choice.patches_KE))
        return with_lines(kept_KH, places.numpy()[choice.indices_K], self._newline_H, lines.numpy())


def _of_cells(tiles: list[Shown], name: str, cells: Tensor) -> Tensor | None:
    """What the tiles show, in the order of the image's tokens."""
    fields = [field for tile in tiles if (field := tile[name]) is not None]
    return torch.cat(fields)[cells] if fields else None


def _following_attention(tile: Shown) -> Tensor | None:
    query_E, keys_TE = tile["following_query_E"], tile["following_keys_TE"]
    if query_E is None or keys_TE is None:
        return None
    logits_T = keys_TE.double() @ query_E.double() / len(query_E) ** 0.5
    attention_N: Tensor = logits_T.softmax(dim=0)[1:]
    return attention_N
