"""A checkpoint and what its family makes of it for one recipe: everything that is read before anything is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export import prune
from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.hub import resolve
from gap_export.checkpoint.random_weights import random_checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import PARTS, Family, family_of
from gap_export.inputs.layouts import Layout, NativeResolutionLayout
from gap_export.inputs.prompt import PromptTemplate, TextTower, check_text_tokenizer, load_tokenizer
from gap_export.recipe.ranges import Ranges, read_ranges
from gap_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gap_export.bundle.spec import Component
    from gap_export.plan import Plan

Progress = Callable[[str], None]
"""Called with a few words whenever a stage begins."""

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class OpenedModel:
    """What a build knows of a model before it traces.

    Attributes:
        recipe: that it was opened for.
        checkpoint: joined by the checkpoints beside it, every weight in place; no weight is loaded.
        family_name: in the table of families.
        family: that knows the checkpoint.
        spec: sizes of the model.
        tokenizer: of the prompt.
        prompt: how expressions become token ids.
        layout: how images become pixel values.
        box: how boxes are written.
        text_tower: for pruners that read the expression; its weights are the part `text_tower` of the checkpoint.
        ranges: of activations, for precisions that need them.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    family_name: str
    family: Family
    spec: ModelSpec
    tokenizer: Tokenizer
    prompt: PromptTemplate
    layout: Layout
    box: BoxFormat
    text_tower: TextTower | None
    ranges: Ranges | None

    def components(self, plan: Plan) -> list[Component]:
        """The pieces of the model that become graphs, hollow, ready to be traced."""
        return self.family.components(self.checkpoint, self.spec, plan)


def open_model(
    recipe: Recipe,
    *,
    reads_text: bool | None = None,
    progress: Progress = lambda words: None,
) -> OpenedModel:
    """Open the checkpoint that a recipe names, and all that it needs beside it.

    Args:
        recipe: what to open.
        reads_text: whether the recipe's text tower is wanted; by default, whether its pruner reads the expression.
        progress: told when reading begins, and when weights are fetched or made.

    Raises:
        CheckpointError: something is missing, damaged, or of another model.
        RecipeError: an option that this model has no use for, or ranges that cannot be read.
    """
    progress("reading the checkpoint")
    random = recipe.weights == "random"
    folder = (
        random_checkpoint(recipe.checkpoint, progress) if random else resolve(recipe.checkpoint, progress)
    )
    checkpoint = open_checkpoint(folder, name=recipe.checkpoint)
    family_name, family = family_of(checkpoint)
    if recipe.family not in (None, family_name):
        raise CheckpointError(
            f"is of family {family_name!r}, the recipe says {recipe.family!r}",
            subject=str(checkpoint.folder),
            hint="use a recipe of the checkpoint's family",
        )
    checkpoint = _with_parts(checkpoint, family, recipe)
    layout = family.preprocessing(checkpoint, recipe)
    _check_max_pixels(layout, recipe)
    spec, tokenizer = family.facts(checkpoint, recipe), family.tokenizer(checkpoint)
    text_tower = None
    if reads_text is None:
        reads_text = prune.strategy(recipe.pruner).needs_text
    if reads_text and recipe.text_tower:
        part = open_checkpoint(resolve(recipe.text_tower), name=recipe.text_tower)
        checkpoint, text_tower = checkpoint.with_part("text_tower", part), family.text_tower(checkpoint, part)
        check_text_tokenizer(load_tokenizer(part.folder / TOKENIZER), text_tower)
    return OpenedModel(
        recipe=recipe,
        checkpoint=checkpoint,
        family_name=family_name,
        family=family,
        spec=spec,
        tokenizer=tokenizer,
        prompt=family.prompt(checkpoint, recipe).model_copy(update={"images": recipe.images}),
        layout=layout,
        box=family.box(recipe),
        text_tower=text_tower,
        ranges=None if recipe.ranges is None else read_ranges(Path(recipe.ranges)),
    )


def _with_parts(checkpoint: Checkpoint, family: Family, recipe: Recipe) -> Checkpoint:
    """The checkpoint with everything that it needs beside it."""
    known = family.parts(checkpoint)
    for name in PARTS:
        if getattr(recipe, name) is not None and name not in {part.name for part in known}:
            raise RecipeError(
                "has no place in this model",
                subject=f"--{name.replace('_', '-')} {getattr(recipe, name)}",
                hint="leave it out: the checkpoint is complete",
            )
    for needed in known:
        given = getattr(recipe, needed.name)
        if given is None and not needed.required:
            continue
        if given is None:
            raise CheckpointError(
                f"has no {needed.holds}",
                subject=str(checkpoint.folder),
                hint=f"add --{needed.name.replace('_', '-')} {needed.published}, or the folder it lies in",
            )
        checkpoint = checkpoint.with_part(needed.name, open_checkpoint(resolve(given), name=given))
    return family.joined(checkpoint)


def _check_max_pixels(layout: Layout, recipe: Recipe) -> None:
    """Refuse a bound that this model's preprocessing has no use for."""
    if recipe.max_pixels is not None and not isinstance(layout, NativeResolutionLayout):
        raise RecipeError(
            "is for models that take images at their own size and shape, and this one does not",
            subject=f"max_pixels {recipe.max_pixels}",
            hint="leave it out",
        )
