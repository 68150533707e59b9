"""LLaVA-OneVision: AnyResLayout tiles through a SigLIP tower, ends of lines, Qwen2 decoder (`model_type: llava_onevision`).

Facts: tiles as in LLaVA-NeXT, up to 36 of them; a grid with clearly more tokens than nine tiles have is scaled down bilinearly, after
the projector (`anyres_max_9`). Tokens of such a grid are what is pruned: places count them. The tower has no class token, and
features are those of its last layer before its last norm (`vision_feature_layer: -1`).

Projectors are not linear, so that an image's tokens are made from projected ones: all of them are projected.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from gap_export import prune
from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.families.complete import joined as joined
from gap_export.families.complete import parts as parts
from gap_export.families.complete import tokenizer as tokenizer
from gap_export.families.llava_next import check_fit
from gap_export.inputs.layouts import AnyResLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.inputs.tiles import anyres_range
from gap_export.modeling import assembly, hf_config, selection
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.fake import fake_mode, hollow
from gap_export.modeling.tiles import anyres_inputs, corners_gather, with_newlines
from gap_export.plan import Plan
from gap_export.prune.order import take
from gap_export.recipe.recipe import Recipe

MODEL = "LLaVA-OneVision"
GROUNDING_PROMPT = (
    "<|im_start|>user\n<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
    "{expression}.<|im_end|>\n<|im_start|>assistant\n"
)
"""As transformers tests the chat template of the published checkpoints."""


class LlavaOnevisionVision(nn.Module):
    """Tiles of one image through the SigLIP tower and the projector; scaling down; pruner over the whole image; ends of lines."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        self.image_newline: nn.Parameter = model.model.image_newline
        self._plan = plan

    def forward(
        self,
        pixel_values: Tensor,
        cell_positions: Tensor,
        newline_positions: Tensor,
        corners: Tensor,
        corner_weights: Tensor,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode and prune one image.

        Args:
            pixel_values: [tiles, 3, size, size] float32, the whole image first.
            cell_positions: [P] int64, places of prunable tokens in the unpruned prompt's image.
            newline_positions: [R] int64, places of the ends of lines.
            corners: [P, 4] int64, the four tokens among those of all tiles, flattened, that a prunable token is the sum of.
            corner_weights: [P, 4] float32, their weights.
            keep_count: [K] int64 counting from 0, traced for its extent: prunable tokens to keep.

        Returns:
            visual_embeds [1, K + R, H], kept_indices [1, K + R] int64.
        """
        hidden_tCE = self.vision_tower.embeddings(pixel_values)
        for layer in self.vision_tower.encoder.layers:
            hidden_tCE = layer(hidden_tCE, None)
        tokens_BPH = corners_gather(corners, corner_weights)(self.multi_modal_projector(hidden_tCE))
        features = prune.VisionFeatures(patches_BNE=tokens_BPH, grid=None, projected_BNH=tokens_BPH)
        selected = selection.select(self._plan, features, keep_count)
        embeds_BKH = take(tokens_BPH, selected.indices_BK)
        return with_newlines(
            self._plan, embeds_BKH, selected, cell_positions, self.image_newline, newline_positions
        )


def facts(checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
    """See `Family.facts`."""
    config = _config(checkpoint)
    tokens, most = anyres_range(_tiling(checkpoint, config))
    return ModelSpec(
        **hf_config.decoder_sizes(config.text_config),
        visual_tokens=most,
        grid=None,
        token_range=tokens,
        missing_features=("class_token", "projected_class_token", "following_layer", "grid"),
    )


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`.

    Raises:
        CheckpointError: always: CLIP's text tower shares no space with this model's vision tower.
    """
    raise hf_config.no_text_tower(part, f"SigLIP tower of {MODEL}")


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> AnyResLayout:
    """See `Family.preprocessing`."""
    check_fit(recipe, MODEL)
    return _tiling(checkpoint, _config(checkpoint))


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    config = _config(checkpoint)
    return PromptTemplate(
        grounding=recipe.prompt or GROUNDING_PROMPT,
        image_token_id=config.image_token_id,
        add_special_tokens=True,
        eos_token_ids=hf_config.end_tokens(checkpoint, config.text_config),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    check_fit(recipe, MODEL)
    return BoxFormat(codec="llava", frame="image")


def components(checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    config = _config(checkpoint)
    torch_dtype = assembly.torch_dtype(plan)

    def build() -> Any:
        attention = {"": IMPLEMENTATION, "vision_config": selection.tower_attention(plan)}
        options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": attention}
        return LlavaOnevisionForConditionalGeneration._from_config(config, **options)

    model = hollow(build, fake_mode())
    hf_config.check_unknown_weights(
        checkpoint, model, tied=hf_config.is_tied(config), ignored=hf_config.NOTHING
    )
    pieces = assembly.Pieces(
        vision=LlavaOnevisionVision(model, plan),
        vision_inputs=anyres_inputs(_tiling(checkpoint, config)),
        language_model=model.model.language_model,
        lm_head=model.lm_head,
        image_token_id=config.image_token_id,
        weight_key=lambda name: weight_key(checkpoint, name),
    )
    return assembly.components(checkpoint.folder, sizes, plan, pieces)


def weight_key(checkpoint: Checkpoint, parameter: str) -> str:
    """Checkpoint key of a parameter of one of the components; the 0.5B model's head is its token embedding.

    Raises:
        CheckpointError: the checkpoint has it under none of the known names.
    """
    return hf_config.weight_key(
        checkpoint, parameter, tied=hf_config.is_tied(hf_config.read_config(checkpoint))
    )


def _tiling(checkpoint: Checkpoint, config: Any) -> AnyResLayout:
    size, require = config.vision_config.image_size, hf_config.Requirements(checkpoint, MODEL)
    settings = hf_config.tile_processor(checkpoint, require, size)
    grids = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    same = settings.get("image_grid_pinpoints", config.image_grid_pinpoints)
    require(
        "image_grid_pinpoints",
        sorted(map(tuple, same)) == sorted(grids),
        "the same in config.json and preprocessor_config.json",
    )
    return AnyResLayout(
        size=size,
        side=size // config.vision_config.patch_size,
        grids=grids,
        max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )


def _config(checkpoint: Checkpoint) -> Any:
    config, require = hf_config.read_config(checkpoint), hf_config.Requirements(checkpoint, MODEL)
    vision, text = config.vision_config, config.text_config
    require("vision_config.model_type", vision.model_type == "siglip_vision_model", "SigLIP")
    require("text_config.model_type", text.model_type == "qwen2", "qwen2")
    require("text_config.use_sliding_window", text.sliding_window is None, "false")
    require("vision_feature_layer", config.vision_feature_layer == -1, "-1")
    require("vision_feature_select_strategy", config.vision_feature_select_strategy == "full", "full")
    counted = re.fullmatch(r"anyres_max_[1-9]\d*", config.vision_aspect_ratio) is not None
    require("vision_aspect_ratio", counted, "anyres_max_9 or another number")
    whole_tiles = all(
        extent % vision.image_size == 0 for grid in config.image_grid_pinpoints for extent in grid
    )
    require("image_grid_pinpoints", whole_tiles, "multiples of image_size")
    return config
