"""LLaVA-NeXT (1.6): AnyResLayout tiles through a CLIP tower, ends of lines, Vicuna or Mistral decoder (`model_type: llava_next`).

Facts: the first tile is the whole image, squashed; the others are those of a grid that the image is scaled into, with black
bars, which are cut off again as far as they fill whole rows or columns of tokens. Each row of the grid ends with `image_newline`
(`mm_patch_merge_type: spatial_unpad`). Boxes are `[x1, y1, x2, y2]` in 0..1 of the padded square, as in LLaVA-1.5, whose grounding data
this model was trained with.

The vision tower is not that of OpenAI (it was trained on), so its weights come from the checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.complete import joined as joined
from gap_export.families.complete import parts as parts
from gap_export.families.complete import tokenizer as tokenizer
from gap_export.inputs.layouts import AnyResLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.inputs.tiles import anyres_range
from gap_export.modeling import assembly, hf_config, selection
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.clip import ClipVision
from gap_export.modeling.clip_text import (
    TEXT_TOWER,
    hollow_text_tower,
    published_tower,
    read_text_tower,
    text_weight_key,
)
from gap_export.modeling.fake import fake_mode, hollow
from gap_export.modeling.tiles import anyres_inputs, cells_gather, features_of_image, with_newlines
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {expression}."
GROUNDING_PROMPTS = {
    "llama": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        f"polite answers to the human's questions. USER: <image>\n{_QUESTION} ASSISTANT:"
    ),
    "mistral": f"[INST] <image>\n{_QUESTION} [/INST]",
}
"""By the decoder's `model_type`: the chat templates of the published checkpoints."""

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
        cell_positions: Tensor,
        newline_positions: Tensor,
        cells: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode and prune one image.

        Args:
            pixel_values: [tiles, 3, size, size] float32, the whole image first.
            cell_positions: [P] int64, places of prunable tokens in the unpruned prompt's image.
            newline_positions: [R] int64, places of the ends of lines.
            cells: [P] int64, where the prunable tokens lie in the flattened tokens of all tiles.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: prunable tokens to keep.

        Returns:
            visual_embeds [1, K + R, H], kept_indices [1, K + R] int64.
        """
        features = features_of_image(self.seen(pixel_values, text_ids), cells_gather(cells), WHOLE)
        selected = selection.select(self._plan, features, keep_count)
        embeds_BKH = selection.project(self._plan, features, selected, self.multi_modal_projector)
        return with_newlines(
            self._plan, embeds_BKH, selected, cell_positions, self.image_newline, newline_positions
        )


def facts(checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
    """See `Family.facts`."""
    config = _config(checkpoint)
    tokens, most = anyres_range(_tiling(checkpoint, config))
    above = config.vision_config.num_hidden_layers - _feature_layer(config)
    return ModelSpec(
        **hf_config.decoder_sizes(config.text_config),
        visual_tokens=most,
        grid=None,
        token_range=tokens,
        missing_features=("grid",) if above else ("grid", "following_layer"),
        published_tower=published_tower(config.vision_config),
    )


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_config(checkpoint).vision_config.hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> AnyResLayout:
    """See `Family.preprocessing`."""
    check_fit(recipe, "LLaVA-NeXT")
    return _tiling(checkpoint, _config(checkpoint))


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    config = _config(checkpoint)
    return PromptTemplate(
        grounding=recipe.prompt or GROUNDING_PROMPTS[config.text_config.model_type],
        image_token_id=config.image_token_id,
        add_special_tokens=True,
        eos_token_ids=hf_config.end_tokens(checkpoint, config.text_config),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    check_fit(recipe, "LLaVA-NeXT")
    return BoxFormat(codec="llava", frame="padded_square")


def components(checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    config = _config(checkpoint)
    torch_dtype = assembly.torch_dtype(plan)
    mode = fake_mode()

    def build() -> Any:
        attention = {"": IMPLEMENTATION, "vision_config": selection.tower_attention(plan)}
        options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": attention}
        return LlavaNextForConditionalGeneration._from_config(config, **options)

    model = hollow(build, mode)
    hf_config.check_unknown_weights(checkpoint, model, tied=False, ignored=f"{TEXT_TOWER}/")
    text = (
        None
        if plan.text_tower is None
        else hollow_text_tower(
            checkpoint.parts[TEXT_TOWER], torch_dtype, mode, selection.tower_attention(plan)
        )
    )
    pieces = assembly.Pieces(
        vision=LlavaNextVision(model, plan, feature_layer=_feature_layer(config), text=text),
        vision_inputs=anyres_inputs(_tiling(checkpoint, config)),
        language_model=model.model.language_model,
        lm_head=model.lm_head,
        image_token_id=config.image_token_id,
        weight_key=lambda name: weight_key(checkpoint, name),
    )
    return assembly.components(checkpoint.folder, sizes, plan, pieces)


def weight_key(checkpoint: Checkpoint, parameter: str) -> str:
    """Checkpoint key of a parameter of one of the components.

    Raises:
        CheckpointError: the checkpoint has it under none of the known names.
    """
    if parameter.startswith(f"{TEXT_TOWER}."):
        return text_weight_key(checkpoint, parameter)
    return hf_config.weight_key(checkpoint, parameter, tied=False)


def check_fit(recipe: Recipe, model: str) -> None:
    """Refuse a recipe that says how images become squares, where they become tiles.

    Raises:
        RecipeError: it does.
    """
    if recipe.fit is not None:
        raise RecipeError(
            f"has no meaning for {model}: its images become tiles and not squares",
            subject=f"fit: {recipe.fit}",
            hint="leave fit out",
        )


def _tiling(checkpoint: Checkpoint, config: Any) -> AnyResLayout:
    vision, require = config.vision_config, hf_config.Requirements(checkpoint, "LLaVA-NeXT")
    settings = hf_config.tile_processor(checkpoint, require, vision.image_size)
    grids = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    same = settings.get("image_grid_pinpoints", config.image_grid_pinpoints)
    require(
        "image_grid_pinpoints",
        sorted(map(tuple, same)) == sorted(grids),
        "the same in config.json and preprocessor_config.json",
    )
    return AnyResLayout(
        size=vision.image_size,
        side=vision.image_size // vision.patch_size,
        grids=grids,
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )


def _config(checkpoint: Checkpoint) -> Any:
    config, require = hf_config.read_config(checkpoint), hf_config.Requirements(checkpoint, "LLaVA-NeXT")
    vision, text = config.vision_config, config.text_config
    layer = config.vision_feature_layer
    require("vision_config.model_type", vision.model_type == "clip_vision_model", "CLIP")
    require("text_config.model_type", text.model_type in GROUNDING_PROMPTS, ", ".join(GROUNDING_PROMPTS))
    require("text_config.sliding_window", getattr(text, "sliding_window", None) is None, "null")
    require("vision_feature_layer", isinstance(layer, int), "one layer, not a list")
    require("vision_feature_select_strategy", config.vision_feature_select_strategy == "default", "default")
    require("image_size", vision.image_size % vision.patch_size == 0, "a multiple of patch_size")
    whole_tiles = all(
        extent % vision.image_size == 0 for grid in config.image_grid_pinpoints for extent in grid
    )
    require("image_grid_pinpoints", whole_tiles, "multiples of image_size")
    return config


def _feature_layer(config: Any) -> int:
    """How many layers of the tower are run: `vision_feature_layer` counts hidden states, the embeddings being number 0."""
    feature, layers = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return feature if feature >= 0 else layers + 1 + feature
