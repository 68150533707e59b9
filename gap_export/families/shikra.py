"""Shikra-7B (arXiv 2306.15195): CLIP-L/14 at 224 pixels, one linear projector, LLaMA-7B; published as a delta.

Facts: the checkpoint is LLaMA's difference (`shikras/shikra-7b-delta-v1`) or already merged; the tower is OpenAI's own and not in
it. The 256 visual tokens stand between `<im_start>` and `<im_end>`, in the place of `<im_patch>`, which is the placeholder here.
Images are padded to a square with white, boxes are `[x1,y1,x2,y2]` with three decimals in 0..1 of that square. The
config's own bos, eos and pad ids are wrong; those of the tokenizer are right.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.derived import plus_base
from gap_export.checkpoint.tokenizers import stored_tokenizer, token_id
from gap_export.errors import CheckpointError
from gap_export.families import Part, llava
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.modeling.clip_llama import ClipLlama
from gap_export.modeling.clip_text import read_text_tower
from gap_export.modeling.clip_vision import CLIP_LEFT_OUT, OPENAI_MEAN, OPENAI_STD, vision_config
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

# One of the 54 templates of its evaluation, the image in front as in most of them.
GROUNDING_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <im_start><im_patch><im_end> Can you point out {expression} in the image "
    "and provide the coordinates of its location? ASSISTANT:"
)
PLACEHOLDER, END = "<im_patch>", "</s>"
FEATURE_LAYER = -2

_PREFIXES = {
    "vision_tower.": ("vision_tower/vision_model.",),
    "multi_modal_projector.": ("model.mm_projector.",),
    "language_model.": ("model.",),
    "lm_head.": ("lm_head.",),
}
_PROJECTOR = "model.mm_projector."


def parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """See `Family.parts`."""
    # Nothing in the files of a delta says that it is one, but its name does.
    names = (checkpoint.name, str(checkpoint.config.get("_name_or_path", "")))
    is_delta = any("delta" in name for name in names)
    return (
        Part("vision_tower", "openai/clip-vit-large-patch14", "vision tower"),
        Part("base", "huggyllama/llama-7b", "weights of its own: it is a delta over LLaMA-7B", is_delta),
    )


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """See `Family.joined`; the projector is no delta."""
    if "base" not in checkpoint.parts:
        return checkpoint
    base = checkpoint.parts["base"]
    merged: dict[str, Any] = {
        key: plus_base(checkpoint, key, f"base/{key}")
        for key in checkpoint.weights
        if "/" not in key and not key.startswith(_PROJECTOR) and not key.endswith(".inv_freq")
    }
    left = [key for key in base.weights if key not in merged and not key.endswith(".inv_freq")]
    if left:
        raise CheckpointError(
            f"has weights that the delta does not change: {', '.join(left[:3])}",
            subject=str(base.folder),
            hint="give the LLaMA-7B that the delta was taken from",
        )
    return checkpoint.with_weights(merged)


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """See `Family.tokenizer`."""
    found = stored_tokenizer(checkpoint)
    token_id(found, PLACEHOLDER)
    return found


def facts(checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
    """See `Family.facts`."""
    return _model(checkpoint).facts()


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_vision(checkpoint).hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> SquareLayout:
    """See `Family.preprocessing`."""
    return SquareLayout(
        size=_vision(checkpoint).image_size,
        fit=recipe.fit or "pad",
        background=(255, 255, 255),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    found = stored_tokenizer(checkpoint)
    return PromptTemplate(
        grounding=recipe.prompt or GROUNDING_PROMPT,
        image_token_id=token_id(found, PLACEHOLDER),
        add_special_tokens=True,
        eos_token_ids=(token_id(found, END),),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    return llava.box(recipe).model_copy(update={"codec": "shikra"})


def components(checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    return _model(checkpoint).components(sizes, plan)


def _vision(checkpoint: Checkpoint) -> CLIPVisionConfig:
    return vision_config(checkpoint.parts["vision_tower"])


def _model(checkpoint: Checkpoint) -> ClipLlama:
    vision = _vision(checkpoint)
    fields = {
        **checkpoint.config,
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    text = LlamaConfig.from_dict(fields)
    return ClipLlama(
        checkpoint=checkpoint,
        vision=vision,
        text=text,
        projector=lambda: nn.Linear(vision.hidden_size, text.hidden_size),
        feature_layer=vision.num_hidden_layers + 1 + FEATURE_LAYER,
        image_token_id=token_id(stored_tokenizer(checkpoint), PLACEHOLDER),
        prefixes=_PREFIXES,
        ignored=rf"{CLIP_LEFT_OUT}|base/",
    )
