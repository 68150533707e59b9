"""Weights that checkpoints keep in pieces: deltas over another model, low-rank updates, tensors that the graph wants joined.

Each is a rule over rows, so that a table of hundreds of megabytes is merged some rows at a time.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import Derived, WeightLocation
from gap_export.errors import CheckpointError


def plus_base(checkpoint: Checkpoint, delta_key: str, base_key: str) -> Derived:
    """A delta added to the weight it was taken from; where it has more rows, those are its own (new tokens).

    Source: how Vicuna, LLaVA v0 and Shikra publish what they may not publish whole.

    Raises:
        CheckpointError: the base has no such weight, or one of another shape.
    """
    delta, base = checkpoint.stored(delta_key), checkpoint.stored(base_key)
    fits = delta.shape[1:] == base.shape[1:] and len(base.shape) > 0 and delta.shape[:1] >= base.shape[:1]
    if not fits:
        raise CheckpointError(
            f"is not what the delta was taken from: {base_key.rpartition('/')[2]} is {_extents(base)} where the delta is "
            f"{_extents(delta)}",
            subject=str(base.file.parent),
            hint="give the base model that the delta's authors name",
        )
    common = base.shape[0]

    def rule(stored: Sequence[NDArray[Any]], rows: slice) -> NDArray[np.float32]:
        delta_rows, base_all = stored
        merged: NDArray[np.float32] = delta_rows[rows].astype(np.float32)
        shared = slice(rows.start, min(rows.stop, common))
        if shared.start < shared.stop:
            merged[: shared.stop - shared.start] += base_all[shared].astype(np.float32)
        return merged

    return Derived(delta.shape, (delta, base), rule)


def with_low_rank(
    checkpoint: Checkpoint, weight_key: str, a_key: str, b_key: str, *, rank: int, scale: float
) -> Derived:
    """A weight with its low-rank update merged in: W + scale * B A.

    Source: LoRA (arXiv 2106.09685), section 4.1; scale = alpha / rank.

    Args:
        checkpoint: with its companions.
        weight_key: W [O, I].
        a_key: A [R, I].
        b_key: B [O, R].
        rank: R that the scale was made for.
        scale: of the update.

    Raises:
        CheckpointError: one of them is missing, or shapes or rank do not fit.
    """
    weight, a, b = (checkpoint.stored(key) for key in (weight_key, a_key, b_key))
    outputs, inputs = weight.shape if len(weight.shape) == 2 else (0, 0)
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise CheckpointError(
            f"does not fit: {a_key} is {_extents(a)} and {b_key} is {_extents(b)}, where rank {rank} on {_extents(weight)} "
            f"needs {rank} x {inputs} and {outputs} x {rank}",
            subject=str(a.file),
            hint="the update belongs to another base model, or has another rank",
        )

    def rule(stored: Sequence[NDArray[Any]], rows: slice) -> NDArray[np.float32]:
        weight_OI, a_RI, b_OR = stored
        update = b_OR[rows].astype(np.float32) @ a_RI.astype(np.float32)
        merged: NDArray[np.float32] = weight_OI[rows].astype(np.float32) + np.float32(scale) * update
        return merged

    return Derived(weight.shape, (weight, a, b), rule)


def _extents(location: WeightLocation) -> str:
    return " x ".join(map(str, location.shape))
