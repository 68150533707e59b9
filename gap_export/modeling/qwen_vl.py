"""The vision towers of the Qwen-VL generations: patches of one image, the pruner, and the merger for what is left.

The merger lays the patches of a token side by side and projects them together, so that tokens are what is pruned, after the tower and never
inside it. What scores a patch scores a token by the mean over its patches; pruners that merge add up tokens that were projected.

DeepStack (Qwen3-VL, arXiv 2406.04334): features of some layers of the tower are projected too, and added to the hidden states of the
visual tokens after the first layers of the decoder; they are pruned with the same indices.

Shape letters: as in `native.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gap_export import prune
from gap_export.modeling import selection
from gap_export.modeling.native import Windows, embedded, layer, shown
from gap_export.modeling.text_embedding import embedding_for, with_text
from gap_export.plan import Plan
from gap_export.prune import order


class Qwen2VLVision(nn.Module):
    """Patches of one image through the tower; pruner; merger for what is left."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.visual = model.model.visual
        self._plan = plan
        self.embed_tokens = embedding_for(plan, model.get_input_embeddings())

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [n, p, F] float32, the patches of every token.
            patch_positions: [n, p, 2] int64, row and column of each.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, H], kept_indices [1, K] int64.
        """
        tower = self.visual
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        rotary = tower.rotary_pos_emb(hidden_PE, patch_positions.flatten(0, 1))
        *blocks, last = tower.blocks
        for block in blocks:
            hidden_PE = layer(block, hidden_PE, rotary)
        tokens = pixel_values.shape[:2]
        scores = shown(last, hidden_PE, rotary, tokens[1])
        hidden_PE = layer(last, hidden_PE, rotary)
        return pruned(
            self._plan,
            [level_of(tower.merger, hidden_PE, tokens)],
            {**scores, **lying(patch_positions)},
            Choosing(self.embed_tokens, text_ids, keep_count),
        )


@dataclass(frozen=True)
class Choosing:
    """What a request says of the tokens to keep, and what its text is read by.

    Attributes:
        embedding: of the decoder; None where no text is read.
        text_ids: [1, L] int64 of the expression.
        keep_count: K, where requests choose it.
    """

    embedding: nn.Module | None
    text_ids: Tensor | None
    keep_count: Tensor | None


@dataclass(frozen=True)
class Level:
    """Features of all tokens before their merger: those of the tower's end, or a level of DeepStack.

    Attributes:
        tokens_BNE: the patches of a token side by side.
        merger: projects them, token by token.
    """

    tokens_BNE: Tensor
    merger: Callable[[Tensor], Any]

    def embeds(self, indices_BK: Tensor | None = None) -> Tensor:
        """[1, N, H] as the decoder takes them; of those at [1, K] alone, where they are given."""
        tokens_BNE = self.tokens_BNE if indices_BK is None else order.take(self.tokens_BNE, indices_BK)
        embeds_BNH: Tensor = self.merger(tokens_BNE)
        return embeds_BNH


def level_of(merger: Any, hidden_PE: Tensor, tokens: Sequence[int]) -> Level:
    """The end of a tower whose merger norms patch by patch.

    Args:
        merger: of Qwen2-VL or Qwen2.5-VL.
        hidden_PE: patches of all tokens.
        tokens: (how many tokens, patches of each).
    """
    return Level(side_by_side(merger.ln_q(hidden_PE), tokens), merger.mlp)


def side_by_side(patches_PE: Tensor, tokens: Sequence[int]) -> Tensor:
    """[1, N, p * E]: the patches of every token; arguments as of `level_of`."""
    joined_1NE: Tensor = patches_PE.unflatten(0, tokens).flatten(1)[None]
    return joined_1NE


def pruned(
    plan: Plan, levels: Sequence[Level], scores: dict[str, Any], given: Choosing
) -> tuple[Tensor, ...]:
    """Prune the tokens, and give what is left to the decoder.

    Args:
        plan: of the build.
        levels: the tower's end, and those of DeepStack.
        scores: further fields of `prune.VisionFeatures`.
        given: what a request says.

    Returns:
        visual_embeds [1, K, (1 + deepstack_levels) * H], kept_indices [1, K] int64, and kept_counts [1] int64 where the pruner finds it.
    """
    end, *beside = levels
    projected_BNH = end.embeds()
    features = prune.VisionFeatures(
        patches=projected_BNH,
        grid=None,
        projected=projected_BNH,
        embeds=lambda: _behind_each_other([projected_BNH, *(level.embeds() for level in beside)]),
        **scores,
    )
    features = with_text(features, given.embedding, given.text_ids)
    selected = selection.select(plan, features, given.keep_count)
    selected = order.in_decoder_order(selected, plan.pruning.positions)
    if selected.patches_BKE is not None:
        return selection.outputs(selected.patches_BKE, selected)
    indices_BK = selected.indices_BK.clamp(min=0)  # padding shows any token
    if prune.row(selection.pruner_of(plan)).reads_projected:
        own_BKH = order.take(projected_BNH, indices_BK)
    else:
        own_BKH = end.embeds(indices_BK)
    embeds_BKX = _behind_each_other([own_BKH, *(level.embeds(indices_BK) for level in beside)])
    return selection.outputs(embeds_BKX, selected)


def lying(patch_positions: Tensor) -> dict[str, Any]:
    """Fields of `prune.VisionFeatures`: the grid of the tokens, each a square of patches.

    Args:
        patch_positions: [n, p, 2] int64, row and column of the patches of every token.
    """
    last_12 = patch_positions.flatten(0, 1).amax(dim=0, keepdim=True)
    # Of one element each: TensorRT-RTX 1.7 builds no graph that makes indices of scalars.
    rows_1, columns_1 = ((last_12 + 1) // math.isqrt(patch_positions.shape[1])).unbind(dim=1)
    return {"grids": (prune.Grid(rows_1, columns_1),)}


def _behind_each_other(embeds: Sequence[Tensor]) -> Tensor:
    return embeds[0] if len(embeds) == 1 else torch.cat(list(embeds), dim=-1)


class Qwen25VLVision(nn.Module):
    """Patches of one image through the tower; pruner; merger for what is left."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.visual = model.model.visual
        self._plan = plan
        self.embed_tokens = embedding_for(plan, model.get_input_embeddings())

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_tokens: Tensor,
        token_slots: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [n, p, F] float32, the patches of every token.
            patch_positions: [n, p, 2] int64, row and column of each.
            window_tokens: [W, M] int64, the tokens of every window, -1 where it ends early.
            token_slots: [n] int64, where each token stands among those W * M.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, H], kept_indices [1, K] int64.
        """
        tower, windows = self.visual, Windows.of(window_tokens, token_slots, pixel_values.shape[1])
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        rotary = tower.rotary_pos_emb(hidden_PE, patch_positions.flatten(0, 1))
        tokens, scores = pixel_values.shape[:2], {}
        for number, block in enumerate(tower.blocks):
            sees_all = number in tower.fullatt_block_indexes
            if number == max(tower.fullatt_block_indexes, default=None):
                scores = shown(block, hidden_PE, rotary, tokens[1])
            hidden_PE = layer(block, hidden_PE, rotary, None if sees_all else windows)
        return pruned(
            self._plan,
            [level_of(tower.merger, hidden_PE, tokens)],
            {**scores, **lying(patch_positions)},
            Choosing(self.embed_tokens, text_ids, keep_count),
        )


class Qwen3VLVision(nn.Module):
    """Patches of one image through the tower; pruner; mergers for what is left."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.visual = model.model.visual
        self._plan = plan
        self.embed_tokens = embedding_for(plan, model.get_input_embeddings())

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        text_ids: Tensor | None = None,
        keep_count: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode and prune one image.

        Args:
            pixel_values: [n, p, F] float32, the patches of every token.
            patch_positions: [n, p, 2] int64, row and column of each.
            text_ids: [1, L] int64 of the expression, for pruners that look at it.
            keep_count: [K] int64 counting from 0, traced for its extent: tokens to keep.

        Returns:
            visual_embeds [1, K, (1 + deepstack_levels) * H], kept_indices [1, K] int64.
        """
        tower, positions_P2 = self.visual, patch_positions.flatten(0, 1)
        hidden_PE = embedded(tower.patch_embed, pixel_values)
        learned_PE = interpolated(tower.pos_embed, tower.num_grid_per_side, positions_P2)
        hidden_PE = hidden_PE + learned_PE.to(hidden_PE.dtype)
        rotary = tower.rotary_pos_emb(hidden_PE, positions_P2)
        tokens, beside, scores = pixel_values.shape[:2], list[Tensor](), {}
        for number, block in enumerate(tower.blocks):
            if number == len(tower.blocks) - 1:
                scores = shown(block, hidden_PE, rotary, tokens[1])
            hidden_PE = layer(block, hidden_PE, rotary)
            if number in tower.deepstack_visual_indexes:
                beside.append(hidden_PE)
        # The last merger norms patch by patch, those of DeepStack the patches of a token together.
        end = side_by_side(tower.merger.norm(hidden_PE), tokens)
        levels = [
            Level(end, partial(_projected, tower.merger)),
            *(
                Level(side_by_side(patches_PE, tokens), partial(_row_by_row, merger))
                for patches_PE, merger in zip(beside, tower.deepstack_merger_list, strict=True)
            ),
        ]
        return pruned(
            self._plan,
            levels,
            {**scores, **lying(patch_positions)},
            Choosing(self.embed_tokens, text_ids, keep_count),
        )


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


def _row_by_row(merger: Any, tokens_1NE: Tensor) -> Tensor:
    """[1, N, H] from a merger of DeepStack, which takes the tokens of all images one behind the other."""
    embeds_NH: Tensor = merger(tokens_1NE[0])
    return embeds_NH[None]


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
