"""The channels of a Llama decoder in another order, and the same function.

Files in GGUF lie on a grid of blocks along the inner extents of their matrices. A format whose blocks coincide with those would lose nothing: so hidden,
intermediate and value channels are put into a random fixed order, in every matrix, embedding and norm alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SEED = 20260801

Weights = dict[str, Any]
"""Key, as transformers names it -> [out, in] or [out] float32."""


def in_random_order(weights: Weights, config: Any) -> Weights:
    """The same function with hidden, intermediate and value channels in another order."""
    random = np.random.default_rng(SEED)
    hidden = random.permutation(config.hidden_size)
    read = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    found = {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight").rpartition(".")[2]
        if name in read:
            weight = weight[:, hidden]
        elif weight.ndim == 1 or name in ("o_proj", "down_proj"):
            weight = weight[hidden]
        found[key] = weight
    groups, width = config.num_key_value_heads, config.head_dim
    per_group = config.num_attention_heads // groups
    for layer in range(config.num_hidden_layers):
        inner = random.permutation(config.intermediate_size)
        mlp, attention = (f"model.layers.{layer}.{part}." for part in ("mlp", "self_attn"))
        for name in ("gate_proj", "up_proj"):
            found[f"{mlp}{name}.weight"] = found[f"{mlp}{name}.weight"][inner]
        found[f"{mlp}down_proj.weight"] = found[f"{mlp}down_proj.weight"][:, inner]
        # Every key-value head has an order of its own, which the query heads that share it have too.
        orders = [random.permutation(width) for _ in range(groups)]
        values = np.concatenate([head * width + order for head, order in enumerate(orders)])
        outputs = np.concatenate(
            [
                (head * per_group + query) * width + order
                for head, order in enumerate(orders)
                for query in range(per_group)
            ]
        )
        found[f"{attention}v_proj.weight"] = found[f"{attention}v_proj.weight"][values]
        found[f"{attention}o_proj.weight"] = found[f"{attention}o_proj.weight"][:, outputs]
    return {key: np.ascontiguousarray(weight) for key, weight in found.items()}
