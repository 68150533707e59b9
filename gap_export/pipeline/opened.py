"""A checkpoint and what its family makes of it for one recipe: everything that is read before anything is traced."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gap_export import families, prune
from gap_export.bundle.check import layout_faults, model_faults, visual_faults
from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.hub import resolve
from gap_export.checkpoint.random_weights import random_checkpoint
from gap_export.checkpoint.tokenizers import check_in_vocabulary, check_placeholder
from gap_export.errors import CheckpointError, CheckpointWarning, RecipeError
from gap_export.inputs.chat.format import ChatFormat
from gap_export.inputs.layouts import Layout
from gap_export.inputs.prompt import PromptTemplate, TextTower, check_text_tokenizer
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.pipeline.chat import open_chat
from gap_export.progress import SILENT, Progress
from gap_export.recipe.calibration import Calibration, read_calibration
from gap_export.recipe.ranges import Ranges, read_ranges
from gap_export.recipe.recipe import Recipe
from gap_export.records import explain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gap_export.families.base import Family
    from gap_export.modeling.components import Component
    from gap_export.plan import Plan

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class OpenedModel:
    """What a build knows of a model before it traces.

    Attributes:
        recipe: that it was opened for, without checkpoints that nothing comes from.
        family: opened on the checkpoint.
        spec: sizes of the model.
        tokenizer: of the prompt.
        prompt: how expressions become token ids.
        chat_template: for free questions, in Jinja; "" where there is none.
        chat: how it is used; None where there is none.
        layout: how images become pixel values.
        box: how boxes are written.
        text_tower: for pruners that read the expression; its weights are those of the companion `text_tower`, or the decoder's embedding.
        ranges: of activations, for precisions that need them.
        calibration: text that the decoder reads, where its rounding is compensated.
        notes: what the user should know of how the checkpoint was read, a sentence each.
        assumptions: what was found in a second place because it was missing in the first, a sentence each.
        prompts: where grounding prompt and chat template are from, a sentence each.
    """

    recipe: Recipe
    family: Family
    spec: ModelSpec
    tokenizer: Tokenizer
    prompt: PromptTemplate
    chat_template: str
    chat: ChatFormat | None
    layout: Layout
    box: BoxFormat
    text_tower: TextTower | None
    ranges: Ranges | None
    calibration: Calibration | None
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """With the checkpoints beside it, every weight in place; no weight is loaded."""
        return self.family.checkpoint

    def components(self, plan: Plan) -> list[Component]:
        """The pieces of the model that become graphs, without weights, ready to be traced."""
        return self.family.components(self.spec, plan)


def open_model(
    recipe: Recipe,
    *,
    reads_text: bool | None = None,
    progress: Progress = SILENT,
) -> OpenedModel:
    """Open the checkpoint that a recipe names, and all that it needs beside it.

    Args:
        recipe: what to open.
        reads_text: whether something has to read the expression; by default, whether the recipe's pruner looks at it.
        progress: told when reading begins, and when weights are fetched or made.

    Warns:
        CheckpointWarning: fields of its configuration that are not known here.

    Raises:
        CheckpointError: something is missing, damaged, or of another model.
        RecipeError: an option that this model has no use for, or ranges that cannot be read.
        InputError: a calibration text that cannot be read, or is too short.
    """
    pruner = prune.row(recipe.pruner)  # a name that is none is told before anything is fetched
    if reads_text is None:
        reads_text = pruner.needs_text
    progress.stage("reading the checkpoint")
    random = recipe.weights == "random"
    folder = (
        random_checkpoint(recipe.checkpoint, progress) if random else resolve(recipe.checkpoint, progress)
    )
    checkpoint = open_checkpoint(folder, name=recipe.checkpoint)
    row = families.row_of(checkpoint)
    if recipe.family not in (None, row.name):
        raise CheckpointError(
            f"is of family {row.name!r}, the recipe says {recipe.family!r}",
            subject=str(checkpoint.folder),
            hint="use a recipe of the checkpoint's family",
        )
    kind = row.load()
    unused = [companion.name for companion in kind.companions(checkpoint) if not companion.used]
    recipe = recipe.model_copy(update=dict.fromkeys(unused))
    family = kind(row, _with_companions(checkpoint, kind, recipe, reads_text=reads_text))
    layout, spec = _layout_and_spec(family, recipe)
    tokenizer = family.tokenizer()
    check_placeholder(
        tokenizer,
        family.placeholder,
        family.image_token_id,
        prompt=recipe.prompt or family.grounding_prompt,
        checkpoint=family.checkpoint,
    )
    check_in_vocabulary(tokenizer, family.image_token_id, spec.vocabulary, family.checkpoint)
    chat = open_chat(family, recipe, tokenizer, spec.vocabulary)
    text_tower = family.text_embeddings(spec, recipe) if reads_text else None
    companion = family.checkpoint.companions.get("text_tower")
    if companion is not None:
        text_tower = family.text_tower(companion)
        check_text_tokenizer(load_tokenizer(companion.folder / TOKENIZER), text_tower)
    for note in family.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=1)  # one place, so that each is told once
    calibration = None
    if recipe.calibration is not None:
        calibration = read_calibration(
            Path(recipe.calibration),
            tokenizer,
            vocabulary=spec.vocabulary,
            max_positions=spec.max_positions,
        )
    return OpenedModel(
        recipe=recipe,
        family=family,
        spec=spec,
        tokenizer=tokenizer,
        prompt=chat.prompt,
        chat_template=chat.template,
        chat=chat.format,
        layout=layout,
        box=family.box(recipe).written_as(recipe.box_format, layout, error=RecipeError),
        text_tower=text_tower,
        ranges=None if recipe.ranges is None else read_ranges(Path(recipe.ranges)),
        calibration=calibration,
        notes=family.notes,
        assumptions=() if random else family.assumptions(tokenizer),
        prompts=chat.said,
    )


def _with_companions(
    checkpoint: Checkpoint, kind: type[Family], recipe: Recipe, *, reads_text: bool
) -> Checkpoint:
    """The checkpoint with everything that it needs beside it."""
    known = kind.companions(checkpoint)
    for name in families.COMPANIONS:
        if getattr(recipe, name) is not None and name not in {companion.name for companion in known}:
            raise RecipeError(
                "has no place in this model",
                subject=f"--{name.replace('_', '-')} {getattr(recipe, name)}",
                hint="leave it out: the checkpoint is complete",
            )
    given: dict[str, str | None] = {companion.name: getattr(recipe, companion.name) for companion in known}
    for needed in known:
        if given[needed.name] is None and needed.required:
            raise CheckpointError(
                f"has no {needed.holds}",
                subject=str(checkpoint.folder),
                hint=f"add --{needed.name.replace('_', '-')} {needed.published}, or the folder it lies in",
            )
    if reads_text:
        given["text_tower"] = recipe.text_tower
    for name, where in given.items():
        if where is not None:
            checkpoint = checkpoint.with_companion(name, open_checkpoint(resolve(where), name=where))
    return checkpoint


def _layout_and_spec(family: Family, recipe: Recipe) -> tuple[Layout, ModelSpec]:
    """How images are laid out, and the sizes of the model.

    Raises:
        CheckpointError: numbers that no model has, or that contradict each other.
        RecipeError: a bound on pixels that this model has no use for.
    """
    try:
        layout = family.layout(recipe)
        _check_max_pixels(layout, recipe)
        spec = family.spec(recipe)
    except ValidationError as error:
        fault: str | None = explain(error)
    else:
        faults = itertools.chain(model_faults(spec), layout_faults(layout), visual_faults(spec, layout))
        fault = next(faults, None)
        if fault is None:
            return layout, spec
    raise CheckpointError(
        f"has numbers that no model has: {fault}",
        subject=str(family.checkpoint.folder),
        hint="see its config.json and preprocessor_config.json, or fetch it again",
    )


def _check_max_pixels(layout: Layout, recipe: Recipe) -> None:
    """Refuse a bound that this model's preprocessing has no use for."""
    if recipe.max_pixels is not None and not layout.takes_max_pixels:
        raise RecipeError(
            "is for models that take images at their own size and shape, and this one does not",
            subject=f"max_pixels {recipe.max_pixels}",
            hint="leave it out",
        )
