"""Many expressions about one image: what their prompts begin with, image included, goes through the model once.

A causal decoder computes the same for a token whatever follows it. So the keys and values of the common beginning are computed for
one row, given to all rows, and every row continues with text of its own.

Only where the visual tokens do not depend on the expression, every layer sees the same tokens, and the image comes before the
expression. `unshared_because` tells.

Shape letters: B rows, T text tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from gap_export.bundle.manifest import Manifest
from gap_export.inputs.batch import ImageBatch
from gap_export.inputs.prompt import SLOT
from gap_export.positions import PAD, Ids, Placement, extended
from gap_export.runtime.generate import Decoded, Timings, decode, encode
from gap_export.runtime.keep import KeepCounts
from gap_export.runtime.session import Session


@dataclass(frozen=True)
class SharedPrefix:
    """The beginning of prompts about one image, in the session's cache.

    Attributes:
        placement: of it.
        text_tokens: of its text, placeholders included.
        kept_indices: [K] int64 raster indices of the visual tokens that were kept of the last image.
        timings: of the image and the beginning.
    """

    placement: Placement
    text_tokens: int
    kept_indices: Ids
    timings: Timings


def unshared_because(manifest: Manifest, tokenizer: Tokenizer) -> str | None:
    """Why prompts of a bundle cannot share their beginning; None where they can.

    Args:
        manifest: of the bundle.
        tokenizer: of its prompt.
    """
    if manifest.pruning.stages:
        return f"{manifest.pruning.pruner} drops tokens inside the decoder, by the whole prompt"
    if manifest.text_tower is not None:
        return f"{manifest.pruning.pruner} chooses tokens by the expression"
    prompt = manifest.prompt
    before = tokenizer.encode(prompt.grounding.partition(SLOT)[0], add_special_tokens=False).ids
    if before.count(prompt.image_token_id) < prompt.images:
        return "the prompt has the expression before the image"
    return None


def common_length(input_ids_BT: Ids, image_token_id: int) -> int:
    """How many tokens prompts have in common from the first on; 0 where an image comes after the first difference.

    At least one token of every row is left over, so that each has something of its own to go on with.
    """
    rows = [row[row != PAD] for row in input_ids_BT]
    shortest = min(map(len, rows)) - 1
    same_T = (np.stack([row[:shortest] for row in rows]) == rows[0][:shortest]).all(axis=0)
    length = int(same_T.argmin()) if not same_T.all() else shortest
    after = any((row[length:] == image_token_id).any() for row in rows)
    return 0 if after else length


def prefill_shared(
    session: Session,
    batch: ImageBatch,
    prefix_ids_T: Ids,
    *,
    keep_counts: KeepCounts | None = None,
    reserve: int | None = None,
) -> SharedPrefix:
    """Encode the image and put the common beginning into the session's cache.

    Args:
        session: of a bundle whose prompts can share their beginning (`unshared_because`).
        batch: images of one prompt.
        prefix_ids_T: ids of the beginning, placeholders included.
        keep_counts: what the graphs are told.
        reserve: tokens that will follow at most, the rest of a prompt and its answer; see `Session.prefill`.
    """
    began = time.perf_counter()
    visual = encode(session, batch, keep_counts=keep_counts)
    encoded = time.perf_counter()
    spliced = session.splice(prefix_ids_T[None], visual)
    session.prefill(spliced.embeds, spliced.placement, reserve=reserve)
    kept = visual.kept_indices[0]
    kept = kept[kept >= 0]
    if visual.kept_counts is not None and visual.kept_counts.ndim == 2:
        kept = kept[-visual.kept_counts[0, -1] :]
    timings = Timings(vision=encoded - began, prefill=time.perf_counter() - encoded)
    return SharedPrefix(spliced.placement, len(prefix_ids_T), kept, timings)


def continue_answers(
    session: Session,
    prefix: SharedPrefix,
    rest_ids_BT: Ids,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
) -> Decoded:
    """Answer prompts that begin with what is in the cache.

    Args:
        session: after `prefill_shared`.
        prefix: what that gave.
        rest_ids_BT: the rest of every prompt, at least one token, short rows padded with `PAD`.
        max_new_tokens: longest answer.
        eos_token_ids: end an answer.

    Returns:
        The answers; their timings include those of the beginning.
    """
    began = time.perf_counter()
    session.fork(len(rest_ids_BT))
    lengths_B = (rest_ids_BT != PAD).sum(axis=1).astype(np.int64)
    placement = extended(prefix.placement, lengths_B, rest_ids_BT.shape[1])
    logits = session.extend(rest_ids_BT, placement)
    filled = time.perf_counter()
    decoded = decode(session, logits, placement, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
    spent = prefix.timings
    prefill = spent.prefill + filled - began
    return replace(decoded, timings=replace(spent, prefill=prefill, decode=time.perf_counter() - filled))
