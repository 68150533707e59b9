"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (`model_type: llava`).

Facts: the decoder gets `hidden_states[vision_feature_layer]` (usually -2) without the class token; images are padded to
a square with the mean colour for grounding, and boxes are `[x1, y1, x2, y2]` in 0..1 of that square. (The processor that
Hugging Face ships with these checkpoints crops the centre instead, which cuts off what is to be found.)

The graphs are those of `clip_llama.py`.
"""

from __future__ import annotations

from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from typing_extensions import override

from gap_export.families import frames
from gap_export.families.clip_llama import Channels, ClipLlama, ClipLlamaConfig
from gap_export.modeling import hf_config, sizes

GROUNDING_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    f"polite answers to the user's questions. USER: <image>\n{frames.LLAVA_QUESTION} ASSISTANT:"
)


class Llava(ClipLlama):
    """LLaVA-1.5 in the layout of transformers."""

    frame = frames.LLAVA
    grounding_question = frames.LLAVA_QUESTION
    grounding_prompt = GROUNDING_PROMPT

    @override
    def read_config(self) -> ClipLlamaConfig:
        config, check = hf_config.read_config(self.checkpoint), self.check
        default = config.vision_feature_select_strategy == "default"
        check("vision_feature_select_strategy", default, "default")
        check("vision_config.model_type", config.vision_config.model_type == "clip_vision_model", "CLIP")
        check("text_config.model_type", config.text_config.model_type == "llama", "llama")
        sizes.check_square_tower(config.vision_config, check)
        return ClipLlamaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            projector=lambda: LlavaMultiModalProjector(config),
            feature_layer=hf_config.feature_layer(config.vision_feature_layer, config.vision_config, check),
            image_token_id=config.image_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    @property
    @override
    def normalisation(self) -> tuple[Channels, Channels]:
        processor = hf_config.checked_processor(
            self.checkpoint, self.check, self.config.vision_config.image_size
        )
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
