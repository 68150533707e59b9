"""The splice of prompts with several images: text and images in turn, each kept token with the id it had before pruning. In the graph.

What `splice.py` does for one image follows here from two running sums over the tokens of the prompt: how many slots everything before a
token takes, and by how much it moves positions. An image's placeholder takes as many slots as tokens were kept of it, and moves
positions by what the unpruned image would.

Shape letters: as in `splice.py`; I images in a prompt, the same number in every row; K kept tokens of all of them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_export.modeling.splice import Splice, with_empty_planes
from gap_export.positions import PositionPolicy


class SpliceSeveral(Splice):
    """Like `Splice`, with the same number of images, I, in every row."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_counts: Tensor,
        kept_indices: Tensor | None = None,
        visual_counts: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Splice.

        Args:
            input_ids: [B, T] int64, short rows filled with -1 at the end.
            visual_embeds: [B, K, H], one image's tokens after the other's, short rows padded at the end.
            kept_counts: [B, I] int64, tokens kept of each image, at least one.
            kept_indices: [B, K] int64 raster indices, each within its own image; for the policy that keeps ids.
            visual_counts: [B, I] int64, tokens of each image before pruning, where positions count; for the same.
            image_grid: [B, I, 2] int64, rows and columns of those, where positions follow the grid (M-RoPE); for the same.

        Returns:
            inputs_embeds [B, S, H], position_ids [B, S] (M-RoPE [3, B, S]) int64, next_position [B] int64, next_slot [B] int64.
        """
        images, longest = kept_counts.shape[1], visual_embeds.shape[1]
        is_real_BT = (input_ids >= 0).to(torch.int64)
        is_image_BT = (input_ids == self.image_token_id).to(torch.int64)
        image_BT = (is_image_BT.cumsum(1) - 1).clamp(0, images - 1)

        def per_token(of_images_BI: Tensor) -> Tensor:
            """[B, T]: a placeholder counts for its image, text for one token, padding for none."""
            return torch.where(is_image_BT > 0, of_images_BI.gather(1, image_BT), is_real_BT)

        slots_BT = per_token(kept_counts)
        extents_BT = per_token(self._extents(kept_counts, visual_counts, image_grid))
        first_slot_BT, first_position_BT = slots_BT.cumsum(1) - slots_BT, extents_BT.cumsum(1) - extents_BT

        slots_S = torch.arange(input_ids.shape[1] - images + longest)
        # The token that a slot shows is the last one that begins at it or before it.
        token_BS = (first_slot_BT[:, None, :] <= slots_S[None, :, None]).to(torch.int64).sum(-1) - 1
        within_BS = slots_S[None] - first_slot_BT.gather(1, token_BS)
        is_visual_BS = is_image_BT.gather(1, token_BS) > 0
        image_BS = image_BT.gather(1, token_BS)
        kept_before_BI = kept_counts.cumsum(1) - kept_counts
        visual_index_BS = (kept_before_BI.gather(1, image_BS) + within_BS).clamp(0, longest - 1)

        # The placeholder's own id need not be in the table; what stands in its place comes from the image.
        text_ids_BS = input_ids.gather(1, token_BS).clamp(0, self.embed_tokens.num_embeddings - 1)
        text_BSH = with_empty_planes(self.embed_tokens(text_ids_BS), self.deepstack_levels)
        visual_BSH = visual_embeds.gather(
            1, visual_index_BS[:, :, None].expand(-1, -1, visual_embeds.shape[2])
        )
        inputs_embeds = torch.where(is_visual_BS[:, :, None], visual_BSH, text_BSH)

        image_ids = within_BS
        if self.policy is PositionPolicy.GAP:
            if kept_indices is None:
                raise ValueError("gap needs the kept indices")
            image_ids = kept_indices.gather(1, visual_index_BS)
        if self.mrope:
            image_ids = self._three_rows(
                image_ids, None if image_grid is None else image_grid[:, :, 1].gather(1, image_BS)
            )
        first_BS = first_position_BT.gather(1, token_BS)
        position_ids = torch.where(is_visual_BS, first_BS + image_ids, first_BS)
        return inputs_embeds, position_ids, extents_BT.sum(1), slots_BT.sum(1)

    def _extents(
        self, kept_counts: Tensor, visual_counts: Tensor | None, image_grid: Tensor | None
    ) -> Tensor:
        """[B, I]: by how much each image moves the positions of what comes after it."""
        if self.policy is not PositionPolicy.GAP:
            return kept_counts
        if image_grid is not None:
            return image_grid.amax(dim=2)
        assert visual_counts is not None
        return visual_counts
