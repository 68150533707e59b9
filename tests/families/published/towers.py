"""Vision towers of published checkpoints: keys and shapes."""

from __future__ import annotations

from typing import Any

from tests.families.published.keys import Shapes, linear, norm, stack

CLIP_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP_CONFIG: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def clip(image: int) -> Shapes:
    """OpenAI's CLIP ViT-L/14, its vision tower."""
    width = 1024
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": ((image // 14) ** 2 + 1, width),
        **norm("pre_layrnorm", width),
        **stack("encoder.layers", 24, _clip_layer(width, 4096)),
        **norm("post_layernorm", width),
    }


def siglip() -> Shapes:
    """SigLIP so400m/14 at 384 without its last layer and its head."""
    width = 1152
    return {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (729, width),
        **stack("encoder.layers", 26, _clip_layer(width, 4304)),
        **norm("post_layernorm", width),
    }


def _clip_layer(width: int, hidden: int) -> Shapes:
    return {
        **linear("self_attn.q_proj", width, width),
        **linear("self_attn.k_proj", width, width),
        **linear("self_attn.v_proj", width, width),
        **linear("self_attn.out_proj", width, width),
        **linear("mlp.fc1", hidden, width),
        **linear("mlp.fc2", width, hidden),
        **norm("layer_norm1", width),
        **norm("layer_norm2", width),
    }


def intern_vit() -> Shapes:
    """InternViT-300M at 448."""
    width, hidden = 1024, 4096
    layer = {
        **linear("attention.q_proj", width, width),
        **linear("attention.k_proj", width, width),
        **linear("attention.v_proj", width, width),
        **linear("attention.projection_layer", width, width),
        **linear("mlp.fc1", hidden, width),
        **linear("mlp.fc2", width, hidden),
        **norm("layernorm_before", width),
        **norm("layernorm_after", width),
        "lambda_1": (width,),
        "lambda_2": (width,),
    }
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1025, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **stack("encoder.layer", 24, layer),
    }


def eva() -> Shapes:
    """EVA-CLIP's ViT-g/14: the positions are those of 224 pixels."""
    width, hidden = 1408, 6144
    layer = {
        **norm("norm1", width),
        "attn.qkv.weight": (3 * width, width),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        **linear("attn.proj", width, width),
        **norm("norm2", width),
        **linear("mlp.fc1", hidden, width),
        **linear("mlp.fc2", width, hidden),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 257, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        **stack("blocks", 40, layer),
        **norm("norm", width),
    }


def qwen2(out: int) -> Shapes:
    mlp = {**linear("mlp.fc1", 5120, 1280), **linear("mlp.fc2", 1280, 5120)}
    return {
        "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **stack("blocks", 32, _qwen_layer(1280, mlp)),
        **norm("merger.ln_q", 1280),
        **linear("merger.mlp.0", 5120, 5120),
        **linear("merger.mlp.2", out, 5120),
    }


def qwen25(out: int) -> Shapes:
    mlp = {
        **linear("mlp.gate_proj", 3420, 1280),
        **linear("mlp.up_proj", 3420, 1280),
        **linear("mlp.down_proj", 1280, 3420),
    }
    return {
        "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **stack("blocks", 32, _qwen_layer(1280, mlp, norm_bias=False)),
        **norm("merger.ln_q", 1280, bias=False),
        **linear("merger.mlp.0", 5120, 5120),
        **linear("merger.mlp.2", out, 5120),
    }


def qwen3(depth: int, width: int, hidden: int, out: int) -> Shapes:
    mlp = {**linear("mlp.linear_fc1", hidden, width), **linear("mlp.linear_fc2", width, hidden)}
    shapes: Shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (2304, width),
        **stack("blocks", depth, _qwen_layer(width, mlp)),
    }
    for name, normed in (("merger", width), *((f"deepstack_merger_list.{n}", 4 * width) for n in range(3))):
        shapes |= norm(f"{name}.norm", normed)
        shapes |= linear(f"{name}.linear_fc1", 4 * width, 4 * width)
        shapes |= linear(f"{name}.linear_fc2", out, 4 * width)
    return shapes


def _qwen_layer(width: int, mlp: Shapes, *, norm_bias: bool = True) -> Shapes:
    return {
        **linear("attn.qkv", 3 * width, width),
        **linear("attn.proj", width, width),
        **norm("norm1", width, bias=norm_bias),
        **norm("norm2", width, bias=norm_bias),
        **mlp,
    }
