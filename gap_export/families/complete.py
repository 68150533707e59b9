"""Checkpoints that hold all of their model: nothing beside them, nothing to be merged, the tokenizer in the folder."""

from __future__ import annotations

from tokenizers import Tokenizer

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.tokenizers import stored_tokenizer
from gap_export.families import Part


def parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """See `Family.parts`."""
    return ()


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """See `Family.joined`."""
    return checkpoint


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """See `Family.tokenizer`."""
    return stored_tokenizer(checkpoint)
