"""The Qwen-VL models as transformers computes them, one image at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from gap_export.families.reference import ImageFeatures
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import Grid, VisionFeatures
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
        attention = self._tower.blocks[self._scoring].attn
        with _first_call(attention) as given:
            states = self._tower(patches_PF, grid_thw=grid_13)
        query_PAD, keys_PAD = _query_and_keys(attention, **given)

        def of_tokens(of_patches: Tensor) -> Tensor:
            """[N, p, ...]: of the patches of every token, in raster order."""
            return self._in_raster_order(of_patches.unflatten(0, (len(pixels["pixel_values"]), -1)), grid_13)

        def full_width(heads_PAD: Tensor) -> Tensor:
            return heads_PAD.flatten(1)[:, None]

        features = VisionFeatures(
            states.pooler_output,
            grid=None,
            grids=(Grid(rows // self._tower.spatial_merge_size, columns // self._tower.spatial_merge_size),),
            attention=lambda: of_tokens(_received(query_PAD, keys_PAD)).mean(dim=1),
            mean_keys=lambda: of_tokens(keys_PAD.mean(dim=1)).mean(dim=1),
            full_width_attention=lambda: of_tokens(
                _received(full_width(query_PAD), full_width(keys_PAD))
            ).sum(dim=1),
            full_width_keys=lambda: of_tokens(keys_PAD.flatten(1)).mean(dim=1),
            projected=states.pooler_output,
            embeds=torch.cat([states.pooler_output, *self._levels(states)], dim=-1),
        )
        return [ImageFeatures(features)]

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """Embeddings [K, (1 + deepstack_levels) * H] that enter the decoder, and their places [K] int64 in the unpruned prompt."""
        embeds_NX = image.shown.embeds
        assert embeds_NX is not None
        if choice.patches_KE is not None:
            return torch.from_numpy(choice.patches_KE).to(embeds_NX.dtype), choice.indices_K
        return embeds_NX[torch.from_numpy(choice.indices_K)], choice.indices_K

    @property
    def _scoring(self) -> int:
        """The last layer in which all patches attend to all."""
        return len(self._tower.blocks) - 1

    def _in_raster_order(self, tokens: Tensor, grid_13: Tensor) -> Tensor:
        return tokens

    def _levels(self, states: Any) -> list[Tensor]:
        """[N, H] each, what goes into the decoder behind the embedding."""
        return []


class Qwen25VLReference(Qwen2VLReference):
    """Qwen2.5-VL in transformers; the tower leaves its tokens in the order of its windows."""

    @property
    def _scoring(self) -> int:
        return max(self._tower.fullatt_block_indexes, default=super()._scoring)

    def _in_raster_order(self, tokens: Tensor, grid_13: Tensor) -> Tensor:
        tower = self._tower
        order_N, _ = get_vision_window_index(
            grid_13, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return tokens[order_N.argsort()]


class Qwen3VLReference(Qwen2VLReference):
    """Qwen3-VL in transformers; features of DeepStack lie behind the embedding, [K, (1 + deepstack_levels) * H]."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, companions: Mapping[str, Path]) -> None:
        super().__init__(checkpoint, dtype, companions)
        deepstack_levels = len(self._tower.deepstack_visual_indexes)
        self.embedding = _WithEmptyLevels(self.embedding, deepstack_levels)
        self.language_model = Stacked(self.language_model, deepstack_levels)

    def _levels(self, states: Any) -> list[Tensor]:
        return list(states.deepstack_features)


@contextmanager
def _first_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Filled in with what the module is called with: its input under `hidden`, and everything given by name."""
    given: dict[str, Any] = {}

    def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        given.update(hidden=inputs[0], **options)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def _query_and_keys(
    attention: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> tuple[Tensor, Tensor]:
    """[P, A, D] each, rotated, float32."""
    query_PE, keys_PE, _values = attention.qkv(hidden).chunk(3, dim=-1)
    query_PAD, keys_PAD = (part.unflatten(-1, (attention.num_heads, -1)) for part in (query_PE, keys_PE))
    rotated_PAD = apply_rotary_pos_emb_vision(query_PAD, keys_PAD, *position_embeddings)
    return rotated_PAD[0].float(), rotated_PAD[1].float()


def _received(query_PAD: Tensor, keys_PAD: Tensor) -> Tensor:
    """[P] float64: column means of the attention map, mean over heads."""
    columns = [
        (query_PD.double() @ keys_PD.double().T / query_PD.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=0)
        for query_PD, keys_PD in zip(query_PAD.unbind(1), keys_PAD.unbind(1), strict=True)
    ]
    return torch.stack(columns).mean(dim=0)


class _WithEmptyLevels(nn.Module):
    """[T] -> [T, (1 + deepstack_levels) * H]: text has nothing to add between the layers."""

    def __init__(self, embedding: nn.Module, deepstack_levels: int) -> None:
        super().__init__()
        self._embedding, self._levels = embedding, deepstack_levels

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings, and zeros for every level."""
        embeds: Tensor = self._embedding(ids)
        return nn.functional.pad(embeds, (0, self._levels * embeds.shape[-1]))


class Stacked:
    """The decoder, called as transformers calls it: DeepStack features apart, for the visual tokens alone, found by a mask.

    Attributes:
        language_model: of transformers.
        deepstack_levels: how many features lie behind each embedding.
    """

    def __init__(self, language_model: Any, deepstack_levels: int) -> None:
        self.language_model, self.deepstack_levels = language_model, deepstack_levels

    def __call__(self, *, inputs_embeds: Tensor, **options: Any) -> Any:
        """Run the decoder on embeddings [B, S, (1 + deepstack_levels) * H]."""
        embeds_BSH, *deepstack_levels = inputs_embeds.chunk(1 + self.deepstack_levels, dim=-1)
        visual_BS = torch.stack(deepstack_levels).ne(0).any(dim=-1).any(dim=0)
        if visual_BS.any():
            options["visual_pos_masks"] = visual_BS
            options["deepstack_visual_embeds"] = [level[visual_BS] for level in deepstack_levels]
        return self.language_model(inputs_embeds=embeds_BSH, **options)
