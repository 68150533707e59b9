"""Model families: which there are, and which one knows a checkpoint. To add one: `docs/extending.md`.

`table.py` has a row for each; `base.py` has the class that all derive from; `reference/` has the models that their graphs are held
against. Only rows are imported here: no torch, no transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.checkpoint import Checkpoint
from gap_export.families.table import FamilyRow, names, register, row, row_of

if TYPE_CHECKING:
    from gap_export.families.base import Family

__all__ = ["COMPANIONS", "FamilyRow", "names", "open_family", "register", "row", "row_of"]

COMPANIONS = ("base", "vision_tower")
"""Fields of the recipe that name checkpoints beside the main one."""


def open_family(checkpoint: Checkpoint) -> Family:
    """The family that knows a checkpoint, opened on it.

    Args:
        checkpoint: with its companions.

    Raises:
        CheckpointError: none does, or it is not one that its family supports.
    """
    found = row_of(checkpoint)
    return found.load()(found, checkpoint)
