"""Qwen2.5-VL: as Qwen2-VL, with most layers of the tower attending within windows (`model_type: qwen2_5_vl`).

Facts: windows of 112 pixels; four of 32 layers attend to all. Boxes are JSON, `{"bbox_2d": [x1, y1, x2, y2], "label": ...}`, in pixels of
the image as preprocessing scaled it (arXiv 2502.13923, section 2.1.1, and its authors' notebook on spatial understanding).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from gap_export.families.complete import joined as joined
from gap_export.families.complete import parts as parts
from gap_export.families.complete import tokenizer as tokenizer
from gap_export.families.qwen2_vl import merged
from gap_export.families.qwen_vl import QwenVL
from gap_export.modeling.native import Windows, embedded, layer
from gap_export.plan import Plan

GROUNDING_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Locate {expression}, output its bbox coordinates using JSON format.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""As the chat template and the notebook have it, one `<|image_pad|>` standing for all."""


class Qwen25VLVision(nn.Module):
    """Patches of one image through the tower; pruner; merger for what is left."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.visual = model.model.visual
        self._plan = plan

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_tokens: Tensor,
        token_slots: Tensor,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode and prune one image.

        Args:
            pixel_values: [n, p, F] float32, the patches of every token.
            patch_positions: [n, p, 2] int64, row and column of each.
            window_tokens: [W, M] int64, the tokens of every window, -1 where it ends early.
            token_slots: [n] int64, where each token stands among those W * M.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, H], kept_indices [1, K] int64.
        """
        tower, windows = self.visual, Windows.of(window_tokens, token_slots, pixel_values.shape[1])
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        rotary = tower.rotary_pos_emb(hidden_PE, patch_positions.flatten(0, 1))
        for number, block in enumerate(tower.blocks):
            sees_all = number in tower.fullatt_block_indexes
            hidden_PE = layer(block, hidden_PE, rotary, None if sees_all else windows)
        return merged(self._plan, tower.merger, hidden_PE, pixel_values.shape[:2], keep_count)


def _window(config: Any) -> int:
    """Tokens along the side of a window."""
    vision = config.vision_config
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)


MODEL = QwenVL(
    name="Qwen2.5-VL",
    model=Qwen2_5_VLForConditionalGeneration,
    vision=Qwen25VLVision,
    grounding=GROUNDING_PROMPT,
    codec="qwen2_5_vl",
    window=_window,
    supported=lambda config: (("vision_config.window_size", "at least one token", _window(config) >= 1),),
)
facts, text_tower, preprocessing = MODEL.facts, MODEL.text_tower, MODEL.preprocessing
prompt, box, components = MODEL.prompt, MODEL.box, MODEL.components
