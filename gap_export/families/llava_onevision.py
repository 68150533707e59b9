"""LLaVA-OneVision: AnyResLayout tiles through a SigLIP tower, ends of lines, Qwen2 decoder (`model_type: llava_onevision`).

Facts: tiles as in LLaVA-NeXT, up to 36 of them; a grid with clearly more tokens than nine tiles have is scaled down bilinearly, after
the projector (`anyres_max_9`). Tokens of such a grid are what is pruned: places count them. The tower has no class token, and
features are those of its last layer before its last norm (`vision_feature_layer: -1`); so are scores, attention that the patches of a tile
receive from each other.

Projectors are not linear, so that an image's tokens are made from projected ones: all of them are projected. What is known of a token of a
scaled-down grid (scores, keys) is the same weighted sum, and its tile is that of the token which weighs most.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration
from typing_extensions import override

from gap_export import prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.vision_inputs import anyres_inputs
from gap_export.families import frames
from gap_export.families.base import Family
from gap_export.inputs.layouts import AnyResLayout
from gap_export.modeling import hf_config, selection, sizes
from gap_export.modeling.components import ModelParts
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.received import received
from gap_export.modeling.text_embedding import embedding_for, with_text
from gap_export.modeling.tiles import (
    corners_gather,
    features_of_image,
    heaviest_corner_gather,
    lined_grids,
    with_newlines,
)
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

GROUNDING_PROMPT = f"<|im_start|>user\n<image>\n{frames.LLAVA_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
"""As transformers tests the chat template of the published checkpoints."""


WHOLE = 0
"""The tile that shows the whole image."""


class LlavaOnevisionVision(nn.Module):
    """Tiles of one image through the SigLIP tower and the projector; scaling down; pruner over the whole image; ends of lines."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        self.image_newline: nn.Parameter = model.model.image_newline
        self._plan = plan
        self.embed_tokens = embedding_for(plan, model.get_input_embeddings())

    def forward(
        self,
        pixel_values: Tensor,
        token_positions: Tensor,
        newline_positions: Tensor,
        corners: Tensor,
        corner_weights: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [tiles, 3, size, size] float32, the whole image first.
            token_positions: [P] int64, places of prunable tokens in the unpruned prompt's image.
            newline_positions: [R] int64, places of the ends of lines.
            corners: [P, 4] int64, the four tokens among those of all tiles, flattened, that a prunable token is the sum of.
            corner_weights: [P, 4] float32, their weights.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: prunable tokens to keep.

        Returns:
            visual_embeds [1, K + R, H], kept_indices [1, K + R] int64.
        """
        hidden_tCE = self.vision_tower.embeddings(pixel_values)
        *layers, last = self.vision_tower.encoder.layers
        for layer in layers:
            hidden_tCE = layer(hidden_tCE, None)
        projected_tCH = self.multi_modal_projector(last(hidden_tCE, None))
        tiles = prune.VisionFeatures(
            patches=projected_tCH, grid=None, projected=projected_tCH, **_scores(last, hidden_tCE)
        )
        pick = heaviest_corner_gather(corners, corner_weights)
        grids = lined_grids(token_positions, newline_positions, projected_tCH.shape[1])
        features = features_of_image(
            tiles, corners_gather(corners, corner_weights), WHOLE, grids=grids, pick=pick
        )
        features = with_text(features, self.embed_tokens, text_ids)
        selected = selection.select(self._plan, features, keep_count)
        embeds_BKH = selection.project(self._plan, features, selected, nn.Identity())
        return with_newlines(
            self._plan, embeds_BKH, selected, token_positions, self.image_newline, newline_positions
        )


def _scores(layer: Any, hidden_tCE: Tensor) -> dict[str, Any]:
    """Fields of `prune.VisionFeatures`, from a layer of the tower and its input."""
    attention, normed_tCE = layer.self_attn, layer.layer_norm1(hidden_tCE)
    heads = (attention.num_heads, attention.head_dim)
    query_tACD, keys_tACD = (
        project(normed_tCE).unflatten(-1, heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    return received(query_tACD, keys_tACD)


class LlavaOnevision(Family):
    """LLaVA-OneVision; the 0.5B model's head is its token embedding."""

    frame = frames.LLAVA_ONEVISION
    grounding_question = frames.LLAVA_QUESTION
    grounding_prompt = GROUNDING_PROMPT

    @override
    def read_config(self) -> Any:
        config, check = hf_config.read_config(self.checkpoint), self.check
        vision, text = config.vision_config, config.text_config
        check("vision_config.model_type", vision.model_type == "siglip_vision_model", "SigLIP")
        check("text_config.model_type", text.model_type == "qwen2", "qwen2")
        check("text_config.use_sliding_window", text.sliding_window is None, "false")
        layer = hf_config.feature_layer(config.vision_feature_layer, vision, check)
        check("vision_feature_layer", layer == vision.num_hidden_layers, "-1, the last")
        check("vision_feature_select_strategy", config.vision_feature_select_strategy == "full", "full")
        counted = re.fullmatch(r"anyres_max_[1-9][0-9]{0,2}", config.vision_aspect_ratio) is not None
        check("vision_aspect_ratio", counted, "anyres_max_9 or another number")
        sizes.check_square_tower(vision, check, cuts_off=True)
        hf_config.check_whole_tiles(config, check)
        return config

    @cached_property
    def _tiles(self) -> AnyResLayout:
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        tiles = hf_config.anyres_layout(self.checkpoint, self.config, self.check)
        return tiles.model_copy(update={"max_tiles": most})

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        return self.spec_of_varying_images(self._tiles.token_range())

    @override
    def layout(self, recipe: Recipe) -> AnyResLayout:
        self.check_no_fit(recipe)
        return self._tiles

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        model = self.fake_model(LlavaOnevisionForConditionalGeneration, plan)
        return ModelParts(
            vision=LlavaOnevisionVision(model, plan),
            vision_inputs=anyres_inputs(self._tiles),
            language_model=model.model.language_model,
            lm_head=model.lm_head,
            vision_layers=LayerStack(
                "vision_tower.encoder.layers", (range(self.config.vision_config.num_hidden_layers - 1),)
            ),
        )
