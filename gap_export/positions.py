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

This is NumPy, for runtimes, checks and tests. The same arithmetic inside the exported graph is `families/splice.py`,
written independently so that each can be held against the other.

Shape letters: B batch, N visual tokens, K kept, S spliced sequence, R rotary rows (3 for M-RoPE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


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
    """The last patch of the picture, N - 1: merged tokens come after all others, as where strategies append them."""
    MAX_KEPT = "max_kept"
    """The last patch that was kept."""
    CENTROID = "centroid"
    """The patch nearest to the weighted centre, in rows and columns, of the patches it was merged from."""


@dataclass(frozen=True)
class Placement:
    """Where a batch of prompts stands: ids and slots of the prompt, and the two counters decoding goes on from.

    Attributes:
        position_ids: [B, S] int64 (M-RoPE: [3, B, S]), what RoPE reads. Padding at the end of a short row holds values never attended to.
        write_index: [B] int64, the slot of the first token of this call.
        last_index: [B] int64, the index within S of each row's last real token.
        next_position: [B] int64, the position id of the first generated token.
        next_slot: [B] int64, the cache slot of the first generated token.
        image_start: [B] int64, text tokens before the image; None where the splice does not tell.
        stage_write_index: of every later stage (1, 2, ...) of a decoder that drops tokens, `write_index` [B] there.
        stage_next_slot: of every later stage, `next_slot` [B] there.
    """

    position_ids: Ids
    write_index: Ids
    last_index: Ids
    next_position: Ids
    next_slot: Ids
    image_start: Ids | None = None
    stage_write_index: tuple[Ids, ...] = ()
    stage_next_slot: tuple[Ids, ...] = ()

    @property
    def slots_of_stages(self) -> tuple[Ids, ...]:
        """`next_slot` of every stage, the first included."""
        return (self.next_slot, *self.stage_next_slot)

    def decoder_inputs(self) -> dict[str, Ids]:
        """The numbers that decoder graphs take, by the names of their inputs. A graph takes those that it names."""
        inputs = {
            "position_ids": self.position_ids,
            "write_index": self.write_index,
            "last_index": self.last_index,
        }
        if self.image_start is not None:
            inputs["image_start"] = self.image_start
        return inputs | {f"write_index.{stage}": slot for stage, slot in enumerate(self.stage_write_index, 1)}


def placement_from_splice(outputs: Mapping[str, Ids]) -> Placement:
    """The placement that a splice graph gives, by the names of its outputs."""
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
        image_start=outputs.get("image_start"),
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


def sequence_position_ids(
    kept_K: Ids,
    *,
    text_before: int,
    text_after: int,
    visual_tokens: int,
    policy: PositionPolicy,
    merged: int = 0,
) -> Ids:
    """Position ids of one spliced prompt: text before, kept visual tokens, text after.

    Args:
        kept_K: [K] raster indices in 0..N-1, in the order in which the tokens enter the decoder.
        text_before: T_pre.
        text_after: T_post.
        visual_tokens: N, the number before pruning.
        policy: how to number them.
        merged: how many of the K were merged from many patches and stand for an index (`MergedId`) that a kept patch may
            have too. All others must be distinct.

    Returns:
        [T_pre + K + T_post] int64.

    Raises:
        ValueError: kept indices out of range or repeated.
    """
    if len(np.unique(kept_K)) < len(kept_K) - merged or (
        len(kept_K) and not 0 <= kept_K.min() <= kept_K.max() < visual_tokens
    ):
        raise ValueError(f"kept indices must be distinct and within 0..{visual_tokens - 1}")
    image_extent = visual_tokens if policy is PositionPolicy.GAP else len(kept_K)
    return np.concatenate(
        [
            np.arange(text_before, dtype=np.int64),
            kept_position_ids(kept_K, text_before, policy),
            text_before + image_extent + np.arange(text_after, dtype=np.int64),
        ]
    )


def place(
    kept_BK: Ids,
    *,
    text_before: Ids,
    text_after: Ids,
    visual_tokens: int | Ids,
    policy: PositionPolicy,
    merged: int = 0,
    stages: tuple[int, ...] = (),
    grids: Ids | None = None,
) -> Placement:
    """Placement of a batch of right-padded prompts with one image each.

    Args:
        kept_BK: [B, K] raster indices in the order in which the tokens enter the decoder; -1 after the tokens of a picture
            that keeps fewer than others.
        text_before: [B] T_pre of each row.
        text_after: [B] T_post of each row.
        visual_tokens: N, of all pictures or [B] of each.
        policy: how to number.
        merged: see `sequence_position_ids`.
        stages: visual tokens that every later stage has.
        grids: [B, 2] rows and columns of each picture's visual tokens, for M-RoPE.

    Returns:
        Placement with S = max over rows of T_pre + K + T_post; ids of padding go on counting.
    """
    kept_rows = [row[row >= 0] for row in kept_BK]
    kept = np.array([len(row) for row in kept_rows], np.int64)
    lengths = text_before + kept + text_after
    longest = int(lengths.max())
    visual_B = np.broadcast_to(np.asarray(visual_tokens, np.int64), kept.shape)
    rows = [
        sequence_position_ids(
            row,
            text_before=int(before),
            text_after=longest - len(row) - int(before),
            visual_tokens=int(visual),
            policy=policy,
            merged=merged,
        )
        for row, before, visual in zip(kept_rows, text_before, visual_B, strict=True)
    ]
    extent = visual_B if policy is PositionPolicy.GAP else kept
    position_ids = np.stack(rows)
    if grids is not None:
        position_ids = np.stack([position_ids] * 3)
    if grids is not None and policy is PositionPolicy.GAP:
        extent = grids.max(axis=1)
        for row, (before, after) in enumerate(zip(text_before, text_before + kept, strict=True)):
            position_ids[:, row] = mrope_ids(
                position_ids[0, row], int(before), int(after), int(visual_B[row]), grids[row]
            )
    return Placement(
        position_ids=position_ids,
        write_index=np.zeros(len(rows), np.int64),
        last_index=lengths - 1,
        next_position=text_before + extent + text_after,
        next_slot=lengths,
        image_start=text_before,
        stage_write_index=tuple(np.zeros(len(rows), np.int64) for _ in stages),
        stage_next_slot=tuple(text_before + left + text_after for left in stages),
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
        image_start=placement.image_start,
        stage_write_index=placement.stage_next_slot,
        stage_next_slot=tuple(slot + 1 for slot in placement.stage_next_slot),
    )


def mrope_ids(ids_S: Ids, first: int, end: int, visual_tokens: int, grid: Ids) -> Ids:
    """Three rows of ids from ids that count: what stands in the image follows its grid, what comes after moves up.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1: time, height, width; text goes on after the largest of them.

    Args:
        ids_S: [S] ids under GAP that count the image's tokens.
        first: index of the first visual token in S.
        end: index after the last.
        visual_tokens: N.
        grid: rows, columns of the N tokens.

    Returns:
        [3, S] int64.
    """
    rows, columns = (int(extent) for extent in grid)
    ids_3S = np.stack([ids_S] * 3)
    raster = ids_S[first:end] - first
    ids_3S[:, first:end] = first + np.stack([np.zeros_like(raster), raster // columns, raster % columns])
    ids_3S[:, end:] += max(rows, columns) - visual_tokens
    return ids_3S


def gather_mrope_ids(position_ids_RS: Ids, surviving_P: Ids) -> tuple[Ids, int]:
    """GAP for M-RoPE: keep the columns of the surviving tokens, go on from the unpruned maximum.

    Args:
        position_ids_RS: [R, S] ids of the unpruned prompt (R = 3: time, height, width).
        surviving_P: [P] ascending indices into S of all surviving tokens, text included.

    Returns:
        ([R, P] ids of the survivors, position id of the first generated token).
    """
    return position_ids_RS[:, surviving_P], int(position_ids_RS.max()) + 1


# Negative controls: placements that are wrong on purpose. A parity check that does not notice them proves nothing.


def renumbered(placement: Placement) -> Placement:
    """What exporters do: ids count the slots, decoding continues at the kept length."""
    ids = np.broadcast_to(
        np.arange(placement.position_ids.shape[-1], dtype=np.int64), placement.position_ids.shape
    )
    return replace(placement, position_ids=ids.copy(), next_position=placement.next_slot)


def with_image_ids_reversed(placement: Placement, text_before: Ids, kept: Ids) -> Placement:
    """The kept visual tokens' ids in reverse: right values, wrong order. `kept` [B] counts those of each row."""
    ids = placement.position_ids.copy()
    for row, (before, count) in enumerate(zip(text_before, kept, strict=True)):
        image = slice(int(before), int(before) + int(count))
        ids[..., row, image] = ids[..., row, image][..., ::-1]
    return replace(placement, position_ids=ids)


def with_two_ids_swapped(placement: Placement, text_before: Ids, kept: Ids) -> Placement:
    """The first and the last kept visual token exchange ids: the smallest wrong order. `kept` [B] as above."""
    ids = placement.position_ids.copy()
    for row, (before, count) in enumerate(zip(text_before, kept, strict=True)):
        first, last = int(before), int(before) + int(count) - 1
        ids[..., row, [first, last]] = ids[..., row, [last, first]]
    return replace(placement, position_ids=ids)


def with_write_index_off_by_one(placement: Placement) -> Placement:
    """Generated tokens land one slot too far, leaving a slot of stale cache inside the mask."""
    return replace(placement, next_slot=placement.next_slot + 1)


def with_last_stage_off_by_one(placement: Placement) -> Placement:
    """The same in the layers of the last stage alone."""
    if not placement.stage_next_slot:
        return placement
    *others, last = placement.stage_next_slot
    return replace(placement, stage_next_slot=(*others, last + 1))


def with_one_slot_counter(placement: Placement) -> Placement:
    """Every stage counts the slots of the last one: stages before it overwrite the end of the prompt."""
    last = placement.slots_of_stages[-1]
    return replace(placement, next_slot=last, stage_next_slot=(last,) * len(placement.stage_next_slot))


def continuing_at_kept_length(placement: Placement) -> Placement:
    """A right prefill, but decoding numbers its tokens by cache slot (of the last stage, where there are stages)."""
    return replace(placement, next_position=placement.slots_of_stages[-1])
