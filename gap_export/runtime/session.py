"""The contract of a runtime: four calls that take and give NumPy arrays or buffers of the runtime's own.

Sessions differ in where tensors live; the decode loop (`runtime/generate.py`) does not know. Arrays that only travel
from one call to the next (embeddings) stay in whatever form the session keeps them (`Buffer`).

Shape letters: B batch, T text tokens with one image placeholder, K kept visual tokens, S = T - 1 + K, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.positions import Ids, Placement

Buffer = Any
"""A tensor in the session's own form (NumPy array, OrtValue, torch tensor, device pointer)."""

PAD = -1
"""Fills short rows of `input_ids`; no tokenizer has it, so the graph can count the real tokens."""


@dataclass(frozen=True)
class VisualTokens:
    """What the vision graph gives.

    Attributes:
        embeds: [B, K, H] in the session's own form.
        kept_indices: [B, K] int64 raster indices.
        scores: [B, N] float32 the selection was made by, where one score decides; only the reference tells.
        margins: [B] float64, the smallest gap any choice was made by, where no single score decides; the same.
    """

    embeds: Buffer
    kept_indices: Ids
    scores: NDArray[np.float32] | None = None
    margins: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Spliced:
    """What the splice graph gives: embeddings and where they stand."""

    embeds: Buffer
    placement: Placement


class Session(Protocol):
    """A bundle (or a checkpoint) loaded into a runtime."""

    @property
    def backend(self) -> str:
        """Name for reports: `torch`, `onnxruntime`, `tensorrt-rtx`, `tensorrt`."""
        ...

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        ...

    def encode(self, pixel_values_BCHW: NDArray[np.float32]) -> VisualTokens:
        """Vision tower, pruner and projector."""
        ...

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder; short rows are padded with `PAD`."""
        ...

    def prefill(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Fill the cache from slot 0 on; logits [B, V] of each row's last real token."""
        ...

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row at `placement.position_ids` [B, 1] into slot `placement.write_index`; logits [B, V]."""
        ...
