"""The one decode loop, for every runtime: greedy, with both counters carried by the placement.

Shape letters: B batch, T text tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import InputError, SessionError
from gap_export.inputs.batch import ImageBatch
from gap_export.positions import Ids, Placement, advance
from gap_export.runtime.keep import KeepCounts
from gap_export.runtime.session import Encoder, Session, VisualTokens, together

Adjust = Callable[[Placement, VisualTokens], Placement]
"""Changes a placement before it is used, knowing which visual tokens it is about."""


@dataclass(frozen=True)
class Timings:
    """Seconds that a batch of answers took, phase by phase.

    Attributes:
        preprocess: images to pixels, expressions to token ids.
        vision: tower, pruner and projector.
        prefill: the prompts, with their visual tokens, up to the first token of the answers.
        decode: all further tokens.
    """

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """Of all phases."""
        return self.preprocess + self.vision + self.prefill + self.decode


@dataclass(frozen=True)
class Generation:
    """What came out, and how it was placed.

    Attributes:
        tokens: per row, the ids generated, end token excluded.
        logits: per generated token [B, V] float32; the first only, unless all were asked for.
        kept_indices: [B, K] int64 that entered the decoder; -1 after the tokens of an image that keeps fewer than others.
        placement: of the prompt, after any adjustment.
        scores: [B, N] float32 of the selection, where the session tells them.
        margins: [B] float64, by how little the selection was made, where the session tells it.
        finite: whether all logits were numbers; the argmax of others is no answer.
        ended: per row, whether the answer ended by itself and was not cut off at the longest length.
        stage_kept_indices: of every later stage [B, K] int64, where tokens are dropped inside the decoder.
        kept_counts: [B] ([B, I] of several images) int64, how many tokens each image keeps, where images differ.
        timings: of the batch.
    """

    tokens: list[list[int]]
    logits: list[NDArray[np.float32]]
    kept_indices: Ids
    placement: Placement
    scores: NDArray[np.float32] | None
    margins: NDArray[np.float64] | None = None
    finite: bool = True
    ended: tuple[bool, ...] = ()
    stage_kept_indices: tuple[Ids, ...] = ()
    kept_counts: Ids | None = None
    timings: Timings = Timings()

    @property
    def every_kept_indices(self) -> tuple[Ids, ...]:
        """[B, K] int64: what entered the decoder, and what was left of it in every later stage."""
        return (self.kept_indices, *self.stage_kept_indices)

    @property
    def kept_of_last(self) -> list[Ids]:
        """Per row, what is left at the end of its last image, without padding."""
        rows = [row[row >= 0] for row in self.every_kept_indices[-1]]
        counts = self.kept_counts
        if self.placement.stage_counts is not None:
            counts = self.placement.stage_counts[:, :, -1]
        if counts is None or counts.ndim == 1:
            return rows
        return [row[-count:] for row, count in zip(rows, counts[:, -1], strict=True)]


def generate(
    session: Session,
    batch: ImageBatch,
    input_ids_BT: Ids,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    text_ids_BL: Ids | None = None,
    keep_counts: KeepCounts | None = None,
    adjust: Adjust | None = None,
    keep_logits: bool = False,
) -> Generation:
    """Answer a batch of prompts greedily, in one turn of the session.

    Args:
        session: a loaded bundle or checkpoint.
        batch: images of every prompt.
        input_ids_BT: one prompt per row, right-padded with `PAD`.
        max_new_tokens: longest answer.
        eos_token_ids: end an answer.
        text_ids_BL: the expressions, for pruners that look at them.
        keep_counts: what the graphs are told.
        adjust: changes the placement before it is used; negative controls are made with it.
        keep_logits: keep those of every step, not of the first alone.

    Raises:
        InputError: prompt and answer do not fit into the cache.
    """
    with session.turn():
        began = time.perf_counter()
        visual = encode(session, batch, text_ids_BL=text_ids_BL, keep_counts=keep_counts)
        seconds = time.perf_counter() - began
        return _answered(
            session,
            visual,
            input_ids_BT,
            seconds,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            adjust=adjust,
            keep_logits=keep_logits,
        )


def _answered(
    session: Session,
    visual: VisualTokens,
    input_ids_BT: Ids,
    vision_seconds: float,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    adjust: Adjust | None,
    keep_logits: bool,
) -> Generation:
    """The answers about images that are encoded."""
    encoded = time.perf_counter()
    spliced = session.splice(input_ids_BT, visual)
    placement = adjust(spliced.placement, visual) if adjust else spliced.placement
    # The last token generated is never fed back, so it needs no slot.
    for slots, capacity in zip(placement.slots_of_stages, session.capacities, strict=True):
        needed = int(slots.max()) + max_new_tokens - 1
        if needed > capacity:
            raise InputError(
                f"prompt and answer need {needed} cache slots, the bundle has {capacity}",
                subject="prompt",
                hint="shorten the expression, ask for fewer new tokens, or build with a larger --capacity",
            )
    prefilled = session.prefill(spliced.embeds, placement, reserve=max_new_tokens)
    filled = time.perf_counter()
    decoded = decode(
        session,
        prefilled.logits,
        placement,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        keep_logits=keep_logits,
    )
    return Generation(
        tokens=decoded.tokens,
        logits=decoded.logits,
        kept_indices=visual.kept_indices,
        placement=placement,
        scores=visual.scores,
        margins=visual.margins if prefilled.margins is None else prefilled.margins,
        finite=decoded.finite,
        ended=decoded.ended,
        stage_kept_indices=prefilled.kept_indices,
        kept_counts=visual.kept_counts,
        timings=Timings(vision=vision_seconds, prefill=filled - encoded, decode=time.perf_counter() - filled),
    )


@dataclass(frozen=True)
class Decoded:
    """What the decode loop gives; fields as in `Generation`."""

    tokens: list[list[int]]
    logits: list[NDArray[np.float32]]
    finite: bool
    ended: tuple[bool, ...]
    timings: Timings = Timings()


def decode(
    session: Session,
    logits: NDArray[np.float32],
    placement: Placement,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    keep_logits: bool = False,
) -> Decoded:
    """The one decode loop: greedy, token by token, until every row has ended.

    Args:
        session: with the prompts in its cache.
        logits: [B, V] that the prompts gave.
        placement: of the prompts.
        max_new_tokens: longest answer.
        eos_token_ids: end an answer.
        keep_logits: keep those of every step, not of the first alone.
    """
    kept_logits = [logits.copy()]
    ended = np.zeros(len(logits), bool)
    tokens: list[list[int]] = [[] for _ in range(len(logits))]
    finite = True
    while True:
        finite &= bool(np.isfinite(logits).all())
        chosen = logits.argmax(axis=-1).astype(np.int64)
        ended |= np.isin(chosen, eos_token_ids)
        for row in np.flatnonzero(~ended):
            tokens[row].append(int(chosen[row]))
        if ended.all() or max(map(len, tokens)) == max_new_tokens:
            return Decoded(tokens, kept_logits, finite, tuple(ended.tolist()))
        placement = advance(placement)
        logits = session.step(chosen, placement)
        if keep_logits:
            kept_logits.append(logits.copy())


def encode(
    session: Encoder,
    batch: ImageBatch,
    *,
    text_ids_BL: Ids | None = None,
    keep_counts: KeepCounts | None = None,
) -> VisualTokens:
    """The visual tokens of a batch, in as many calls as its images take; arguments as of `generate`."""
    rows = batch.rows_per_call
    # Every image of a prompt is looked at with the prompt's expression.
    texts = None if text_ids_BL is None else text_ids_BL.repeat(batch.per_prompt, axis=0)
    parts = [
        session.encode(
            call,
            text_ids_BL=None if texts is None else texts[number * rows : (number + 1) * rows],
            keep_count=None if keep_counts is None else keep_counts.calls[number],
        )
        for number, call in enumerate(batch.calls)
    ]
    visual = together(session, parts, batch)
    return visual if keep_counts is None else replace(visual, stage_counts=keep_counts.stages)


def check_overflow(generation: Generation | Decoded, backend: str) -> None:
    """Refuse answers made of logits that are not numbers.

    Raises:
        SessionError: they are not.
    """
    if not generation.finite:
        raise _overflow(backend)


def check_finite(logits_V: NDArray[np.float32], backend: str) -> None:
    """Refuse logits that are not numbers.

    Raises:
        SessionError: they are not.
    """
    if not np.isfinite(logits_V).all():
        raise _overflow(backend)


def _overflow(backend: str) -> SessionError:
    return SessionError(
        "gave logits that are not finite: activations are beyond what the precision can hold",
        subject=backend,
        hint="build with --precision bf16 or fp32, and open a new session (the cache holds them too)",
    )
