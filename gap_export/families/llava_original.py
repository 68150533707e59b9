"""LLaVA-1.5 as its authors publish it (`liuhaotian/llava-v1.5-7b`, `-13b`): a Llama with a projector, the tower beside it.

Facts: `model.mm_projector.{0,2}` around a GELU, `mm_vision_select_layer` -2 of the CLIP tower that `mm_vision_tower` names, no
token for the image: their code splices at the id -200. Here the placeholder gets the first id that the table has no row for.
Prompt, image and boxes are those of `llava.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import nn
from typing_extensions import override

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.tokenizers import slow_tokenizer, with_placeholder
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.families import frames
from gap_export.families.base import Companion
from gap_export.families.clip_llama import ClipLlama, ClipLlamaConfig
from gap_export.families.llava import GROUNDING_PROMPT
from gap_export.modeling import hf_config
from gap_export.modeling.clip import UNUSED_OF_CLIP, read_vision_config

PLACEHOLDER = "<image>"


class LlavaOriginal(ClipLlama):
    """LLaVA-1.5 in its authors' layout."""

    frame = frames.LLAVA
    grounding_question = frames.LLAVA_QUESTION
    grounding_prompt = GROUNDING_PROMPT
    prefixes: ClassVar[Prefixes] = {
        "vision_tower.": ("model.vision_tower.vision_tower.vision_model.", "vision_tower/vision_model."),
        "multi_modal_projector.": ("model.mm_projector.",),
        "language_model.": ("model.",),
        "lm_head.": ("lm_head.",),
    }
    unused_weights = UNUSED_OF_CLIP

    @staticmethod
    @override
    def companions(checkpoint: Checkpoint) -> tuple[Companion, ...]:
        # Fine-tuned towers lie in the checkpoint, and only their config comes from beside it.
        named = str(checkpoint.config.get("mm_vision_tower", "openai/clip-vit-large-patch14-336"))
        return (Companion("vision_tower", named, "vision tower"),)

    @override
    def tokenizer(self) -> Tokenizer:
        return with_placeholder(slow_tokenizer(self.checkpoint), PLACEHOLDER, self.image_token_id)

    @property
    @override
    def notes(self) -> tuple[str, ...]:
        if self.checkpoint.config.get("image_aspect_ratio") is not None:
            return super().notes
        return (
            *super().notes,
            "image_aspect_ratio is not stated: images are padded, as LLaVA-1.5 was trained; models of before saw the centre alone",
        )

    @override
    def read_config(self) -> ClipLlamaConfig:
        config = self.checkpoint.config
        vision = read_vision_config(self.checkpoint.companions["vision_tower"])
        self.check_named_tower(vision)
        text = hf_config.llama_config(self.checkpoint, model_type="llama")
        width: Any = vision.hidden_size

        def projector() -> nn.Module:
            return nn.Sequential(
                nn.Linear(width, text.hidden_size), nn.GELU(), nn.Linear(text.hidden_size, text.hidden_size)
            )

        return ClipLlamaConfig(
            vision_config=vision,
            text_config=text,
            projector=projector,
            feature_layer=hf_config.feature_layer(
                config.get("mm_vision_select_layer", -2), vision, self.check, "mm_vision_select_layer"
            ),
            image_token_id=slow_tokenizer(self.checkpoint).get_vocab_size(),
        )
