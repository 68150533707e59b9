"""The one decode loop, for every runtime: greedy, with both counters carried by the placement.

Shape letters: B batch, T text tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import InputError
from gap_export.positions import Ids, Placement, advance
from gap_export.runtime.session import Session

Adjust = Callable[[Placement], Placement]


@dataclass(frozen=True)
class Generation:
    """What came out, and how it was placed.

    Attributes:
        tokens: per row, the ids generated, end token excluded.
        first_logits: [B, V] float32, of the first generated token.
        kept_indices: [B, K] int64.
        placement: of the prompt, after any adjustment.
    """

    tokens: list[list[int]]
    first_logits: NDArray[np.float32]
    kept_indices: Ids
    placement: Placement


def generate(
    session: Session,
    pixel_values_BCHW: NDArray[np.float32],
    input_ids_BT: Ids,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    adjust: Adjust | None = None,
) -> Generation:
    """Answer a batch of prompts greedily.

    Args:
        session: a loaded bundle or checkpoint.
        pixel_values_BCHW: one picture per row.
        input_ids_BT: one prompt per row, right-padded with `PAD`.
        max_new_tokens: longest answer.
        eos_token_ids: end an answer.
        adjust: changes the placement before it is used; negative controls are made with it.

    Raises:
        InputError: prompt and answer do not fit into the cache.
    """
    visual = session.encode(pixel_values_BCHW)
    spliced = session.splice(input_ids_BT, visual)
    placement = adjust(spliced.placement) if adjust else spliced.placement
    # The last token generated is never fed back, so it needs no slot.
    needed = int(placement.next_slot.max()) + max_new_tokens - 1
    if needed > session.capacity:
        raise InputError(
            f"prompt and answer need {needed} cache slots, the bundle has {session.capacity}",
            subject="prompt",
            hint="shorten the expression, ask for fewer new tokens, or build with a larger --capacity",
        )
    first_logits = session.prefill(spliced.embeds, placement).copy()
    rows = len(first_logits)
    ended = np.zeros(rows, bool)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    logits = first_logits
    turn = placement
    for count in range(max_new_tokens):
        if count:
            turn = advance(turn)
            logits = session.step(chosen, turn)  # noqa: F821  (bound by the first pass)
        chosen = logits.argmax(axis=-1).astype(np.int64)
        ended |= np.isin(chosen, eos_token_ids)
        for row in np.flatnonzero(~ended):
            tokens[row].append(int(chosen[row]))
        if ended.all():
            break
    return Generation(
        tokens=tokens, first_logits=first_logits, kept_indices=visual.kept_indices, placement=placement
    )
