"""Qwen2-VL: images at their own shape, a tower with rotary positions, M-RoPE decoder (`model_type: qwen2_vl`).

Facts: patches of 14 pixels, four to a token. Boxes are `(x1,y1),(x2,y2)` in 0..1000 of the image's own width and height
(arXiv 2409.12191, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from gap_export import prune
from gap_export.families.complete import joined as joined
from gap_export.families.complete import parts as parts
from gap_export.families.complete import tokenizer as tokenizer
from gap_export.families.qwen_vl import QwenVL
from gap_export.modeling import selection
from gap_export.modeling.native import embedded, layer
from gap_export.plan import Plan
from gap_export.prune import order

GROUNDING_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Give the bounding box of <|object_ref_start|>{expression}<|object_ref_end|>.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Frame as the chat template has it, one `<|image_pad|>` standing for all. The question's words are ours: none are published."""


class Qwen2VLVision(nn.Module):
    """Patches of one image through the tower; pruner; merger for what is left."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.visual = model.model.visual
        self._plan = plan

    def forward(
        self, pixel_values: Tensor, patch_positions: Tensor, keep_count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode and prune one image.

        Args:
            pixel_values: [n, p, F] float32, the patches of every token.
            patch_positions: [n, p, 2] int64, row and column of each.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, H], kept_indices [1, K] int64.
        """
        tower = self.visual
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        rotary = tower.rotary_pos_emb(hidden_PE, patch_positions.flatten(0, 1))
        for block in tower.blocks:
            hidden_PE = layer(block, hidden_PE, rotary)
        return merged(self._plan, tower.merger, hidden_PE, pixel_values.shape[:2], keep_count)


def merged(
    plan: Plan, merger: Any, hidden_PE: Tensor, tokens: Sequence[int], keep_count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prune the tokens, and give what is left to the decoder.

    Args:
        plan: of the build.
        merger: of the tower, which lays the normed patches of a token side by side and projects them.
        hidden_PE: patches of all tokens.
        tokens: (how many tokens, patches of each).
        keep_count: see `Qwen2VLVision.forward`.

    Returns:
        visual_embeds [1, K, H], kept_indices [1, K] int64.
    """
    patches_BNE = merger.ln_q(hidden_PE).unflatten(0, tokens).flatten(1)[None]
    features = prune.VisionFeatures(patches_BNE=patches_BNE, grid=None, projected_BNH=merger.mlp(patches_BNE))
    selected = order.in_decoder_order(selection.select(plan, features, keep_count), plan.pruning.positions)
    return selection.project(plan, features, selected, merger.mlp), selected.indices_BK


MODEL = QwenVL(
    name="Qwen2-VL",
    model=Qwen2VLForConditionalGeneration,
    vision=Qwen2VLVision,
    grounding=GROUNDING_PROMPT,
    codec="qwen2_vl",
)
facts, text_tower, preprocessing = MODEL.facts, MODEL.text_tower, MODEL.preprocessing
prompt, box, components = MODEL.prompt, MODEL.box, MODEL.components
