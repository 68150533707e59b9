"""Language models of published checkpoints: their sizes, their configs, their keys and shapes."""

from __future__ import annotations

from typing import Any

from tests.families.plain_models import llama_shapes
from tests.families.published.keys import Shapes, stack

SIZES: dict[str, dict[str, int]] = {
    "llama-7b": {"width": 4096, "hidden": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
    "llama-13b": {"width": 5120, "hidden": 13824, "layers": 40, "heads": 40, "kv_heads": 40},
    "mistral-7b": {"width": 4096, "hidden": 14336, "layers": 32, "heads": 32, "kv_heads": 8},
    "qwen2-0.5b": {"width": 896, "hidden": 4864, "layers": 24, "heads": 14, "kv_heads": 2},
    "qwen2-1.5b": {"width": 1536, "hidden": 8960, "layers": 28, "heads": 12, "kv_heads": 2},
    "qwen2-7b": {"width": 3584, "hidden": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
    "qwen2.5-3b": {"width": 2048, "hidden": 11008, "layers": 36, "heads": 16, "kv_heads": 2},
    "qwen3-4b": {"width": 2560, "hidden": 9728, "layers": 36, "heads": 32, "kv_heads": 8},
    "qwen3-8b": {"width": 4096, "hidden": 12288, "layers": 36, "heads": 32, "kv_heads": 8},
}


def decoder_config(kind: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """As published: what a config does not name has the default of its model type."""
    sizes = SIZES[kind]
    if sizes["kv_heads"] != sizes["heads"]:
        changes = {"num_key_value_heads": sizes["kv_heads"], **changes}
    if kind.startswith("llama"):
        changes = {"rms_norm_eps": 1e-5, **changes}
    return {
        "model_type": kind.partition("-")[0],
        "vocab_size": vocabulary,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": 32768 if kind.startswith("qwen") else 4096,
        "eos_token_id": 2,
        **changes,
    }


def decoder_shapes(kind: str, vocabulary: int, *, tied: bool = False) -> Shapes:
    sizes = SIZES[kind]
    width, layers = sizes["width"], sizes["layers"]
    shapes: Shapes = llama_shapes(vocabulary=vocabulary, **sizes)
    if kind.startswith("qwen3"):  # heads are wider than their share of the width, and are normed
        query, shared = 128 * sizes["heads"], 128 * sizes["kv_heads"]
        layer: Shapes = {
            "q_proj.weight": (query, width),
            "k_proj.weight": (shared, width),
            "v_proj.weight": (shared, width),
            "o_proj.weight": (width, query),
            "q_norm.weight": (128,),
            "k_norm.weight": (128,),
        }
    elif kind.startswith("qwen"):
        shared = width // sizes["heads"] * sizes["kv_heads"]
        layer = {"q_proj.bias": (width,), "k_proj.bias": (shared,), "v_proj.bias": (shared,)}
    else:
        layer = {}
    shapes |= stack("model.layers", layers, {f"self_attn.{key}": shape for key, shape in layer.items()})
    if tied:
        del shapes["lm_head.weight"]
    return shapes
