"""Splice: the kept visual tokens take the placeholder's place, and every token gets its position id. In the graph.

Shared by every family with one-dimensional position ids. The arithmetic is that of the table in `positions.py`, written
as tensor code so that it is exported: whoever runs the graph, in whatever language, gets the right ids.

Where pictures differ in how many tokens they keep, rows of visual tokens are padded at the end, like rows of text. K then is the
longest row, and text follows the last real token of its own row.

Shape letters: B batch, T text tokens with one placeholder, K kept, N visual tokens before pruning, S = T - 1 + K,
H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gap_export.positions import PositionPolicy


class Embed(nn.Module):
    """Token ids to embeddings: what decoding needs for every generated token."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, H]."""
        embeds: Tensor = self.embed_tokens(input_ids)
        return embeds


class Splice(nn.Module):
    """Text embedding, insertion of the visual tokens, and the position arithmetic.

    Args:
        embedding: the decoder's token embedding.
        image_token_id: id of the placeholder; exactly one in every row.
        visual_tokens: N.
        policy: how survivors are numbered.
    """

    def __init__(
        self, embedding: nn.Embedding, *, image_token_id: int, visual_tokens: int, policy: PositionPolicy
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.image_token_id = image_token_id
        self.visual_tokens = visual_tokens
        self.policy = policy

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_indices: Tensor | None = None,
        kept_counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Splice.

        Args:
            input_ids: [B, T] int64, short rows filled with -1 at the end.
            visual_embeds: [B, K, H].
            kept_indices: [B, K] int64 raster indices; policies that renumber do not look at them, and their graphs do not
                take them.
            kept_counts: [B] int64, real tokens in each row of the two above; None where all K are.

        Returns:
            inputs_embeds [B, S, H], position_ids [B, S] int64, next_position [B] int64, next_slot [B] int64.
        """
        longest, hidden = visual_embeds.shape[1], visual_embeds.shape[2]
        kept = longest if kept_counts is None else kept_counts[:, None]
        extent = self.visual_tokens if self.policy is PositionPolicy.GAP else kept
        slots_S = torch.arange(input_ids.shape[1] - 1 + longest)

        # A prefix sum of "is the placeholder" is 0 before it and 1 from it on: its zeros count the text before.
        from_image_BT = (input_ids == self.image_token_id).to(torch.int64).cumsum(1)
        before_B1 = (1 - from_image_BT).sum(1, keepdim=True)
        tokens_B1 = (input_ids >= 0).to(torch.int64).sum(1, keepdim=True)

        within_image_BS = slots_S[None] - before_B1
        is_visual_BS = (within_image_BS >= 0) & (within_image_BS < kept)
        is_after_BS = within_image_BS >= kept

        # Which text token a slot outside the image shows: itself before, one less than what was kept further left after.
        text_index_BS = torch.where(is_after_BS, slots_S[None] - (kept - 1), slots_S[None]).clamp(
            max=input_ids.shape[1] - 1
        )
        visual_index_BS = within_image_BS.clamp(0, longest - 1)

        text_ids_BS = input_ids.gather(1, text_index_BS).clamp(min=0)
        text_BSH = self.embed_tokens(text_ids_BS)
        visual_BSH = visual_embeds.gather(1, visual_index_BS[:, :, None].expand(-1, -1, hidden))
        inputs_embeds = torch.where(is_visual_BS[:, :, None], visual_BSH, text_BSH)

        image_ids_BS = visual_index_BS
        if self.policy is PositionPolicy.GAP:
            if kept_indices is None:
                raise ValueError("gap needs the kept indices")
            image_ids_BS = kept_indices.gather(1, visual_index_BS)
        text_position_BS = torch.where(is_after_BS, slots_S[None] + (extent - kept), slots_S[None])
        position_ids = torch.where(is_visual_BS, before_B1 + image_ids_BS, text_position_BS)

        next_position = (tokens_B1 - 1 + extent)[:, 0]
        next_slot = (tokens_B1 - 1 + kept)[:, 0]
        return inputs_embeds, position_ids, next_position, next_slot
