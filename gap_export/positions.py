"""The heart: which position id and which cache slot every token of a pruned prompt gets.

A position id is what RoPE reads; a slot is where a token's key and value lie in the cache. They are two different
integers for every token after the first pruned one. GAP (arXiv 2506.21873, section 3) keeps for every survivor the
position id it had before pruning; slots are always contiguous.

    token                       position id under GAP    slot
    text before the image, j    j                        j
    kept visual token k         T_pre + i_k              T_pre + k
    text after the image, j     T_pre + N + j            T_pre + K + j
    generated token t           T_pre + N + T_post + t   T_pre + K + T_post + t

with N visual tokens, K kept, raster indices i_1 .. i_K. Where tokens are dropped inside the decoder, every stage of it has its
own K and so its own slots (`Placement.stage_next_slot`); ids are the same in all of them. `shifted` and `permuted` are the paper's two failure modes
(section 3.1, figure 2), kept so that anyone can see the damage on their own model.

Who sees whom is a matter of slots alone: `visible` says it for every mask that models have.

This is NumPy, for runtimes, checks and tests. The same arithmetic inside the exported graph is `modeling/splice.py`,
written independently so that each can be held against the other.

Shape letters: B batch, N visual tokens, K kept, S spliced sequence, R rotary rows (3 for M-RoPE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

AttentionMask = Literal["causal", "image_blocks"]
"""Which tokens see which: each sees itself and those before it; or, besides, all tokens of one image see each other."""

PAD = -1
"""Fills up short rows, of token ids and of raster indices: no token and no patch has it, so a graph can count the real ones."""


class PositionPolicy(StrEnum):
    """How the tokens of a pruned prompt are numbered."""

    GAP = "gap"
    """Ascending raster order, every token keeps the id it had before pruning."""
    SHIFTED = "shifted"
    """Ascending raster order, ids renumbered 0.. without gaps."""
    PERMUTED = "permuted"
    """Score order as the pruner emitted it, ids renumbered 0.. without gaps."""

    @property
    def keeps_raster_order(self) -> bool:
        """Whether kept indices are sorted ascending before they enter the decoder."""
        return self is not PositionPolicy.PERMUTED


class MergedId(StrEnum):
    """Which raster index a token stands for that was merged from many and has none of its own.

    The paper leaves this open. A token merged *into* a patch keeps that patch's index, whatever is chosen here.
    """

    LAST_VISUAL = "last_visual"
    """The last patch of the image, N - 1: merged tokens come after all others, as where pruners append them."""
    MAX_KEPT = "max_kept"
    """The last patch that was kept."""
    CENTROID = "centroid"
    """The patch nearest to the weighted centre, in rows and columns, of the patches it was merged from; of several grids (tiles), on the one that
    most of the weight lies on."""


@dataclass(frozen=True)
class Placement:
    """Where a batch of prompts stands: ids and slots of the prompt, and the two counters decoding continues from.

    Attributes:
        position_ids: [B, S] int64 (M-RoPE: [3, B, S]), what RoPE reads. Padding at the end of a short row holds values never attended to.
        write_index: [B] int64, the slot of the first token of this call.
        last_index: [B] int64, the index within S of each row's last real token.
        next_position: [B] int64, the position id of the first generated token.
        next_slot: [B] int64, the cache slot of the first generated token.
        image_slots: [B, I, 2] int64, the first slot of every image and the one after its last; None where the splice does not tell.
        stage_counts: [B, I, J] int64, visual tokens of every image in every later stage, of a prompt where they are told.
        stage_write_index: of every later stage (1, 2, ...) of a decoder that drops tokens, `write_index` [B] there.
        stage_next_slot: of every later stage, `next_slot` [B] there.
    """

    position_ids: Ids
    write_index: Ids
    last_index: Ids
    next_position: Ids
    next_slot: Ids
    image_slots: Ids | None = None
    stage_counts: Ids | None = None
    stage_write_index: tuple[Ids, ...] = ()
    stage_next_slot: tuple[Ids, ...] = ()

    @property
    def slots_of_stages(self) -> tuple[Ids, ...]:
        """`next_slot` of every stage, the first included."""
        return (self.next_slot, *self.stage_next_slot)

    @property
    def stage_dropped(self) -> Ids:
        """[B, I, J]: tokens of every image that every later stage does not see, where counts are told."""
        assert self.image_slots is not None
        assert self.stage_counts is not None
        entered_BI = self.image_slots[:, :, 1] - self.image_slots[:, :, 0]
        dropped_BIJ: Ids = entered_BI[:, :, None] - self.stage_counts
        return dropped_BIJ

    @property
    def stage_lengths(self) -> Ids:
        """[B, J]: tokens of every prompt in every later stage, where counts are told."""
        lengths_BJ: Ids = self.last_index[:, None] + 1 - self.stage_dropped.sum(axis=1)
        return lengths_BJ

    def decoder_inputs(self) -> dict[str, Ids]:
        """The numbers that decoder graphs take, by the names of their inputs. A graph takes those that it names."""
        inputs = {
            "position_ids": self.position_ids,
            "write_index": self.write_index,
            "last_index": self.last_index,
        }
        if self.image_slots is not None:
            inputs["image_slots"] = self.image_slots
        if self.stage_counts is not None:
            inputs["stage_counts"] = self.stage_counts
            longest_J = self.stage_lengths.max(axis=0)
            inputs |= {f"stage_slots.{stage}": np.array(most) for stage, most in enumerate(longest_J, 1)}
        return inputs | {f"write_index.{stage}": slot for stage, slot in enumerate(self.stage_write_index, 1)}


def placement_from_splice(outputs: Mapping[str, Ids], stage_counts: Ids | None = None) -> Placement:
    """The placement that a splice graph gives.

    Args:
        outputs: of the graph, by name.
        stage_counts: what it was told.
    """
    next_slot = outputs["next_slot"]
    later = sorted(
        (name for name in outputs if name.startswith("next_slot.")), key=lambda n: int(n.split(".")[1])
    )
    return Placement(
        position_ids=outputs["position_ids"],
        write_index=np.zeros_like(next_slot),
        last_index=next_slot - 1,
        next_position=outputs["next_position"],
        next_slot=next_slot,
        image_slots=outputs.get("image_slots"),
        stage_counts=stage_counts,
        stage_write_index=tuple(np.zeros_like(next_slot) for _ in later),
        stage_next_slot=tuple(outputs[name] for name in later),
    )


def kept_position_ids(kept_K: Ids, text_before: int, policy: PositionPolicy) -> Ids:
    """Position ids of the kept visual tokens of one image.

    Args:
        kept_K: [K] int64 raster indices, in the order in which the tokens enter the decoder.
        text_before: tokens before the image (T_pre).
        policy: how to number them.

    Returns:
        [K] int64.
    """
    if policy is PositionPolicy.GAP:
        return text_before + kept_K.astype(np.int64)
    return text_before + np.arange(len(kept_K), dtype=np.int64)


def prompt_position_ids(
    kept: Sequence[Ids],
    *,
    text: Sequence[int],
    visual_tokens: Sequence[int],
    policy: PositionPolicy,
    merged: int = 0,
    grids: Sequence[Ids] | None = None,
) -> tuple[Ids, int]:
    """Position ids of one spliced prompt: text and images in turn, text first and last.

    Source of the three rows: Qwen2-VL (arXiv 2409.12191), section 2.1: time, height, width; what follows an image continues
    after the largest of them.

    Args:
        kept: of every image, [K] raster indices in 0..N-1, in the order in which the tokens enter the decoder.
        text: how many tokens before, between and after the images.
        visual_tokens: N of every image.
        policy: how to number.
        merged: how many of the K were merged from many patches and stand for an index (`MergedId`) that a kept patch may
            have too. All others must be distinct.
        grids: rows and columns of every image's N tokens, for M-RoPE.

    Returns:
        ([S] int64, with grids [3, S]; the id that the first generated token gets).

    Raises:
        ValueError: kept indices out of range or repeated.
    """
    rows = 1 if grids is None else 3
    position = text[0]
    pieces = [np.arange(position, dtype=np.int64)[None].repeat(rows, axis=0)]
    for number, (kept_K, visual, following) in enumerate(zip(kept, visual_tokens, text[1:], strict=True)):
        if len(np.unique(kept_K)) < len(kept_K) - merged or (
            len(kept_K) and not 0 <= kept_K.min() <= kept_K.max() < visual
        ):
            raise ValueError(f"kept indices must be distinct and within 0..{visual - 1}")
        image_ids, extent = kept_position_ids(kept_K, position, policy)[None], len(kept_K)
        if policy is PositionPolicy.GAP:
            extent = int(visual)
        if policy is PositionPolicy.GAP and grids is not None:
            columns, extent = int(grids[number][1]), int(max(grids[number]))
            image_ids = position + np.stack([np.zeros_like(kept_K), kept_K // columns, kept_K % columns])
        position += extent
        text_ids = position + np.arange(following, dtype=np.int64)
        pieces += [np.broadcast_to(piece, (rows, piece.shape[-1])) for piece in (image_ids, text_ids[None])]
        position += following
    ids_RS = np.concatenate(pieces, axis=1)
    return (ids_RS[0] if grids is None else ids_RS), position


def place(
    kept_BK: Ids,
    *,
    text_before: Ids,
    text_after: Ids,
    visual_tokens: int | Ids,
    policy: PositionPolicy,
    merged: int = 0,
    stage_counts: Ids | None = None,
    grids: Ids | None = None,
    between: Ids | None = None,
    kept_counts: Ids | None = None,
) -> Placement:
    """Placement of a batch of right-padded prompts with I images each.

    Args:
        kept_BK: [B, K] raster indices in the order in which the tokens enter the decoder, each within its own image; -1 after
            the tokens of a row that keeps fewer than others.
        text_before: [B] tokens before the first image (T_pre).
        text_after: [B] tokens after the last one (T_post).
        visual_tokens: N, of all images or [B], [B, I] of each.
        policy: how to number.
        merged: where tokens merged from many stand, as for `prompt_position_ids`.
        stage_counts: [B, I, J] visual tokens of every image in every later stage.
        grids: [B, 2], [B, I, 2] rows and columns of each image's visual tokens, for M-RoPE.
        between: [B, I - 1] tokens between one image and the next; None where there is one.
        kept_counts: [B, I] how many of K each image keeps; None where there is one.

    Returns:
        Placement with S = max over rows of T_pre + K + T_post; ids of padding go on counting.
    """
    batch = len(kept_BK)
    kept_rows = [row[row >= 0] for row in kept_BK]
    kept = np.array([len(row) for row in kept_rows], np.int64)
    counts_BI = kept[:, None] if kept_counts is None else kept_counts.reshape(batch, -1)
    between_BG = np.zeros((batch, 0), np.int64) if between is None else between
    visual_BI = np.broadcast_to(
        np.asarray(visual_tokens, np.int64).reshape(-1, counts_BI.shape[1]), counts_BI.shape
    )
    grids_BI2 = None if grids is None else grids.reshape(batch, -1, 2)

    lengths = text_before + between_BG.sum(axis=1) + kept + text_after
    texts_BI = np.concatenate([text_before[:, None], between_BG], axis=1)
    image_ends_BI = (texts_BI + counts_BI).cumsum(axis=1)
    padding = lengths.max() - lengths
    rows = [
        prompt_position_ids(
            np.split(kept_rows[row], counts_BI[row].cumsum()[:-1]),
            text=[int(text_before[row]), *map(int, between_BG[row]), int(text_after[row] + padding[row])],
            visual_tokens=visual_BI[row].tolist(),
            policy=policy,
            merged=merged,
            grids=None if grids_BI2 is None else list(grids_BI2[row]),
        )
        for row in range(batch)
    ]
    later = [] if stage_counts is None else list(np.moveaxis(stage_counts, -1, 0))
    return Placement(
        position_ids=np.stack([ids for ids, _ in rows], axis=-2),
        write_index=np.zeros(batch, np.int64),
        last_index=lengths - 1,
        next_position=np.array([following for _, following in rows], np.int64) - padding,
        next_slot=lengths,
        image_slots=np.stack([image_ends_BI - counts_BI, image_ends_BI], axis=-1),
        stage_counts=stage_counts,
        stage_write_index=tuple(np.zeros(batch, np.int64) for _ in later),
        stage_next_slot=tuple(lengths - kept + left_BI.sum(axis=1) for left_BI in later),
    )


def advance(placement: Placement) -> Placement:
    """Placement of the next single-token decode call: all counters move by one, each on its own.

    Returns:
        Placement with `position_ids` [B, 1] (M-RoPE: [3, B, 1], equal rows), the id of the token about to be fed, and `write_index` its slot.
    """
    rows = placement.position_ids.shape[:-2]
    return Placement(
        position_ids=np.array(
            np.broadcast_to(placement.next_position[:, None], (*rows, len(placement.next_position), 1))
        ),
        write_index=placement.next_slot,
        last_index=np.zeros_like(placement.last_index),
        next_position=placement.next_position + 1,
        next_slot=placement.next_slot + 1,
        image_slots=placement.image_slots,
        stage_write_index=placement.stage_next_slot,
        stage_next_slot=tuple(slot + 1 for slot in placement.stage_next_slot),
    )


def extended(placement: Placement, text_lengths: Ids, longest: int) -> Placement:
    """Placement of text after a prompt of one row: every row continues from there.

    Args:
        placement: of the prompt, B = 1.
        text_lengths: [B] tokens of each row.
        longest: T, to which short rows are padded.
    """
    first, slot = int(placement.next_position[0]), int(placement.next_slot[0])
    batch = len(text_lengths)
    ids_T = first + np.arange(longest, dtype=np.int64)
    rows = placement.position_ids.shape[:-2]
    return Placement(
        position_ids=np.array(np.broadcast_to(ids_T, (*rows, batch, longest))),
        write_index=np.full(batch, slot, np.int64),
        last_index=text_lengths - 1,
        next_position=first + text_lengths,
        next_slot=slot + text_lengths,
        image_slots=None if placement.image_slots is None else placement.image_slots.repeat(batch, axis=0),
    )


def visible(
    mask: AttentionMask, query_slots_BS: Ids, slots: int, image_slots_BI2: Ids | None = None
) -> NDArray[np.bool_]:
    """Which slots of the cache every token of a call sees.

    Args:
        mask: of the model.
        query_slots_BS: [B, S] int64, where the tokens stand.
        slots: C, of the cache.
        image_slots_BI2: [B, I, 2] int64, first slot and the one after the last of every image (`Placement.image_slots`); for masks that look at images.

    Returns:
        [B, S, C] bool.
    """
    keys_C = np.arange(slots)
    sees_BSC: NDArray[np.bool_] = keys_C <= query_slots_BS[:, :, None]
    if mask == "causal":
        return sees_BSC
    if image_slots_BI2 is None:
        raise ValueError(f"the mask {mask} needs to know where the images are")
    for first_B, end_B in np.moveaxis(image_slots_BI2, 0, -1):
        query_BS, key_BC = (
            (slot >= first_B[:, None]) & (slot < end_B[:, None]) for slot in (query_slots_BS, keys_C[None])
        )
        sees_BSC |= query_BS[:, :, None] & key_BC[:, None, :]
    return sees_BSC
