"""Splice: the kept visual tokens take the placeholder's place, and every token gets its position id. In the graph.

Shared by every family with one-dimensional position ids. The arithmetic is that of the table in `positions.py`, written
as tensor code so that it is exported: whoever runs the graph, in whatever language, gets the right ids.

Where images differ in how many tokens they keep, rows of visual tokens are padded at the end, like rows of text. K then is the
longest row, and text follows the last real token of its own row.

With several images in a prompt (`SpliceSeveral`) the same follows from two running sums over the tokens of the prompt: how many slots
everything before a token takes, and by how much it moves positions. An image's placeholder takes as many slots as tokens were kept of
it, and moves positions by what the unpruned image would.

Shape letters: B batch, T text tokens with one placeholder, K kept, N visual tokens before pruning, S = T - 1 + K,
H hidden size; with several images: I of them, T text tokens with I placeholders, K kept of all of them together, S = T - I + K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gap_export.positions import PositionPolicy


class Embed(nn.Module):
    """Token ids to embeddings: what decoding needs for every generated token.

    Args:
        embedding: the decoder's token embedding.
        deepstack_levels: how many features of DeepStack lie behind each embedding.
    """

    def __init__(self, embedding: nn.Embedding, *, deepstack_levels: int = 0) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.deepstack_levels = deepstack_levels

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, (1 + deepstack_levels) * H]."""
        return with_empty_levels(self.embed_tokens(input_ids), self.deepstack_levels)


def grid_ids(raster_BS: Tensor, columns: Tensor) -> Tensor:
    """[3, B, S]: time, row and column of tokens whose raster indices are given, in grids of so many columns ([B, 1] or [B, S])."""
    row_BS = torch.div(raster_BS, columns, rounding_mode="trunc")
    return torch.stack([torch.zeros_like(row_BS), row_BS, raster_BS - row_BS * columns])


def with_empty_levels(embeds_BSH: Tensor, deepstack_levels: int) -> Tensor:
    """[B, S, (1 + deepstack_levels) * H]: text has nothing to add between the layers."""
    if not deepstack_levels:
        return embeds_BSH
    return torch.cat([embeds_BSH, *[torch.zeros_like(embeds_BSH)] * deepstack_levels], dim=-1)


class Splice(nn.Module):
    """Text embedding, insertion of the visual tokens, and the position arithmetic.

    Args:
        embedding: the decoder's token embedding.
        image_token_id: id of the placeholder; exactly one in every row.
        visual_tokens: N; None where images differ.
        policy: how survivors are numbered.
        mrope: three rows of ids (time, height, width).
        deepstack_levels: how many features of DeepStack lie behind each embedding; H below is the width of everything that belongs to a token.
        gives_image_slots: whether `image_slots` is among the outputs.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        image_token_id: int,
        visual_tokens: int | None,
        policy: PositionPolicy,
        mrope: bool = False,
        deepstack_levels: int = 0,
        gives_image_slots: bool = False,
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.gives_image_slots = gives_image_slots
        self.image_token_id = image_token_id
        self.visual_tokens = visual_tokens
        self.policy = policy
        self.mrope = mrope
        self.deepstack_levels = deepstack_levels

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_indices: Tensor | None = None,
        kept_counts: Tensor | None = None,
        visual_counts: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Splice.

        Args:
            input_ids: [B, T] int64, short rows filled with -1 at the end.
            visual_embeds: [B, K, H].
            kept_indices: [B, K] int64 raster indices; policies that renumber do not look at them, and their graphs do not
                take them.
            kept_counts: [B] int64, real tokens in each row of the two above; None where all K are.
            visual_counts: [B] int64, N of each image, where images differ and positions count.
            image_grid: [B, 2] int64, rows and columns of each image's tokens, where positions follow the grid (M-RoPE).

        Returns:
            inputs_embeds [B, S, H], position_ids [B, S] (M-RoPE [3, B, S]) int64, next_position [B] int64, next_slot [B] int64,
            and, where it was asked for, image_slots [B, I, 2] int64.
        """
        longest = visual_embeds.shape[1]
        kept = longest if kept_counts is None else kept_counts[:, None]
        extent = self._extent(kept, visual_counts, image_grid)
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

        inputs_embeds = self._embeds(input_ids, text_index_BS, visual_embeds, visual_index_BS, is_visual_BS)
        image_ids = self._image_ids(visual_index_BS, kept_indices, visual_index_BS)
        if self.mrope:
            image_ids = self._three_rows(image_ids, None if image_grid is None else image_grid[:, 1:])
        text_position_BS = torch.where(is_after_BS, slots_S[None] + (extent - kept), slots_S[None])
        position_ids = torch.where(is_visual_BS, before_B1 + image_ids, text_position_BS)

        next_position = (tokens_B1 - 1 + extent)[:, 0]
        next_slot = (tokens_B1 - 1 + kept)[:, 0]
        spliced = (inputs_embeds, position_ids, next_position, next_slot)
        if not self.gives_image_slots:
            return spliced
        return (*spliced, torch.stack([before_B1, before_B1 + kept], dim=-1))

    def _embeds(
        self,
        input_ids: Tensor,
        text_index_BS: Tensor,
        visual_embeds: Tensor,
        visual_index_BS: Tensor,
        is_visual_BS: Tensor,
    ) -> Tensor:
        """[B, S, H]: what every slot shows, the text token of one index or the visual token of the other."""
        # The placeholder's own id need not be in the table; what stands in its place comes from the image.
        text_ids_BS = input_ids.gather(1, text_index_BS).clamp(0, self.embed_tokens.num_embeddings - 1)
        text_BSH = with_empty_levels(self.embed_tokens(text_ids_BS), self.deepstack_levels)
        index_BSH = visual_index_BS[:, :, None].expand(-1, -1, visual_embeds.shape[2])
        visual_BSH = visual_embeds.gather(1, index_BSH)
        return torch.where(is_visual_BS[:, :, None], visual_BSH, text_BSH)

    def _image_ids(
        self, within_image_BS: Tensor, kept_indices: Tensor | None, visual_index_BS: Tensor
    ) -> Tensor:
        """[B, S]: raster indices within the image, or numbers counted anew."""
        if self.policy is not PositionPolicy.GAP:
            return within_image_BS
        if kept_indices is None:
            raise ValueError("gap needs the kept indices")
        return kept_indices.gather(1, visual_index_BS)

    def _extent(
        self, kept: Tensor | int, visual_counts: Tensor | None, image_grid: Tensor | None
    ) -> Tensor | int:
        """By how much an image moves the positions of what comes after it: a number, or [B, 1] int64."""
        if self.policy is not PositionPolicy.GAP:
            return kept
        if image_grid is not None:
            return image_grid.amax(dim=1, keepdim=True)
        if visual_counts is not None:
            return visual_counts[:, None]
        assert self.visual_tokens is not None
        return self.visual_tokens

    def _three_rows(self, image_ids_BS: Tensor, columns: Tensor | None) -> Tensor:
        """[3, B, S]: time stands still, height and width follow grids of so many columns ([B, 1] or [B, S]); ids that were
        renumbered are the same in all rows."""
        if self.policy is not PositionPolicy.GAP:
            return torch.stack([image_ids_BS] * 3)
        assert columns is not None
        return grid_ids(image_ids_BS, columns)


class SpliceSeveral(Splice):
    """Splice of prompts with the same number of images, I, in every row."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_counts: Tensor,
        kept_indices: Tensor | None = None,
        visual_counts: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Splice.

        Args:
            input_ids: [B, T] int64, short rows filled with -1 at the end.
            visual_embeds: [B, K, H], one image's tokens after the other's, short rows padded at the end.
            kept_counts: [B, I] int64, tokens kept of each image, at least one.
            kept_indices: [B, K] int64 raster indices, each within its own image; for the policy that keeps ids.
            visual_counts: [B, I] int64, tokens of each image before pruning, where positions count; for the same.
            image_grid: [B, I, 2] int64, rows and columns of those, where positions follow the grid (M-RoPE); for the same.

        Returns:
            inputs_embeds [B, S, H], position_ids [B, S] (M-RoPE [3, B, S]) int64, next_position [B] int64, next_slot [B] int64,
            and, where it was asked for, image_slots [B, I, 2] int64.
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

        inputs_embeds = self._embeds(input_ids, token_BS, visual_embeds, visual_index_BS, is_visual_BS)
        image_ids = self._image_ids(within_BS, kept_indices, visual_index_BS)
        if self.mrope:
            image_ids = self._three_rows(
                image_ids, None if image_grid is None else image_grid[:, :, 1].gather(1, image_BS)
            )
        first_BS = first_position_BT.gather(1, token_BS)
        position_ids = torch.where(is_visual_BS, first_BS + image_ids, first_BS)
        spliced = (inputs_embeds, position_ids, extents_BT.sum(1), slots_BT.sum(1))
        if not self.gives_image_slots:
            return spliced
        # The slot of the i-th placeholder: of the tokens that are one, those of image i are one in every row.
        placeholder_BIT = is_image_BT[:, None] * (image_BT[:, None] == torch.arange(images)[None, :, None])
        first_slot_BI = (placeholder_BIT * first_slot_BT[:, None]).sum(-1)
        return (*spliced, torch.stack([first_slot_BI, first_slot_BI + kept_counts], dim=-1))

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


class StagedSplice(Splice):
    """Splice for a decoder that drops tokens between its layers: besides its counters those of the later stages.

    Args:
        embedding: as of `Splice`.
        dropped: of every later stage, how many visual tokens of a row it does not have; None where every call is told (`stage_counts`).
        options: of `Splice`, `image_slots` among the outputs.
    """

    def __init__(self, embedding: nn.Embedding, *, dropped: tuple[int, ...] | None, **options: Any) -> None:
        super().__init__(embedding, **options)
        self._dropped = dropped

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_indices: Tensor | None = None,
        kept_counts: Tensor | None = None,
        visual_counts: Tensor | None = None,
        image_grid: Tensor | None = None,
        stage_counts: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What `Splice.forward` gives; then next_slot [B] int64 of every later stage.

        Args:
            input_ids: as of `Splice`, like all others but the last.
            visual_embeds: as of `Splice`.
            kept_indices: as of `Splice`.
            kept_counts: as of `Splice`.
            visual_counts: as of `Splice`.
            image_grid: as of `Splice`.
            stage_counts: [B, I, J] int64, visual tokens of every image in every later stage.
        """
        spliced = super().forward(
            input_ids, visual_embeds, kept_indices, kept_counts, visual_counts, image_grid
        )
        return _with_later_stages(spliced, self._dropped, stage_counts)


class StagedSpliceSeveral(SpliceSeveral):
    """Splice of several images for such a decoder; calls are told what later stages have (`stage_counts`)."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        kept_counts: Tensor,
        stage_counts: Tensor,
        kept_indices: Tensor | None = None,
        visual_counts: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What `SpliceSeveral.forward` gives; then next_slot [B] int64 of every later stage.

        Args:
            input_ids: as of `SpliceSeveral`, like all others but stage_counts.
            visual_embeds: as of `SpliceSeveral`.
            kept_counts: as of `SpliceSeveral`.
            stage_counts: [B, I, J] int64, visual tokens of every image in every later stage.
            kept_indices: as of `SpliceSeveral`.
            visual_counts: as of `SpliceSeveral`.
            image_grid: as of `SpliceSeveral`.
        """
        spliced = super().forward(
            input_ids, visual_embeds, kept_counts, kept_indices, visual_counts, image_grid
        )
        return _with_later_stages(spliced, None, stage_counts)


def _with_later_stages(
    spliced: tuple[Tensor, ...], dropped: tuple[int, ...] | None, stage_counts: Tensor | None
) -> tuple[Tensor, ...]:
    """Counters of the later stages behind those of the first: a slot less for every token that is gone."""
    _embeds, _position_ids, _next_position, next_slot, image_slots = spliced
    if dropped is not None:
        return (*spliced, *(next_slot - gone for gone in dropped))
    assert stage_counts is not None
    entered_BI = image_slots[:, :, 1] - image_slots[:, :, 0]
    gone_BJ = (entered_BI[:, :, None] - stage_counts).sum(dim=1)
    return (*spliced, *(next_slot - gone_B for gone_B in gone_BJ.unbind(-1)))
