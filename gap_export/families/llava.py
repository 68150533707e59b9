"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (`model_type: llava`).

Facts: the decoder gets `hidden_states[vision_feature_layer]` (usually -2) without the class token; images are padded to
a square with the mean colour for grounding, and boxes are `[x1, y1, x2, y2]` in 0..1 of that square. (The processor that
Hugging Face ships with these checkpoints crops the centre instead, which cuts off what is to be found.)

The graphs are those of `clip_llama.py`.
"""

from __future__ import annotations

from typing import cast

from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.complete import joined as joined
from gap_export.families.complete import parts as parts
from gap_export.families.complete import tokenizer as tokenizer
from gap_export.inputs.images import mean_colour
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.modeling import hf_config
from gap_export.modeling.clip_llama import ClipLlama
from gap_export.modeling.clip_text import read_text_tower
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

GROUNDING_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <image>\nPlease provide the bounding box coordinate of the region this "
    "sentence describes: {expression}. ASSISTANT:"
)


def facts(checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
    """See `Family.facts`."""
    return _model(checkpoint).facts()


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_config(checkpoint).vision_config.hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> SquareLayout:
    """See `Family.preprocessing`."""
    stored = hf_config.image_processor(checkpoint)
    mean, std = stored["image_mean"], stored["image_std"]
    return SquareLayout(
        size=_config(checkpoint).vision_config.image_size,
        fit=recipe.fit or "pad",
        background=mean_colour(tuple(mean)),
        mean=tuple(mean),
        std=tuple(std),
    )


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
    if recipe.fit == "crop":
        raise RecipeError(
            "cuts off parts of the image, and no box can be found there",
            subject="fit: crop",
            hint="use fit: pad, which is what the model was trained with for grounding",
        )
    return BoxFormat(codec="llava", frame="image" if recipe.fit == "stretch" else "padded_square")


def components(checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    return _model(checkpoint).components(sizes, plan)


def _model(checkpoint: Checkpoint) -> ClipLlama:
    config = _config(checkpoint)
    feature, layers = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    text = config.text_config
    text.tie_word_embeddings = text.tie_word_embeddings or config.tie_word_embeddings
    return ClipLlama(
        checkpoint=checkpoint,
        vision=config.vision_config,
        text=text,
        projector=lambda: LlavaMultiModalProjector(config),
        # `vision_feature_layer` counts hidden states, the embeddings being number 0.
        feature_layer=feature if feature >= 0 else layers + 1 + feature,
        image_token_id=config.image_token_id,
        prefixes=hf_config.PREFIXES,
    )


def _config(checkpoint: Checkpoint) -> LlavaConfig:
    config = cast(LlavaConfig, hf_config.read_config(checkpoint))
    require = hf_config.Requirements(checkpoint, "LLaVA-1.5")
    require("vision_feature_layer", isinstance(config.vision_feature_layer, int), "one layer, not a list")
    require("vision_feature_select_strategy", config.vision_feature_select_strategy == "default", "default")
    require("vision_config.model_type", config.vision_config.model_type == "clip_vision_model", "CLIP")
    require("text_config.model_type", config.text_config.model_type == "llama", "llama")
    return config
