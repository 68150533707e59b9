"""Model families: the table and the contract. One file per family, found by the checkpoint's `model_type`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from gap_export.bundle import AnyPreprocessing, BoxFormat, ModelFacts, PromptTemplate, TextTower
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.plan import Plan
from gap_export.recipe import Recipe

if TYPE_CHECKING:
    from gap_export.spec import Component

FAMILIES = {
    "internvl": "gap_export.families.internvl",
    "llava": "gap_export.families.llava",
    "llava_next": "gap_export.families.llava_next",
    "llava_onevision": "gap_export.families.llava_onevision",
}
"""`model_type` of config.json -> module that describes it."""


class Family(Protocol):
    """What a module of this package offers for the checkpoints it knows."""

    def facts(self, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes of the model."""
        ...

    def preprocessing(self, checkpoint: Checkpoint, recipe: Recipe) -> AnyPreprocessing:
        """How pictures become pixel values."""
        ...

    def prompt(self, checkpoint: Checkpoint, recipe: Recipe) -> PromptTemplate:
        """How expressions become token ids."""
        ...

    def box(self, recipe: Recipe) -> BoxFormat:
        """How boxes are written."""
        ...

    def text_tower(self, checkpoint: Checkpoint, part: Checkpoint) -> TextTower:
        """What there is to know about the text tower in `part`, a checkpoint beside this one.

        Raises:
            CheckpointError: none in it, or one that belongs to another vision tower.
        """
        ...

    def components(self, checkpoint: Checkpoint, plan: Plan) -> list[Component]:
        """`vision`, `splice`, `embed` and `decoder` (or `prefill` and `decode`), hollow, ready to be traced.

        Args:
            checkpoint: with the part `text_tower` where the plan has one.
            plan: of the build.
        """
        ...


def family_of(checkpoint: Checkpoint) -> tuple[str, Family]:
    """The family that knows a checkpoint.

    Returns:
        (name, family).

    Raises:
        CheckpointError: none does.
    """
    module = FAMILIES.get(checkpoint.model_type)
    if module is None:
        raise CheckpointError(
            f"has model_type {checkpoint.model_type!r}, which is not supported",
            subject=str(checkpoint.folder / "config.json"),
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    family: Family = importlib.import_module(module)
    return checkpoint.model_type, family
