"""The vision towers of the Qwen-VL generations: patches of one image, the pruner, and the merger for what is left.

DeepStack (Qwen3-VL, arXiv 2406.04334): features of some layers of the tower are projected too, and added to the hidden states of the
visual tokens after the first layers of the decoder; they are pruned with the same indices.

Shape letters: as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gap_export import prune
from gap_export.modeling import selection
from gap_export.modeling.native import Windows, embedded, layer
from gap_export.plan import Plan
from gap_export.prune import order


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
        keep_count: K, where requests choose it.

    Returns:
        visual_embeds [1, K, H], kept_indices [1, K] int64.
    """
    patches_BNE = merger.ln_q(hidden_PE).unflatten(0, tokens).flatten(1)[None]
    features = prune.VisionFeatures(patches=patches_BNE, grid=None, projected=merger.mlp(patches_BNE))
    embeds_BKH, selected = selection.select_and_project(plan, features, keep_count, merger.mlp)
    return embeds_BKH, selected.indices_BK


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
        features = prune.VisionFeatures(patches=patches_BNE, grid=None, projected=project(patches_BNE))
        embeds_BKH, selected = selection.select_and_project(self._plan, features, keep_count, project)
        deepstack_levels = [
            merger(order.take(plane_PE.unflatten(0, tokens).flatten(1)[None], selected.indices_BK)[0])[None]
            for plane_PE, merger in zip(beside, tower.deepstack_merger_list, strict=True)
        ]
        return torch.cat([embeds_BKH, *deepstack_levels], dim=-1), selected.indices_BK


def add_deepstack(language_model: Any, levels: Sequence[Tensor]) -> dict[str, Any]:
    """A hook of the decoder (`decoder.BetweenLayers`): features of DeepStack are added after its first layers.

    transformers adds a level to the visual tokens alone, by a mask; ours is zero elsewhere, and added to all.
    """
    language_model._deepstack_process = lambda hidden_BSH, _mask, level_BSH: hidden_BSH + level_BSH
    return {"visual_pos_masks": None, "deepstack_visual_embeds": list(levels)}


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
