"""LLaVA-1.5 as its authors publish it (`liuhaotian/llava-v1.5-7b`, `-13b`): a Llama with a projector, the tower beside it.

Facts: `model.mm_projector.{0,2}` around a GELU, `mm_vision_select_layer` -2 of the CLIP tower that `mm_vision_tower` names, no
token for the image: their code splices at the id -200. Here the placeholder gets the first id that the table has no row for.
Prompt, image and boxes are those of `llava.py`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.bundle.spec import Component
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.tokenizers import stored_tokenizer, with_placeholder
from gap_export.errors import CheckpointError
from gap_export.families import Part, llava
from gap_export.inputs.images import mean_colour
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.modeling.clip_llama import ClipLlama
from gap_export.modeling.clip_text import read_text_tower
from gap_export.modeling.clip_vision import CLIP_LEFT_OUT, OPENAI_MEAN, OPENAI_STD, vision_config
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

PLACEHOLDER = "<image>"

_INSIDE = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = {
    "vision_tower.": (_INSIDE, "vision_tower/vision_model."),
    "multi_modal_projector.": ("model.mm_projector.",),
    "language_model.": ("model.",),
    "lm_head.": ("lm_head.",),
}


def parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """See `Family.parts`; fine-tuned towers lie in the checkpoint, and only their config comes from beside it."""
    named = str(checkpoint.config.get("mm_vision_tower", "openai/clip-vit-large-patch14-336"))
    return (Part("vision_tower", named, "vision tower"),)


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """See `Family.joined`."""
    return checkpoint


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """See `Family.tokenizer`."""
    found = stored_tokenizer(checkpoint)
    return with_placeholder(found, PLACEHOLDER, found.get_vocab_size())


def facts(checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
    """See `Family.facts`."""
    return _model(checkpoint).facts()


def text_tower(checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
    """See `Family.text_tower`."""
    return read_text_tower(part, tower_width=_vision(checkpoint).hidden_size)


def preprocessing(checkpoint: Checkpoint, recipe: Recipe) -> SquareLayout:
    """See `Family.preprocessing`; the processor is that of the tower."""
    return SquareLayout(
        size=_vision(checkpoint).image_size,
        fit=recipe.fit or "pad",
        background=mean_colour(OPENAI_MEAN),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def prompt(checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
    """See `Family.prompt`."""
    return PromptTemplate(
        grounding=recipe.prompt or llava.GROUNDING_PROMPT,
        image_token_id=stored_tokenizer(checkpoint).get_vocab_size(),
        add_special_tokens=True,
        eos_token_ids=(int(checkpoint.config.get("eos_token_id", 2)),),
    )


def box(recipe: Recipe) -> BoxFormat:
    """See `Family.box`."""
    return llava.box(recipe)


def components(checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
    """See `Family.components`."""
    return _model(checkpoint).components(sizes, plan)


def _vision(checkpoint: Checkpoint) -> CLIPVisionConfig:
    return vision_config(checkpoint.parts["vision_tower"])


def _model(checkpoint: Checkpoint) -> ClipLlama:
    config, vision = checkpoint.config, _vision(checkpoint)
    wanted = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for field, value in wanted.items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"{field} is {config[field]!r} (supported: {value})",
                subject=str(checkpoint.folder / "config.json"),
                hint="this model is not LLaVA-1.5 as published; see `gap-export models`",
            )
    text = LlamaConfig.from_dict({**config, "model_type": "llama"})
    feature = int(config.get("mm_vision_select_layer", -2))
    width: Any = vision.hidden_size

    def projector() -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, text.hidden_size), nn.GELU(), nn.Linear(text.hidden_size, text.hidden_size)
        )

    return ClipLlama(
        checkpoint=checkpoint,
        vision=vision,
        text=text,
        projector=projector,
        feature_layer=feature if feature >= 0 else vision.num_hidden_layers + 1 + feature,
        image_token_id=stored_tokenizer(checkpoint).get_vocab_size(),
        prefixes=_PREFIXES,
        ignored=CLIP_LEFT_OUT,
    )
