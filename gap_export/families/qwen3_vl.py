"""Qwen3-VL: a tower with learned and rotary positions, DeepStack, M-RoPE decoder (`model_type: qwen3_vl`).

Facts: patches of 16 pixels, four to a token. The learned positions are a square table, interpolated to the shape of the image.
DeepStack (arXiv 2406.04334): features of some layers of the tower are projected too, and added to the hidden states of the visual
tokens after the first layers of the decoder; they are pruned with the same indices. Boxes are JSON,
`{"bbox_2d": [x1, y1, x2, y2], "label": ...}`, in 0..1000 of the image's own width and height (its authors' notebook on grounding).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

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
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Locate {expression}, report its bbox coordinates in JSON format.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""As the chat template and the notebook have it, one `<|image_pad|>` standing for all."""


class Qwen3VLVision(nn.Module):
    """Patches of one image through the tower; pruner; mergers for what is left."""

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
            visual_embeds [1, K, (1 + deepstack_levels) * H], kept_indices [1, K] int64.
        """
        tower, positions_P2 = self.visual, patch_positions.flatten(0, 1)
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        learned_PE = interpolated(tower.pos_embed, tower.num_grid_per_side, positions_P2)
        hidden_PE = hidden_PE + learned_PE.to(hidden_PE.dtype)
        rotary = tower.rotary_pos_emb(hidden_PE, positions_P2)
        beside: list[Tensor] = []
        for number, block in enumerate(tower.blocks):
            hidden_PE = layer(block, hidden_PE, rotary)
            if number in tower.deepstack_visual_indexes:
                beside.append(hidden_PE)

        tokens, project = pixel_values.shape[:2], partial(_projected, tower.merger)
        patches_BNE = tower.merger.norm(hidden_PE).unflatten(0, tokens).flatten(1)[None]
        features = prune.VisionFeatures(
            patches_BNE=patches_BNE, grid=None, projected_BNH=project(patches_BNE)
        )
        selected = selection.select(self._plan, features, keep_count)
        selected = order.in_decoder_order(selected, self._plan.pruning.positions)
        embeds_BKH = selection.project(self._plan, features, selected, project)
        deepstack_levels = [
            merger(order.take(plane_PE.unflatten(0, tokens).flatten(1)[None], selected.indices_BK)[0])[None]
            for plane_PE, merger in zip(beside, tower.deepstack_merger_list, strict=True)
        ]
        return torch.cat([embeds_BKH, *deepstack_levels], dim=-1), selected.indices_BK


def _projected(merger: Any, normed_BNE: Tensor) -> Tensor:
    """What the merger does after it has normed the patches and laid them side by side."""
    projected_BNH: Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(normed_BNE)))
    return projected_BNH


def interpolated(table: nn.Embedding, side: int, positions_P2: Tensor) -> Tensor:
    """[P, E] float32: a square table of positions, stretched bilinearly over the image, corner on corner.

    Args:
        table: [side * side, E], row by row.
        side: of the table.
        positions_P2: int64 rows and columns of the patches of one image.
    """
    extents_2 = positions_P2.amax(dim=0)
    places_P2 = positions_P2.float() * (side - 1) / extents_2.clamp(min=1)
    first_P2 = places_P2.floor()
    beyond_P2 = places_P2 - first_P2
    taps = [(first_P2.long() + step).clamp(max=side - 1) for step in (0, 1)]
    weights = [1 - beyond_P2, beyond_P2]
    terms = [
        table(taps[down][:, 0] * side + taps[across][:, 1]).float()
        * (weights[down][:, 0] * weights[across][:, 1])[:, None]
        for down in (0, 1)
        for across in (0, 1)
    ]
    learned_PE: Tensor = terms[0] + terms[1] + terms[2] + terms[3]
    return learned_PE


def _planes(config: Any) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


def _are_layers(indexes: list[int], depth: int) -> bool:
    return sorted({*indexes}) == [*indexes] and all(0 <= index < depth for index in indexes)


MODEL = QwenVL(
    name="Qwen3-VL",
    model=Qwen3VLForConditionalGeneration,
    vision=Qwen3VLVision,
    grounding=GROUNDING_PROMPT,
    codec="qwen3_vl",
    deepstack_levels=_planes,
    supported=lambda config: (
        (
            "vision_config.deepstack_visual_indexes",
            "layers of the tower, ascending, at most as many as the decoder has",
            _are_layers(config.vision_config.deepstack_visual_indexes, config.vision_config.depth)
            and _planes(config) <= config.text_config.num_hidden_layers,
        ),
    ),
)
facts, text_tower, preprocessing = MODEL.facts, MODEL.text_tower, MODEL.preprocessing
prompt, box, components = MODEL.prompt, MODEL.box, MODEL.components
