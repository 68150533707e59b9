"""Model families: the table and the contract. One file per family, found by the checkpoint's `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.families.table import FamilyRow, names, register, row, row_of
from gap_export.inputs.layouts import Layout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gap_export.bundle.spec import Component
    from gap_export.plan import Plan

__all__ = ["PARTS", "Family", "FamilyRow", "Part", "family_of", "names", "register", "row", "row_of"]

PARTS = ("base", "vision_tower")
"""Fields of the recipe that name checkpoints beside the main one."""


@dataclass(frozen=True)
class Part:
    """A checkpoint beside the main one that a piece of the model comes from.

    Attributes:
        name: field of the recipe, and of the joined checkpoint, that it goes by.
        published: hub id of the one that the model's authors used.
        holds: what comes from it, in words.
        required: whether there is no model without it.
    """

    name: Literal["base", "vision_tower"]
    published: str
    holds: str
    required: bool = True


class Family(Protocol):
    """What a module of this package offers for the checkpoints it knows."""

    def parts(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """What this checkpoint needs or may have beside it."""
        ...

    def joined(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, joined by its parts, with every weight in place: deltas added, low-rank updates merged.

        All other functions are given this one.

        Raises:
            CheckpointError: the parts do not belong together.
        """
        ...

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        """Of the prompt, the image's placeholder among its tokens.

        Raises:
            CheckpointError: there is none.
        """
        ...

    def facts(self, checkpoint: Checkpoint, recipe: Recipe) -> ModelSpec:
        """Sizes of the model, as far as the recipe leaves them open."""
        ...

    def preprocessing(self, checkpoint: Checkpoint, recipe: Recipe) -> Layout:
        """How images become pixel values."""
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

    def components(self, checkpoint: Checkpoint, sizes: ModelSpec, plan: Plan) -> list[Component]:
        """`vision`, `splice`, `embed` and `decoder` (or `prefill` and `decode`), hollow, ready to be traced.

        Args:
            checkpoint: with the part `text_tower` where the plan has one.
            sizes: of the model, as `facts` gave them.
            plan: of the build.
        """
        ...


def family_of(checkpoint: Checkpoint) -> tuple[str, Family]:
    """The family that knows a checkpoint, by its `model_type` or by what it holds.

    Returns:
        (name, family).

    Raises:
        CheckpointError: none does.
    """
    found = row_of(checkpoint)
    implementation: Family = found.load()
    return found.name, implementation
