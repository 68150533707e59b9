"""What a CLIP tower shows a pruner, read from its full attention maps and hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gap_export.families.reference import ImageFeatures
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice


def clip_features(
    tower: Any,
    pixel_values_BCHW: Tensor,
    feature_layer: int | list[int],
    *,
    grid: tuple[int, int] | None,
    projector: Callable[[Tensor], Tensor] | None = None,
) -> list[ImageFeatures]:
    """Features of every image or tile, those about text left out; beside them `normed`, the patches as the text tower wants them.

    Args:
        tower: transformers' CLIP vision model, with eager attention.
        pixel_values_BCHW: images or tiles.
        feature_layer: `vision_feature_layer` of the config, counting hidden states; a list of one is that one.
        grid: (rows, columns) of the patches, where all images have the same.
        projector: of the patches; left out, there are no projected ones.
    """
    states = tower(pixel_values_BCHW, output_hidden_states=True, output_attentions=True)
    if isinstance(feature_layer, list):
        (feature_layer,) = feature_layer
    # Hidden states are numbered from the embeddings on, so layer `run - 1` turns state `run - 1` into state `run`.
    layers = tower.encoder.layers
    run = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    into_BTE, out_BTE = states.hidden_states[run - 1], states.hidden_states[run]
    scoring = layers[run - 1].self_attn
    keys_BTE = scoring.k_proj(layers[run - 1].layer_norm1(into_BTE))
    keys_BND = keys_BTE.float().unflatten(-1, (scoring.num_heads, -1)).mean(dim=2)[:, 1:]
    attention_BN = states.attentions[run - 1].float().mean(dim=1)[:, 0, 1:]
    # (Hidden state `run` is what layer `run` is given.)
    above = min(run, len(layers) - 1)
    above_BTE = layers[above].layer_norm1(states.hidden_states[above])
    query_above_BE = layers[above].self_attn.q_proj(above_BTE[:, 0])
    keys_above_BTE = layers[above].self_attn.k_proj(above_BTE)
    normed_BNE = tower.post_layernorm(out_BTE[:, 1:])
    images = []
    for row, out_TE in enumerate(out_BTE):
        features = VisionFeatures(
            patches=out_TE[1:],
            grid=grid,
            attention=attention_BN[row],
            class_token=out_TE[0],
            mean_keys=keys_BND[row],
            full_width_attention=_attention(query_above_BE[row], keys_above_BTE[row]),
            full_width_keys=keys_above_BTE[row, 1:],
            projected=None if projector is None else projector(out_TE[1:]),
        )
        images.append(ImageFeatures(features, {"normed": normed_BNE[row]}))
    return images


def _attention(query_E: Tensor, keys_TE: Tensor) -> Tensor:
    """[N] float64: attention of the class token to the patches, heads not split."""
    logits_T = keys_TE.double() @ query_E.double() / len(query_E) ** 0.5
    attention_N: Tensor = logits_T.softmax(dim=0)[1:]
    return attention_N


def chosen_features(image: ImageFeatures, choice: Choice) -> Tensor:
    """[K, E]: the patches that were chosen, or what was merged from them."""
    patches_NE = image.shown.patches
    if choice.patches_KE is None:
        return patches_NE[torch.from_numpy(choice.indices_K)]
    return torch.from_numpy(choice.patches_KE).to(patches_NE.dtype)
