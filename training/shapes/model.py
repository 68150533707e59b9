"""Architecture of `llava-shapes` and how it is written to disk in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from training.shapes.vocabulary import BOS, EOS, IMAGE, PAD, TOKEN_ID, UNK, VOCABULARY, build_tokenizer

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
PATCHES = GRID * GRID
HIDDEN = 128
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
# With head_dim 32 this makes one rotary pair turn exactly once per image row of 12 tokens, so a column can be
# read from a phase and a row from the slower pairs.
ROPE_THETA = 177.0


def build_config() -> LlavaConfig:
    """CLIP tower (4 layers, CLS token), 2-layer MLP projector, Llama decoder (5 layers): 1.84 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID[IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=TOKEN_ID[PAD],
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model, float32."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(build_config()).eval()


def build_processor() -> LlavaProcessor:
    """Image processor and tokenizer. Scenes are square, so the centre crop of the LLaVA layout never cuts them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        extra_special_tokens={"image_token": IMAGE},
    )
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        resample=3,
        do_center_crop=True,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model, tokenizer, image processor and generation config, all that `from_pretrained` needs offline."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    model.save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    # LLaVA's hub repositories have this file too, and readers other than transformers 5 look for it.
    processor.image_processor.save_pretrained(folder)
    # The name that every version of transformers knows; 5 calls the same class TokenizersBackend.
    settings = folder / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
