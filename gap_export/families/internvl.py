"""InternVL: dynamic tiles through InternViT, four patches to a token, Qwen2 or Llama decoder (`model_type: internvl`).

Facts: the image is stretched to the grid of tiles whose shape is nearest to its own; the whole image follows as the last tile.
Features are those of the last layer, class token dropped. Squares of two by two patches are laid side by side (`pixel_shuffle`) and
projected together, so that a token's score and key are the means over its four patches, and pruners that merge add up projected tokens. Position ids count, in one row. Boxes
are `[[x1, y1, x2, y2]]` in 0..1000 of the image's own width and height.

The class token is a quarter as wide as what the projector takes: it can score, but not enter the decoder.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLModel
from typing_extensions import override

from gap_export import prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.vision_inputs import tile_pixels
from gap_export.families import frames
from gap_export.families.base import Family
from gap_export.inputs.layouts import DynamicTilesLayout
from gap_export.modeling import hf_config, selection, sizes
from gap_export.modeling.components import ModelParts
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.text_embedding import embedding_for, with_text
from gap_export.modeling.tiles import Gather, features_of_image
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{expression}</ref>"
GROUNDING_PROMPT = (
    f"<|im_start|>user\n<img><IMG_CONTEXT></img>\n{_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
"""As the chat template and the processor of the published checkpoints write it, one `<IMG_CONTEXT>` standing for all."""

_DEFAULT_TILES = (1, 12)
"""Fewest and most tiles of a grid where the processor's settings leave it open."""


class InternVLVision(nn.Module):
    """Tiles of one image through InternViT; pruner over the whole image; projector."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        self._shrink, self._plan = model.config.downsample_ratio, plan
        self.embed_tokens = embedding_for(plan, model.get_input_embeddings())

    def forward(
        self, pixel_values: Tensor, text_ids: Tensor | None = None, keep_count: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [tiles, 3, size, size] float32, the whole image last.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, H], kept_indices [1, K] int64.
        """
        every: Gather = lambda tokens_tCE: tokens_tCE.flatten(0, 1)[None]  # noqa: E731
        tiles = self._extract_features(pixel_values)
        side = math.isqrt(tiles.patches.shape[1])
        grids = (prune.Grid(side, side, count=pixel_values.shape[0]),)
        features = features_of_image(tiles, every, whole=-1, grids=grids)
        features = with_text(features, self.embed_tokens, text_ids)
        embeds_BKH, selected = selection.select_and_project(
            self._plan, features, keep_count, self.multi_modal_projector
        )
        return selection.outputs(embeds_BKH, selected)

    def _extract_features(self, pixel_values: Tensor) -> prune.VisionFeatures[Tensor]:
        """Features of the tiles. A token stands for a square of four patches: its scores and keys are means over them."""
        hidden_tTE = self.vision_tower.embeddings(pixel_values)
        *layers, last = self.vision_tower.encoder.layer
        for layer in layers:
            hidden_tTE = layer(hidden_tTE)
        attention, normed_tTE = last.attention, last.layernorm_before(hidden_tTE)
        query_tE = attention.q_norm(attention.q_proj(normed_tTE[:, 0]))
        keys_tTE = attention.k_norm(attention.k_proj(normed_tTE))
        heads = (attention.num_heads, attention.head_dim)
        keys_tATD = keys_tTE.unflatten(-1, heads).transpose(1, 2)
        scores_tC = prune.class_attention(query_tE.unflatten(-1, heads), keys_tATD)
        weights_tC = prune.class_attention(query_tE[:, None], keys_tTE[:, None])
        patches_tCE = self.vision_tower.layernorm(last(hidden_tTE))[:, 1:]

        side = round(patches_tCE.shape[1] ** 0.5)
        # (transformers' own rearrangement, which does not look at the model that it is a method of.)
        shuffled = InternVLModel.pixel_shuffle(
            None,
            patches_tCE.unflatten(1, (side, side)),
            scale_factor=self._shrink,
        )
        tokens_tCE = shuffled.flatten(1, 2)
        projected_tCH = self.multi_modal_projector(tokens_tCE)
        return prune.VisionFeatures(
            patches=tokens_tCE,
            grid=None,
            projected=projected_tCH,
            embeds=projected_tCH,
            attention=self._means(scores_tC[..., None], side)[..., 0],
            mean_keys=self._means(prune.mean_keys(keys_tATD), side),
            full_width_attention=self._means(weights_tC[..., None], side)[..., 0] / self._shrink**2,
            full_width_keys=self._means(keys_tTE[:, 1:].float(), side),
        )

    def _means(self, patches_tCE: Tensor, side: int) -> Tensor:
        """Means over the patches of each token, in the order of `pixel_shuffle`: [t, side * side, E] -> a quarter of the rows."""
        step = round(1 / self._shrink)
        squares = patches_tCE.unflatten(1, (side // step, step, side // step, step))
        means_tCE: Tensor = squares.mean(dim=(2, 4)).flatten(1, 2)
        return means_tCE


class InternVL(Family):
    """InternVL 3; heads of small models are their token embedding."""

    frame = frames.INTERNVL
    grounding_question = _QUESTION
    grounding_prompt = GROUNDING_PROMPT
    placeholder = "<IMG_CONTEXT>"

    @override
    def read_config(self) -> Any:
        config, check = hf_config.read_config(self.checkpoint), self.check
        vision, text = config.vision_config, config.text_config
        decoders = ("qwen2", "qwen3", "llama")
        check("vision_config.model_type", vision.model_type == "internvl_vision", "InternViT")
        check("text_config.model_type", text.model_type in decoders, ", ".join(decoders))
        check("text_config.use_sliding_window", getattr(text, "sliding_window", None) is None, "false")
        layer = hf_config.feature_layer(config.vision_feature_layer, vision, check)
        check("vision_feature_layer", layer == vision.num_hidden_layers, "-1, the last")
        default = config.vision_feature_select_strategy == "default"
        check("vision_feature_select_strategy", default, "default")
        check("vision_config.image_size", len({*vision.image_size}) == 1, "squares")
        check("vision_config.patch_size", len({*vision.patch_size}) == 1, "squares")
        sizes.check_square_tower(vision, check)
        patches, step = vision.image_size[0] // vision.patch_size[0], 1 / config.downsample_ratio
        divides = step.is_integer() and patches % step == 0
        check("downsample_ratio", divides, "one that divides the patches of a tile")
        return config

    @cached_property
    def _tiles(self) -> DynamicTilesLayout:
        vision = self.config.vision_config
        size, patch = vision.image_size[0], vision.patch_size[0]
        settings = hf_config.checked_processor(self.checkpoint, self.check, size)
        side = round(size // patch * self.config.downsample_ratio)
        self.check(
            "image_seq_length", self.config.image_seq_length == side * side, f"{side * side}, a tile's tokens"
        )
        minimum, maximum = (
            settings.get(field) or default
            for field, default in zip(("min_patches", "max_patches"), _DEFAULT_TILES, strict=True)
        )
        bounded = isinstance(minimum, int) and isinstance(maximum, int) and 1 <= minimum <= maximum
        self.check(
            f"min_patches, max_patches{hf_config.OF_PROCESSOR}",
            bounded,
            "a smallest and a largest number of tiles",
        )
        return DynamicTilesLayout(
            size=size,
            tokens=side * side,
            min_tiles=minimum,
            max_tiles=maximum,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        return self.spec_of_varying_images(self._tiles.token_range())

    @override
    def layout(self, recipe: Recipe) -> DynamicTilesLayout:
        self.check_no_fit(recipe)
        return self._tiles

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        model = self.fake_model(InternVLForConditionalGeneration, plan)
        return ModelParts(
            vision=InternVLVision(model, plan),
            vision_inputs=(tile_pixels(self._tiles),),
            language_model=model.model.language_model,
            lm_head=model.lm_head,
            vision_layers=LayerStack(
                "vision_tower.encoder.layer", (range(self.config.vision_config.num_hidden_layers),)
            ),
        )
