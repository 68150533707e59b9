"""CLIP tower up to the feature layer, pruner, projector: the vision graph of families with a CLIP tower.

The modules of transformers are traced unchanged; only the tower is walked layer by layer, to stop at the feature layer and to
see its class token's query.

Shape letters: as in `prune/__init__.py`; L tokens of the expression.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from gap_export import prune
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.modeling import selection
from gap_export.modeling.clip_text import ClipText
from gap_export.modeling.hf_config import ConfigCheck, accepted, check_activations
from gap_export.modeling.sizes import check_square_tower
from gap_export.plan import Plan

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's CLIP was trained on; every tower that comes from it is fed with these."""

UNUSED_OF_CLIP = r"vision_tower/(text_model\.|text_projection\.|visual_projection\.|logit_scale)"
"""Keys of a whole CLIP checkpoint that a vision tower does not need."""


class ClipVision(nn.Module):
    """CLIP tower up to the feature layer, pruner, projector.

    Args:
        tower: without weights.
        projector: from the tower's width to the decoder's.
        plan: of the build.
        feature_layer: how many layers of the tower are run.
        text: the text tower, for pruners that look at the expression.
    """

    def __init__(
        self,
        tower: CLIPVisionModel,
        projector: nn.Module,
        plan: Plan,
        *,
        feature_layer: int,
        text: ClipText | None,
    ) -> None:
        super().__init__()
        vision = tower.config
        self.vision_tower = tower
        self.multi_modal_projector = projector
        self.text_tower = text
        self._plan = plan
        self._run = feature_layer
        side = vision.image_size // vision.patch_size
        self._grid = (side, side)

    def forward(
        self, pixel_values: Tensor, text_ids: Tensor | None = None, keep_count: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Encode and prune.

        Args:
            pixel_values: [B, 3, size, size] float32.
            text_ids: [B, L] int64 of the expression, for pruners that look at it.
            keep_count: where requests choose how many tokens to keep: [K] int64 counting from 0, traced for its extent.

        Returns:
            visual_embeds [B, K, H], kept_indices [B, K] int64; where images differ in how many they keep, kept_counts [B]
            int64, rows being padded to the bound.
        """
        features = self.extract_features(pixel_values, text_ids)
        embeds_BKH, selected = selection.select_and_project(
            self._plan, features, keep_count, self.multi_modal_projector
        )
        return selection.outputs(embeds_BKH, selected)

    def extract_features(
        self, pixel_values: Tensor, text_ids: Tensor | None = None
    ) -> prune.VisionFeatures[Tensor]:
        """What the tower shows of images or tiles; arguments as of `forward`."""
        hidden_BTE = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixel_values))
        layers = self.vision_tower.encoder.layers
        for layer in layers[: self._run - 1]:
            hidden_BTE = layer(hidden_BTE, None)
        following = layers[self._run] if self._run < len(layers) else None
        return self._features(hidden_BTE, layers[self._run - 1], following, text_ids)

    def _features(
        self, hidden_BTE: Tensor, feature: Any, following: Any, text_ids: Tensor | None
    ) -> prune.VisionFeatures[Tensor]:
        """Everything any pruner reads; what this one does not read is dead code and leaves the graph.

        Args:
            hidden_BTE: input of the feature layer.
            feature: the layer whose output the decoder gets.
            following: the next layer; None where the tower ends.
            text_ids: of the expression.
        """
        attention = feature.self_attn
        heads = (attention.num_heads, attention.head_dim)
        normed_BTE = feature.layer_norm1(hidden_BTE)
        out_BTE = feature(hidden_BTE, None)
        above, normed_above_BTE = feature, normed_BTE
        if following is not None:
            above, normed_above_BTE = following, following.layer_norm1(out_BTE)
        query_above_BE = above.self_attn.q_proj(normed_above_BTE[:, 0])
        keys_above_BTE = above.self_attn.k_proj(normed_above_BTE)
        aligned_BNP = text_BP = None
        if self.text_tower is not None and text_ids is not None:
            aligned_BNP = self.text_tower.visual_projection(self.vision_tower.post_layernorm(out_BTE[:, 1:]))
            text_BP = self.text_tower(text_ids)
        patches_BNE = out_BTE[:, 1:]
        query_BAD = attention.q_proj(normed_BTE[:, 0]).unflatten(-1, heads)
        keys_BATD = attention.k_proj(normed_BTE).unflatten(-1, heads).transpose(1, 2)

        return prune.VisionFeatures(
            patches=patches_BNE,
            grid=self._grid,
            attention=lambda: prune.class_attention(query_BAD, keys_BATD),
            class_token=out_BTE[:, 0],
            mean_keys=lambda: prune.mean_keys(keys_BATD),
            full_width_attention=lambda: prune.class_attention(
                query_above_BE[:, None], keys_above_BTE[:, None]
            ),
            full_width_keys=lambda: keys_above_BTE[:, 1:].float(),
            projected=self.multi_modal_projector(out_BTE[:, 1:]),
            aligned=aligned_BNP,
            text=text_BP,
            aligned_inversely=self._plan.text_tower is None or self._plan.text_tower.aligned_inversely,
        )


def read_vision_config(companion: Checkpoint) -> CLIPVisionConfig:
    """Config of the vision tower in a CLIP checkpoint, whole or the tower alone.

    Raises:
        CheckpointError: it holds another kind of model, or a config that transformers does not accept.
    """
    kinds = {"clip": CLIPConfig, "clip_vision_model": CLIPVisionConfig}
    if companion.model_type not in kinds:
        raise CheckpointError(
            f"has model_type {companion.model_type!r} where a CLIP checkpoint is needed",
            subject=str(companion.folder / "config.json"),
            hint="--vision-tower names the CLIP checkpoint that the model was trained on",
        )
    kind = kinds[companion.model_type]
    check_activations(companion)
    config = accepted(lambda: kind.from_dict(deepcopy(companion.config)), companion)
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    check_square_tower(vision, ConfigCheck(companion, "CLIP"))
    return vision
