"""LLaVA-NeXT (1.6): AnyResLayout tiles through a CLIP tower, ends of lines, Vicuna or Mistral decoder (`model_type: llava_next`).

Facts: the first tile is the whole image, squashed; the others are those of a grid that the image is scaled into, with black
bars, which are cut off again as far as they fill whole rows or columns of tokens. Each row of the grid ends with `image_newline`
(`mm_patch_merge_type: spatial_unpad`). Boxes are `[x1, y1, x2, y2]` in 0..1 of the padded square, as in LLaVA-1.5, whose grounding data
this model was trained with.

The vision tower is not that of OpenAI (it was trained on), so its weights come from the checkpoint.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration
from typing_extensions import override

from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.vision_inputs import anyres_inputs
from gap_export.checkpoint import Checkpoint
from gap_export.families import frames
from gap_export.families.base import Family
from gap_export.inputs.layouts import AnyResLayout
from gap_export.inputs.prompt import TextTower
from gap_export.modeling import hf_config, selection, sizes
from gap_export.modeling.clip import ClipVision
from gap_export.modeling.clip_text import published_tower, read_text_tower, text_tower_of
from gap_export.modeling.components import ModelParts
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.tiles import features_of_image, lined_grids, token_gather, with_newlines
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

GROUNDING_PROMPTS = {
    "llama": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        f"polite answers to the human's questions. USER: <image>\n{frames.LLAVA_QUESTION} ASSISTANT:"
    ),
    "mistral": f"[INST] <image>\n{frames.LLAVA_QUESTION} [/INST]",
}
FRAMES = {"llama": frames.LLAVA_NEXT_VICUNA, "mistral": frames.LLAVA_NEXT_MISTRAL}
"""By the decoder's `model_type`, as the prompts are: what the published checkpoints with such decoders were trained in."""

WHOLE = 0
"""The tile that shows the whole image."""


class LlavaNextVision(ClipVision):
    """Tiles of one image through the CLIP tower; pruner over the whole image; projector; ends of lines."""

    def __init__(self, model: Any, plan: Plan, **options: Any) -> None:
        super().__init__(model.model.vision_tower, model.model.multi_modal_projector, plan, **options)
        self.image_newline: nn.Parameter = model.model.image_newline

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        token_positions: Tensor,
        newline_positions: Tensor,
        token_index: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [tiles, 3, size, size] float32, the whole image first.
            token_positions: [P] int64, places of prunable tokens in the unpruned prompt's image.
            newline_positions: [R] int64, places of the ends of lines.
            token_index: [P] int64, where the prunable tokens lie in the flattened tokens of all tiles.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: prunable tokens to keep.

        Returns:
            visual_embeds [1, K + R, H], kept_indices [1, K + R] int64.
        """
        tiles = self.extract_features(pixel_values, text_ids)
        grids = lined_grids(token_positions, newline_positions, tiles.patches.shape[1])
        features = features_of_image(tiles, token_gather(token_index), WHOLE, grids=grids)
        selected = selection.select(self._plan, features, keep_count)
        embeds_BKH = selection.project(self._plan, features, selected, self.multi_modal_projector)
        return with_newlines(
            self._plan, embeds_BKH, selected, token_positions, self.image_newline, newline_positions
        )


class LlavaNext(Family):
    """LLaVA-NeXT."""

    grounding_question = frames.LLAVA_QUESTION

    @override
    def read_config(self) -> Any:
        config, check = hf_config.read_config(self.checkpoint), self.check
        vision, text = config.vision_config, config.text_config
        check("vision_config.model_type", vision.model_type == "clip_vision_model", "CLIP")
        check("text_config.model_type", text.model_type in GROUNDING_PROMPTS, ", ".join(GROUNDING_PROMPTS))
        check("text_config.sliding_window", getattr(text, "sliding_window", None) is None, "null")
        default = config.vision_feature_select_strategy == "default"
        check("vision_feature_select_strategy", default, "default")
        sizes.check_square_tower(vision, check)
        hf_config.check_whole_tiles(config, check)
        return config

    @property
    def _feature_layer(self) -> int:
        """How many layers of the tower are run."""
        config = self.config
        return hf_config.feature_layer(config.vision_feature_layer, config.vision_config, self.check)

    @cached_property
    def _tiles(self) -> AnyResLayout:
        return hf_config.anyres_layout(self.checkpoint, self.config, self.check)

    @property
    @override
    def frame(self) -> frames.Frame:
        return FRAMES[self.config.text_config.model_type]

    @property
    @override
    def grounding_prompt(self) -> str:
        return GROUNDING_PROMPTS[self.config.text_config.model_type]

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        _ = self._feature_layer  # one that is not supported is refused by now
        return self.spec_of_varying_images(
            self._tiles.token_range(),
            published_tower=published_tower(self.config.vision_config),
        )

    @override
    def layout(self, recipe: Recipe) -> AnyResLayout:
        self.check_no_fit(recipe)
        return self._tiles

    @override
    def text_tower(self, companion: Checkpoint) -> TextTower:
        return read_text_tower(companion, tower_width=self.config.vision_config.hidden_size)

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        mode = fake_mode()
        model = self.fake_model(LlavaNextForConditionalGeneration, plan, mode)
        text = text_tower_of(self.checkpoint, plan, mode)
        return ModelParts(
            vision=LlavaNextVision(model, plan, feature_layer=self._feature_layer, text=text),
            vision_inputs=anyres_inputs(self._tiles),
            language_model=model.model.language_model,
            lm_head=model.lm_head,
            vision_layers=LayerStack("vision_tower.encoder.layers", (range(self._feature_layer - 1),)),
        )
