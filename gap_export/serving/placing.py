"""What position ids a prompt must have had: computed from what was kept of its images, by `positions.py` alone. No graph is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gap_export.bundle.manifest import Pruning
from gap_export.inputs.batch import ImageBatch
from gap_export.positions import Ids, prompt_position_ids
from gap_export.serving.work import Trace


@dataclass(frozen=True)
class Placed:
    """Where a prompt stands.

    Attributes:
        position_ids: [R, S] int64; R rows of ids.
        first_text_position: id of the first text token after the last image; None without an image or text after it.
        next_position: id of the first generated token.
        next_slot: slot of the first generated token.
    """

    position_ids: Ids
    first_text_position: int | None
    next_position: int
    next_slot: int


def placed(
    pruning: Pruning, batches: Sequence[ImageBatch], kept_indices: Sequence[Ids], text_lengths: Sequence[int]
) -> Placed:
    """Where a prompt must stand.

    Args:
        pruning: of the bundle.
        batches: of its images, in their order.
        kept_indices: of every image, [K] int64 in the order in which its tokens enter the decoder.
        text_lengths: text tokens before, between and after the images.

    Raises:
        ValueError: what was kept is none of these images.
    """
    visual_tokens = [int(count) for batch in batches for count in batch.visual_tokens]
    if not len(visual_tokens) == len(kept_indices) == len(text_lengths) - 1:
        raise ValueError("there is a kept set for every image, and text around each")
    grids = [np.asarray(grid) for batch in batches if batch.grids is not None for grid in batch.grids]
    ids, following = prompt_position_ids(
        list(kept_indices),
        text=list(text_lengths),
        visual_tokens=visual_tokens,
        policy=pruning.positions,
        merged=pruning.merged,
        grids=grids or None,
    )
    ids_RS = ids.reshape(-1, ids.shape[-1])
    after = text_lengths[-1] if visual_tokens else 0
    return Placed(
        position_ids=ids_RS,
        first_text_position=int(ids_RS[0, -after]) if after else None,
        next_position=following,
        next_slot=ids_RS.shape[1],
    )


def placement_fault(pruning: Pruning, batches: Sequence[ImageBatch], trace: Trace) -> str | None:
    """What of an answer does not stand where it must, in words; None where all does.

    Args:
        pruning: of the bundle.
        batches: of its images.
        trace: of the answer.
    """
    try:
        must = placed(pruning, batches, trace.kept_indices, trace.text_lengths)
    except ValueError as error:
        return str(error)
    if not np.array_equal(trace.position_ids, must.position_ids):
        return "position ids are other ones than follow from the tokens that were kept"
    for name in ("first_text_position", "next_position", "next_slot"):
        if getattr(trace, name) != getattr(must, name):
            return f"{name} is {getattr(trace, name)}, and {getattr(must, name)} follows from the tokens that were kept"
    return None
