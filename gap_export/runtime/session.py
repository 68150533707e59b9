"""The contract of a runtime: four calls that take and give NumPy arrays or buffers of the runtime's own.

Sessions differ in where tensors live; the decode loop (`runtime/generate.py`) does not know. Arrays that only travel
from one call to the next (embeddings) stay in whatever form the session keeps them (`Buffer`).

Shape letters: B batch, T text tokens with one image placeholder, K kept visual tokens, S = T - 1 + K, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.manifest import Pruning
from gap_export.bundle.spec import GraphSpec
from gap_export.errors import InputError, SessionError
from gap_export.inputs.batch import ImageBatch, PixelInputs
from gap_export.positions import PAD, Ids, Placement

Buffer = Any
"""A tensor in the session's own form (NumPy array, OrtValue, torch tensor, device pointer)."""

TEXT_IDS, KEEP_COUNT, KEPT_COUNTS = "text_ids", "keep_count", "kept_counts"
VISUAL_COUNTS, IMAGE_GRID, STAGE_COUNTS = "visual_counts", "image_grid", "stage_counts"
"""Names of inputs and outputs that graphs have only where they are needed."""

KEPT_SLOTS = "kept_slots."
"""What the outputs of `prefill` begin with that say which tokens a later stage has."""


@dataclass(frozen=True)
class VisualTokens:
    """What the vision graph gives.

    Attributes:
        embeds: [B, K, H] in the session's own form.
        kept_indices: [B, K] int64 raster indices; -1 after the tokens of an image that keeps fewer than others. Several
            images of a prompt stand one after the other, each with indices of its own.
        kept_counts: [B] ([B, I] of several) int64, tokens of each image, where images differ; None where all keep K.
        visual_counts: [B] ([B, I]) int64, tokens of each image before pruning, where images differ in size.
        image_grid: [B, 2] ([B, I, 2]) int64, rows and columns of those, where positions follow the grid.
        stage_counts: [B, I, J] int64, how many of them every later stage of the decoder has, where that is told.
        scores: [B, N] float32 the selection was made by, where one score decides; only the reference tells.
        margins: [B] float64, the smallest gap any choice was made by, where no single score decides; the same.
    """

    embeds: Buffer
    kept_indices: Ids
    kept_counts: Ids | None = None
    visual_counts: Ids | None = None
    image_grid: Ids | None = None
    stage_counts: Ids | None = None
    scores: NDArray[np.float32] | None = None
    margins: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Spliced:
    """What the splice graph gives: embeddings and where they stand."""

    embeds: Buffer
    placement: Placement


@dataclass(frozen=True)
class Prefilled:
    """What a prompt gives.

    Attributes:
        logits: [B, V] float32 of each row's last real token.
        kept_indices: of every later stage of a decoder that drops tokens, [B, K] int64 raster indices, one image's after the other's and -1 at
            the end of rows that keep fewer.
        margins: [B] float64, by how little those were chosen; only the reference tells.
    """

    logits: NDArray[np.float32]
    kept_indices: tuple[Ids, ...] = ()
    margins: NDArray[np.float64] | None = None


class Encoder(Protocol):
    """What images are encoded by: a session, or a row of it; as of `Session`."""

    def encode(
        self, pixels: PixelInputs, *, text_ids_BL: Ids | None = None, keep_count: int | None = None
    ) -> VisualTokens:
        """Vision tower, pruner and projector."""
        ...

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings of the images of every row as one batch."""
        ...


class Session(Protocol):
    """A bundle (or a checkpoint) loaded into a runtime."""

    @property
    def backend(self) -> str:
        """Name in the table of backends, for reports."""
        ...

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of the cache, in every stage of the decoder."""
        ...

    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """Vision tower, pruner and projector.

        Args:
            pixels: of one call, as `ImageLayout.prepare` gives them.
            text_ids_BL: the expressions, for pruners that look at them, as `prompt.encode_text` gives them.
            keep_count: how many tokens to keep, where requests choose; the bundle's default when left out.

        Raises:
            InputError: an expression is missing, a count cannot be chosen or is out of range, or an image needs more tokens
                than an adaptive bundle has capacity for.
        """
        ...

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row, one after the other, as one batch [B, longest, H], rows padded at the end."""
        ...

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder; short rows are padded with `PAD`."""
        ...

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on.

        Args:
            embeds: [B, S, H] of the prompts.
            placement: of the prompts.
            reserve: how many tokens of a row will follow at most. A cache that may vary in length gets no more slots than that takes,
                and attention runs over no more; None for all that the bundle allows.
        """
        ...

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first: what a prompt of one row left is where all of them go on from.

        Only for decoders in which every layer sees the same tokens. What is written afterwards lies in later slots, so a prompt
        may be forked again and again.
        """
        ...

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token; short rows are padded with `PAD`.

        Args:
            token_ids_BT: [B, T] int64.
            placement: `position_ids` [B, T] (M-RoPE [3, B, T]), `write_index` [B] of the first token, `last_index` [B] within T.
        """
        ...

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row at `placement.position_ids` [B, 1] into slot `placement.write_index`; logits [B, V].

        Later stages have slots of their own, `placement.stage_write_index`.
        """
        ...

    @property
    def caches_begun(self) -> int:
        """How often the cache was begun anew: as long as this stays the same, what was read into it lies there."""
        ...

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies.

        Args:
            slots: of every stage, that will be written; see `grow`.
        """
        ...

    def grow(self, slots: Sequence[int]) -> None:
        """Give every row of the cache at least so many slots; what lies in them stays.

        Args:
            slots: of every stage. A cache that may vary in length has no more of them than were asked for, or a few.
        """
        ...

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings [1, T, H] of text, in the session's own form."""
        ...

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in a cache of one row: logits [1, V] of the last token.

        Only for decoders in which every layer sees the same tokens. What lies behind the first slot that is written is lost.

        Args:
            embeds: [1, S, H], as `embed` or `splice` give them.
            placement: `position_ids` [1, S] (M-RoPE [3, 1, S]), `write_index` [1] of the first token, `last_index` [1] within S.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """`with session.turn():` one whole answer (or several that share a prompt's beginning), from the image to the last token: a
        session has one cache, and another thread's answer waits. Turns of one thread may be nested."""
        ...

    def close(self) -> None:
        """Give back all memory, when the answer that another thread is at is done. Closing again does nothing; any other call is a
        `SessionError` from then on."""
        ...

    def __enter__(self) -> Self:
        """`with session:` closes it at the end."""
        ...

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        ...


class Lifetime:
    """Turns and the end of a session, once for all runtimes: a session inherits it, says in `_free` what it holds, and calls
    `_check_open` before it uses any of that.

    Attributes:
        backend: name in the table of backends.
        caches_begun: how often the cache was begun anew.
    """

    backend: str
    caches_begun = 0
    _closed = False
    _turn: threading.RLock

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """With a lock."""
        # Here, and not in __init__: a session that fails to open is closed before its own __init__ has ended.
        session = super().__new__(cls)
        session._turn = threading.RLock()
        return session

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One whole answer; see `Session.turn`."""
        with self._turn:
            self._check_open()
            yield

    def close(self) -> None:
        """Give back all memory; closing again does nothing."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._free()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self) -> None:
        """Give back all memory; called once."""
        raise NotImplementedError

    def _check_open(self) -> None:
        """Refuse to work after `close`.

        Raises:
            SessionError: the session is closed.
        """
        if self._closed:
            raise SessionError(
                "is closed",
                subject=f"the {self.backend} session",
                hint="open another one: a closed one holds no model",
            )


def vision_inputs(
    pruning: Pruning, *, reads_text: bool, text_ids_BL: Ids | None, keep_count: int | None
) -> dict[str, Ids]:
    """What the vision graph of a bundle takes besides pixels: `text_ids`, `keep_count`.

    Args:
        pruning: of the bundle.
        reads_text: whether its pruner looks at the expression.
        text_ids_BL: as given to `Session.encode`.
        keep_count: as given to `Session.encode`.

    Raises:
        InputError: a count cannot be chosen or is out of range.
    """
    inputs: dict[str, Ids] = {}
    if reads_text:
        if text_ids_BL is None:
            raise InputError(
                f"looks at the expression, and no text ids were given ({TEXT_IDS})",
                subject=f"pruner {pruning.pruner}",
                hint="tokenize the expression with the bundle's text_tokenizer.json and pass its ids",
            )
        inputs[TEXT_IDS] = text_ids_BL
    if pruning.keep_mode in ("ratio", "bounded") and pruning.count_is_given:
        if keep_count is None:
            raise InputError(
                "must be told how many tokens to keep, as images differ in how many they have",
                subject="the vision graph",
                hint="keep the bundle's share of the image's tokens",
            )
        inputs[KEEP_COUNT] = np.array(keep_count, np.int64)
    elif pruning.count_is_given:
        kept = pruning.kept if keep_count is None else keep_count
        if not pruning.min_tokens <= kept <= pruning.max_tokens:
            raise InputError(
                f"is outside {pruning.min_tokens} to {pruning.max_tokens}, which this bundle was built for",
                subject=f"keep {kept} tokens",
                hint="choose within the range, or build with a wider --keep",
            )
        inputs[KEEP_COUNT] = np.array(kept, np.int64)
    elif keep_count not in (None, pruning.kept_after_last_stage):
        raise InputError(
            f"cannot be chosen: this bundle keeps {_kept_in_words(pruning)}",
            subject=f"keep {keep_count} tokens",
            hint="build it with a range: --keep 0.1:1.0",
        )
    return inputs


def splice_inputs(spec: GraphSpec, input_ids_BT: Ids, visual: VisualTokens) -> dict[str, Any]:
    """What the splice graph of a bundle takes, by the names of its inputs.

    Args:
        spec: of the graph.
        input_ids_BT: as given to `Session.splice`.
        visual: visual tokens as given to `Session.splice`.
    """
    offered = {
        "input_ids": input_ids_BT,
        "visual_embeds": visual.embeds,
        "kept_indices": visual.kept_indices,
        KEPT_COUNTS: visual.kept_counts,
        VISUAL_COUNTS: visual.visual_counts,
        IMAGE_GRID: visual.image_grid,
        STAGE_COUNTS: visual.stage_counts,
    }
    return {tensor.name: offered[tensor.name] for tensor in spec.inputs}


def kept_of_stages(slots: Sequence[Ids], placement: Placement) -> tuple[Ids, ...]:
    """What every later stage of the decoder has of the images.

    Args:
        slots: for each, [B, T] int64, where its tokens stood in stage 0; a short row is filled up with anything.
        placement: of the prompts.

    Returns:
        For each, [B, K] int64 as of `Prefilled.kept_indices`.
    """
    return tuple(_kept_of_stage(slots_BT, placement, number) for number, slots_BT in enumerate(slots))


def _kept_of_stage(slots_BT: Ids, placement: Placement, later: int) -> Ids:
    assert placement.image_slots is not None
    told = placement.stage_counts is not None
    ends = placement.stage_lengths[:, later] if told else [slots_BT.shape[1]] * len(slots_BT)
    rows = []
    for slots_T, images_I2, end in zip(slots_BT, placement.image_slots, ends, strict=True):
        of_images = [(slots_T[:end], first, behind) for first, behind in images_I2]
        rows.append(
            np.concatenate([s[(s >= first) & (s < behind)] - first for s, first, behind in of_images])
        )
    return rows_of_ids(rows)


def rows_of_ids(rows: Sequence[Ids]) -> Ids:
    """[B, K] int64, short rows filled with `PAD` at the end."""
    ids_BK = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for number, ids_K in enumerate(rows):
        ids_BK[number, : len(ids_K)] = ids_K
    return ids_BK


def together(session: Encoder, parts: Sequence[VisualTokens], batch: ImageBatch) -> VisualTokens:
    """The visual tokens of a batch, from those of the calls it took.

    Args:
        session: that encoded them.
        parts: of every call.
        images: that were encoded.
    """
    if len(parts) == 1 and batch.one_size:
        return parts[0]
    step = batch.per_prompt
    rows = [parts[first : first + step] for first in range(0, len(parts), step)]
    kept_rows = [np.concatenate([part.kept_indices[0] for part in row]) for row in rows]
    kept_BK = rows_of_ids(kept_rows)
    longest = kept_BK.shape[1]
    counts = np.array([part.kept_indices.shape[1] for part in parts], np.int64)
    margins = [
        min((float(part.margins[0]) for part in row if part.margins is not None), default=None)
        for row in rows
    ]
    return VisualTokens(
        embeds=parts[0].embeds
        if len(parts) == 1
        else session.embeds_together([[part.embeds for part in row] for row in rows], longest),
        kept_indices=kept_BK,
        kept_counts=batch.by_prompt(counts),
        visual_counts=batch.by_prompt(batch.visual_tokens),
        image_grid=None if batch.grids is None else batch.by_prompt(batch.grids),
        margins=None if None in margins else np.array(margins, np.float64),
    )


def padded_together(rows: Sequence[Sequence[NDArray[Any]]], longest: int) -> NDArray[Any]:
    """[1, K, H] arrays of every row as one [B, longest, H], zeros at the end of short rows."""
    first = rows[0][0]
    whole = np.zeros((len(rows), longest, first.shape[-1]), first.dtype)
    for row, parts in enumerate(rows):
        embeds_KH = np.concatenate([part[0] for part in parts])
        whole[row, : len(embeds_KH)] = embeds_KH
    return whole


def check_within_bound(counts_B: Ids, bound: int, pruning: Pruning) -> None:
    """Refuse images that need more tokens than an adaptive bundle has capacity for: dropping the rest would be a silent change.

    Args:
        counts_B: how many they need.
        bound: how many they may have.
        pruning: of the bundle.

    Raises:
        InputError: with the largest count.
    """
    if counts_B.max() > bound:
        raise InputError(
            f"needs {counts_B.max()} visual tokens by the rule of {pruning.pruner}, this bundle has capacity for {bound}",
            subject=f"image {int(counts_B.argmax()) + 1} of {len(counts_B)}",
            hint="build with a larger --keep-bound, or with a fixed --keep",
        )


def as_many_as_kept(
    embeds_BKH: NDArray[Any], kept_indices_BK: Ids, counts_B: Ids, pruning: Pruning
) -> VisualTokens:
    """What an adaptive vision graph gives, without the padding that no row uses: the decoder need not run over it.

    Raises:
        InputError: as `check_within_bound`.
    """
    check_within_bound(counts_B, kept_indices_BK.shape[1], pruning)
    longest = int(counts_B.max())
    return VisualTokens(
        embeds=embeds_BKH[:, :longest], kept_indices=kept_indices_BK[:, :longest], kept_counts=counts_B
    )


def _kept_in_words(pruning: Pruning) -> str:
    if pruning.finds_count:
        return f"what each image needs, at most {pruning.max_tokens}"
    return f"{pruning.kept_after_last_stage} of every image"
