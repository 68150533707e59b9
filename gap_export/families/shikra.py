"""Shikra-7B (arXiv 2306.15195): CLIP-L/14 at 224 pixels, one linear projector, LLaMA-7B; published as a delta.

Facts: the checkpoint is LLaMA's difference (`shikras/shikra-7b-delta-v1`) or already merged; the tower is OpenAI's own and not in
it. The 256 visual tokens stand between `<im_start>` and `<im_end>`, in the place of `<im_patch>`, which is the placeholder here; in the
prompt they follow the expression, so that prompts about one image share nothing of it.
Images are padded to a square with white, boxes are `[x1,y1,x2,y2]` with three decimals in 0..1 of that square. The
config's own bos, eos and pad ids are wrong; those of the tokenizer are right.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import nn
from typing_extensions import override

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.derived import plus_base
from gap_export.checkpoint.safetensors import WeightLocation, read_floats
from gap_export.checkpoint.sentencepiece import strip_around
from gap_export.checkpoint.tokenizers import slow_tokenizer, token_id
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.errors import CheckpointError
from gap_export.families import frames
from gap_export.families.base import Companion
from gap_export.families.clip_llama import ClipLlama, ClipLlamaConfig
from gap_export.modeling import hf_config
from gap_export.modeling.clip import UNUSED_OF_CLIP, read_vision_config

PLACEHOLDER, END = "<im_patch>", "</s>"
ADDED = (PLACEHOLDER, "<im_start>", "<im_end>")
FEATURE_LAYER = -2
_PROJECTOR = "model.mm_projector."
_AROUND_ZERO = 0.1


class Shikra(ClipLlama):
    """Shikra."""

    # `REC` of the authors' demo (shikras/shikra, mllm/demo/webdemo.py), the fifth of the 54 templates that their training and evaluation
    # draw from (config/_base_/dataset/template/REC.json), in the conversation of Vicuna 1.1. The image stands inside the sentence, in 44
    # of the templates behind the expression (`RECDataset` puts nothing in front, `sep_image_conv_front` is false): visual tokens see it.
    grounding_prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: Can you point out {expression} in the image <im_start><im_patch><im_end> "
        "and provide the coordinates of its location? ASSISTANT:"
    )
    # In a checkpoint's own template, which puts the image in front of what is said.
    grounding_question = (
        "Can you point out {expression} in the image and provide the coordinates of its location?"
    )
    frame = frames.SHIKRA
    placeholder = PLACEHOLDER
    prefixes: ClassVar[Prefixes] = {
        "vision_tower.": ("vision_tower/vision_model.",),
        "multi_modal_projector.": (_PROJECTOR,),
        "language_model.": ("model.",),
        "lm_head.": ("lm_head.",),
    }
    unused_weights = rf"{UNUSED_OF_CLIP}|base/"
    background = (255, 255, 255)

    @staticmethod
    @override
    def companions(checkpoint: Checkpoint) -> tuple[Companion, ...]:
        is_delta = _is_delta(checkpoint)
        return (
            Companion("vision_tower", "openai/clip-vit-large-patch14", "vision tower"),
            Companion(
                "base",
                "huggyllama/llama-7b",
                "weights of its own: it is a delta over LLaMA-7B",
                required=is_delta,
                used=is_delta,
            ),
        )

    @override
    def resolve_weights(self, checkpoint: Checkpoint) -> Checkpoint:
        if "base" not in checkpoint.companions:
            return checkpoint
        base = checkpoint.companions["base"]
        # The projector is no delta.
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

    @override
    def tokenizer(self) -> Tokenizer:
        return strip_around(slow_tokenizer(self.checkpoint), ADDED)

    @property
    @override
    def end_tokens(self) -> tuple[int, ...]:
        return (token_id(slow_tokenizer(self.checkpoint), END),)

    @override
    def assumptions(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return ()  # the end is the tokenizer's, whatever files say

    @override
    def read_config(self) -> ClipLlamaConfig:
        vision = read_vision_config(self.checkpoint.companions["vision_tower"])
        self.check_named_tower(vision)
        text = hf_config.llama_config(
            self.checkpoint, model_type="llama", bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        return ClipLlamaConfig(
            vision_config=vision,
            text_config=text,
            projector=lambda: nn.Linear(vision.hidden_size, text.hidden_size),
            feature_layer=hf_config.feature_layer(
                self.checkpoint.config.get("mm_vision_select_layer", FEATURE_LAYER),
                vision,
                self.check,
                "mm_vision_select_layer",
            ),
            image_token_id=token_id(slow_tokenizer(self.checkpoint), PLACEHOLDER),
        )


def _is_delta(checkpoint: Checkpoint) -> bool:
    """Whether weights are differences. No file says so, and folders are renamed; but weights of a norm lie around one, differences around zero."""
    norm = checkpoint.weights.get("model.norm.weight")
    values = read_floats(norm) if isinstance(norm, WeightLocation) else None
    if values is None:
        names = (checkpoint.name, str(checkpoint.config.get("_name_or_path", "")))
        return any("delta" in name for name in names)
    return abs(float(values.mean())) < _AROUND_ZERO
