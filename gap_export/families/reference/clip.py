"""What a CLIP tower shows a pruner, read from its full attention maps and hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gap_export.families.reference import Shown


def shown_by_clip(tower: Any, pixel_values_BCHW: Tensor, feature_layer: int) -> list[Shown]:
    """Fields of `prune.reference.Seen` for every image, `projected_NH` and those about text left out.

    Args:
        tower: transformers' CLIP vision model, with eager attention.
        pixel_values_BCHW: images or tiles.
        feature_layer: `vision_feature_layer` of the config, counting hidden states.
    """
    seen = tower(pixel_values_BCHW, output_hidden_states=True, output_attentions=True)
    # Hidden states are numbered from the embeddings on, so layer `run - 1` turns state `run - 1` into state `run`.
    layers = tower.encoder.layers
    run = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    into_BTE, out_BTE = seen.hidden_states[run - 1], seen.hidden_states[run]
    scoring = layers[run - 1].self_attn
    keys_BTE = scoring.k_proj(layers[run - 1].layer_norm1(into_BTE))
    above_BTE = layers[run].layer_norm1(out_BTE) if run < len(layers) else None
    fields: dict[str, Tensor | None] = {
        "patches_NE": out_BTE[:, 1:],
        "attention_N": seen.attentions[run - 1].float().mean(dim=1)[:, 0, 1:],
        "class_token_E": out_BTE[:, 0],
        "keys_ND": keys_BTE.float().unflatten(-1, (scoring.num_heads, -1)).mean(dim=2)[:, 1:],
        "following_query_E": None if above_BTE is None else layers[run].self_attn.q_proj(above_BTE[:, 0]),
        "following_keys_TE": None if above_BTE is None else layers[run].self_attn.k_proj(above_BTE),
        "normed_NE": tower.post_layernorm(out_BTE[:, 1:]),
    }
    return [
        {name: None if field is None else field[row] for name, field in fields.items()}
        for row in range(len(out_BTE))
    ]


def chosen_features(shown: Shown, indices: Any, patches_KE: Any) -> Tensor:
    """[K, E]: the patches at the indices, or what was merged from them."""
    patches_NE = shown["patches_NE"]
    assert patches_NE is not None
    if patches_KE is None:
        return patches_NE[torch.from_numpy(indices)]
    return torch.from_numpy(patches_KE).to(patches_NE.dtype)
