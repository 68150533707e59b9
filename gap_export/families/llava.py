"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (`model_type: llava`).

Facts: the decoder gets `hidden_states[vision_feature_layer]` (usually -2) without the class token; pictures are padded to
a square with the mean colour for grounding, and boxes are `[x1, y1, x2, y2]` in 0..1 of that square. (The processor that
Hugging Face ships with these checkpoints crops the centre instead, which cuts off what is to be found.)

The graphs are those of `clip_llama.py`.
"""

from __future__ import annotations

from typing import Any, cast

from tokenizers import Tokenizer
from transformers import AutoConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gap_export.bundle import BoxFormat, ModelFacts, Preprocessing, PromptTemplate, TextTower
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import Part
from gap_export.families.clip_llama import ClipLlama
from gap_export.families.clip_text import read_text_tower
from gap_export.families.tokenizers import stored_tokenizer
from gap_export.plan import Plan
from gap_export.recipe import Recipe
from gap_export.runtime.preprocess import mean_colour
from gap_export.spec import Component

GROUNDING_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <image>\nPlease provide the bounding box coordinate of the region this "
    "sentence describes: {expression}. ASSISTANT:"
)

# Where published checkpoints keep what the module calls by the name on the left: transformers before and after 4.52.
_PREFIXES = {
    "vision_tower.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.": ("language_model.model.", "model.language_model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
}  # fmt: skip


def parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """See `Family.parts`."""
    return ()


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """See `Family.joined`."""
    return checkpoint


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """See `Family.tokenizer`."""
    return stored_tokenizer(checkpoint)


def facts(checkpoint: Checkpoint) -> ModelFacts:
    """See `Family.facts`."""
    return _model(checkpoint).facts()


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_config(checkpoint).vision_config.hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> Preprocessing:
    """See `Family.preprocessing`."""
    stored = checkpoint.json("preprocessor_config.json") or checkpoint.json("processor_config.json").get(
        "image_processor", {}
    )
    mean, std = stored.get("image_mean"), stored.get("image_std")
    if mean is None or std is None:
        raise CheckpointError(
            "has no image processor settings (preprocessor_config.json)",
            subject=str(checkpoint.folder),
            hint="download the checkpoint's preprocessor_config.json",
        )
    if not (_is_rgb(mean) and _is_rgb(std) and min(std) > 0):
        raise CheckpointError(
            "image_mean and image_std must be three numbers each, and no image_std may be 0",
            subject=str(checkpoint.folder / "preprocessor_config.json"),
            hint="fetch the checkpoint's preprocessor_config.json again",
        )
    return Preprocessing(
        size=_config(checkpoint).vision_config.image_size,
        fit=recipe.fit or "pad",
        background=mean_colour(tuple(mean)),
        mean=tuple(mean),
        std=tuple(std),
    )


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    config = _config(checkpoint)
    ends = checkpoint.json("generation_config.json").get("eos_token_id")
    ends = config.text_config.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(isinstance(end, int) for end in ends):
        raise CheckpointError(
            "names no token that ends an answer (eos_token_id)",
            subject=str(checkpoint.folder),
            hint="add eos_token_id to the checkpoint's generation_config.json",
        )
    return PromptTemplate(
        grounding=recipe.prompt or GROUNDING_PROMPT,
        image_token_id=config.image_token_id,
        add_special_tokens=True,
        eos_token_ids=tuple(ends),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    if recipe.fit == "crop":
        raise RecipeError(
            "cuts off parts of the picture, and no box can be found there",
            subject="fit: crop",
            hint="use fit: pad, which is what the model was trained with for grounding",
        )
    return BoxFormat(codec="llava", frame="image" if recipe.fit == "stretch" else "padded_square")


def components(checkpoint: Checkpoint, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    return _model(checkpoint).components(plan)


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
        prefixes=_PREFIXES,
    )


def _config(checkpoint: Checkpoint) -> LlavaConfig:
    if "auto_map" in checkpoint.config:
        raise CheckpointError(
            "asks for code of its own to be run (auto_map)",
            subject=str(checkpoint.folder / "config.json"),
            hint="use a checkpoint that transformers supports without remote code",
        )
    try:
        config = cast(LlavaConfig, AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"is not a configuration transformers accepts: {str(error).splitlines()[0]}",
            subject=str(checkpoint.folder / "config.json"),
            hint="fetch the checkpoint's config.json again",
        ) from error
    _require(
        checkpoint,
        "vision_feature_layer",
        isinstance(config.vision_feature_layer, int),
        "one layer, not a list",
    )
    _require(
        checkpoint,
        "vision_feature_select_strategy",
        config.vision_feature_select_strategy == "default",
        "default",
    )
    _require(
        checkpoint, "vision_config.model_type", config.vision_config.model_type == "clip_vision_model", "CLIP"
    )
    _require(checkpoint, "text_config.model_type", config.text_config.model_type == "llama", "llama")
    return config


def _is_rgb(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) for value in values)
    )


def _require(checkpoint: Checkpoint, field: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise CheckpointError(
            f"{field} is not supported (supported: {wanted})",
            subject=str(checkpoint.folder / "config.json"),
            hint="this model is not LLaVA-1.5 as published; see `gap-export models`",
        )
