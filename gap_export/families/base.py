"""What a model family is to the rest of the package: the one class that all families derive from.

A family is constructed with a checkpoint and answers for it. What most families have in common stands here as a default; a family
writes down what is its own: `spec`, `layout`, `model_parts`, its prompt, and where its checkpoints keep what.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from tokenizers import Tokenizer
from torch._subclasses import FakeTensorMode

from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.tokenizers import stored_tokenizer
from gap_export.checkpoint.weight_map import Prefixes, check_known, find_key, with_shared_table
from gap_export.errors import CheckpointError, RecipeError, shown
from gap_export.families.frames import Frame
from gap_export.families.table import FamilyRow
from gap_export.inputs.batch import TokenRange
from gap_export.inputs.layouts import Layout
from gap_export.inputs.prompt import PromptTemplate, TextTower
from gap_export.modeling import config_fields, hf_config, rope, selection, sizes
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.clip_text import TEXT_TOWER
from gap_export.modeling.components import Component, ModelParts, build_components, torch_dtype
from gap_export.modeling.fake import fake, fake_mode
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class Companion:
    """A checkpoint beside the main one that a piece of the model comes from.

    Attributes:
        name: field of the recipe, and name among the checkpoint's companions.
        published: hub id of the one that the model's authors used.
        holds: what comes from it, for messages.
        required: whether there is no model without it.
        used: whether anything comes from it; where not, it is left out though a recipe names it.
    """

    name: Literal["base", "vision_tower"]
    published: str
    holds: str
    required: bool = True
    used: bool = True


class Family(ABC):
    """A model family, and one of its checkpoints.

    Args:
        row: of the family in the table.
        checkpoint: with its companions, the text tower among them where the pruner needs one.

    Attributes:
        row: of the family.
        checkpoint: with every weight in place, deltas added, low-rank updates merged.
        check: raises unless something of the config holds.
        config: of the checkpoint, as `read_config` gives it; read once.
        unknown_fields: names of fields of the configuration that are in no list of `modeling/config_fields.py`.

    Raises:
        CheckpointError: a config that is not supported, or companions that do not belong to the checkpoint.
    """

    prefixes: ClassVar[Prefixes] = hf_config.PREFIXES
    """Prefix of modules' parameters -> prefixes in published checkpoints."""
    unused_weights: ClassVar[str] = hf_config.NOTHING
    """Pattern of keys of published checkpoints that the model does not need."""
    placeholder: ClassVar[str] = "<image>"
    """Name of the token in a prompt that stands for an image."""

    def __init__(self, row: FamilyRow, checkpoint: Checkpoint) -> None:
        self.row = row
        self.checkpoint = self.resolve_weights(checkpoint)
        self.check = hf_config.ConfigCheck(checkpoint, row.title)
        self.unknown_fields = self.check_fields()
        hf_config.check_activations(self.decoder_checkpoint)
        self.config: Any = self.read_config()
        decoder = self.decoder_checkpoint
        sizes.check_decoder(self.config.text_config, hf_config.ConfigCheck(decoder, row.title))
        rope.check(self.config.text_config, decoder.folder / "config.json")
        rope.check_spellings(decoder.config, self.config.text_config, decoder.folder / "config.json")

    # What is read from the checkpoint

    @staticmethod
    def companions(checkpoint: Checkpoint) -> tuple[Companion, ...]:
        """What a checkpoint needs or may have beside it.

        Args:
            checkpoint: alone.
        """
        return ()

    def resolve_weights(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with weights computed that are stored in pieces.

        Args:
            checkpoint: with its companions.

        Raises:
            CheckpointError: the pieces do not belong together.
        """
        return checkpoint

    def check_fields(self) -> tuple[str, ...]:
        """Names of fields of the configuration that are not known; of families without a row in `config_fields.FAMILIES`, none.

        Raises:
            CheckpointError: a field has a value that is not supported.
        """
        known = config_fields.FAMILIES.get(self.row.name)
        return () if known is None else config_fields.check_fields(self.checkpoint, known)

    @property
    def decoder_checkpoint(self) -> Checkpoint:
        """The one whose `config.json` describes the decoder."""
        return self.checkpoint

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how this checkpoint was read, a sentence each; nothing about one as published."""
        return config_fields.note_of(self.unknown_fields)

    def read_config(self) -> Any:
        """The configuration, with `text_config` and `image_token_id`, checked for what is not supported.

        Raises:
            CheckpointError: something is not.
        """
        return hf_config.read_config(self.checkpoint)

    def tokenizer(self) -> Tokenizer:
        """Of the prompt, the image's placeholder among its tokens.

        Raises:
            CheckpointError: there is none.
        """
        return stored_tokenizer(self.checkpoint)

    @property
    def image_token_id(self) -> int:
        """Id of the image's placeholder.

        Raises:
            CheckpointError: the configuration names none.
        """
        stated = self.config.image_token_id
        if not isinstance(stated, int) or isinstance(stated, bool):
            raise CheckpointError(
                f"image_token_id (image_token_index) is {shown(stated)}, and must be the id of the placeholder of images",
                subject=str(self.checkpoint.folder / "config.json"),
                hint="fetch the checkpoint's config.json again",
            )
        return stated

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return hf_config.end_tokens(self.checkpoint, self.config.text_config)[0]

    def assumptions(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """What was found in a second place because it was missing in the first, a sentence each.

        Args:
            tokenizer: of the prompt.
        """
        ends, file = hf_config.end_tokens(self.checkpoint, self.config.text_config)
        if file == hf_config.GENERATION_CONFIG:
            return ()
        named = ", ".join(f"{tokenizer.id_to_token(end) or 'token'} ({end})" for end in ends)
        missing = "no" if not self.checkpoint.json(hf_config.GENERATION_CONFIG) else "no eos_token_id in"
        return (f"{missing} {hf_config.GENERATION_CONFIG}: answers end at {named}, as {file} says",)

    # What a build is made of

    @abstractmethod
    def spec(self, recipe: Recipe) -> ModelSpec:
        """Sizes of the model, as far as the recipe leaves them open."""

    def spec_of_varying_images(self, counts: tuple[TokenRange, int], **facts: Any) -> ModelSpec:
        """The sizes of a model whose images differ in how many visual tokens they have.

        Args:
            counts: how many, and N of the largest image, as the layout says.
            facts: further fields of `ModelSpec`.
        """
        tokens, most = counts
        sizes = hf_config.decoder_sizes(self.config.text_config)
        given = {"missing_features": self.row.missing_features, **facts}
        return ModelSpec(**sizes, visual_tokens=most, grid=None, token_range=tokens, **given)

    @abstractmethod
    def layout(self, recipe: Recipe) -> Layout:
        """How images become pixel values.

        Raises:
            CheckpointError: settings of another image processor.
            RecipeError: something that has no meaning for this family.
        """

    @property
    def frame(self) -> Frame | None:
        """How published models are spoken to, for checkpoints without a chat template; None where no such frame is known."""
        return None

    @property
    def image_text(self) -> str:
        """What stands in a prompt for one image: its placeholder, and what the model was trained to see around it."""
        return self.placeholder if self.frame is None else self.frame.image

    @property
    def grounding_question(self) -> str | None:
        """What a user says who asks for a box, `{expression}` in it and no image; None where the whole prompt alone is known."""
        return None

    @property
    @abstractmethod
    def grounding_prompt(self) -> str:
        """The prompt that asks for a box, `{expression}` and the image's placeholder in it: the question in the family's frame."""

    def prompt(self, recipe: Recipe) -> PromptTemplate:
        """How expressions become token ids."""
        return PromptTemplate(
            grounding=recipe.prompt or self.grounding_prompt,
            image_token_id=self.image_token_id,
            add_special_tokens=True,
            eos_token_ids=self.end_tokens,
        )

    def box(self, recipe: Recipe) -> BoxFormat:
        """How boxes are written.

        Raises:
            RecipeError: a `fit` with which they cannot be.
        """
        self.check_no_fit(recipe)
        return self.row.box

    def text_embeddings(self, spec: ModelSpec, recipe: Recipe) -> TextTower | None:
        """The decoder's token embedding as what reads the expression; None for families beside whose tower a text tower is put.

        Args:
            spec: sizes of the model.
            recipe: of the build.
        """
        if self.row.text_by != "embeddings":
            return None
        return TextTower.of_embeddings(
            width=spec.hidden_size, vocabulary=spec.vocabulary, longest=recipe.max_text
        )

    def text_tower(self, companion: Checkpoint) -> TextTower:
        """What there is to know about a CLIP text tower for the pruners that look at the expression.

        Args:
            companion: the checkpoint that it lies in.

        Raises:
            CheckpointError: none in it, or one that belongs to another vision tower; always, for families whose vision tower has
                no published text tower in the same space.
        """
        raise CheckpointError(
            f"has a text tower that shares no space with the vision tower of {self.row.title}",
            subject=str(companion.folder),
            hint="leave --text-tower out: expressions are read by the decoder's own token embedding"
            if self.row.text_by == "embeddings"
            else "use a pruner that does not look at the expression",
        )

    @abstractmethod
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        """The modules of the model, without weights.

        Args:
            spec: of the model, as `spec` gave it.
            plan: of the build.

        Raises:
            CheckpointError: weights that the model has no place for.
        """

    def components(self, spec: ModelSpec, plan: Plan) -> list[Component]:
        """`vision`, `splice`, `embed` and `decoder` (or `prefill` and `decode`), without weights, ready to be traced.

        Args:
            spec: of the model, as `spec` gave it.
            plan: of the build.

        Raises:
            CheckpointError: weights that the model has no place for.
        """
        return build_components(
            self.checkpoint,
            spec,
            plan,
            self.model_parts(spec, plan),
            family=self.row.name,
            image_token_id=self.image_token_id,
            weight_key=self.weight_key,
        )

    # Weights

    @property
    def tied(self) -> bool:
        """Whether the head may be the token embedding."""
        return hf_config.is_tied(self.config)

    @cached_property
    def _weight_map(self) -> Prefixes:
        return {**with_shared_table(self.prefixes, tied=self.tied), f"{TEXT_TOWER}.": (f"{TEXT_TOWER}/",)}

    def weight_key(self, parameter: str) -> str:
        """Key in the checkpoint of a parameter of one of the components.

        Raises:
            CheckpointError: the checkpoint has it under none of the known names.
        """
        return find_key(self.checkpoint, parameter, self._weight_map)

    def check_weights(self, parameters: Iterable[str]) -> None:
        """Refuse a checkpoint with weights that the model has no place for.

        Args:
            parameters: all of the model's, used in a graph or not, by the names on the left of `prefixes`.

        Raises:
            CheckpointError: names some of them.
        """
        ignored = rf"{TEXT_TOWER}/|{self.unused_weights}"
        check_known(self.checkpoint, parameters, self._weight_map, ignored=ignored)

    # What families build with

    def fake_model(self, kind: Any, plan: Plan, mode: FakeTensorMode | None = None) -> Any:
        """A whole model of transformers without weights, for which the checkpoint has them all.

        Args:
            kind: class with `_from_config`, whose modules are called `model.vision_tower` and so on, as in `prefixes`.
            plan: of the build.
            mode: of the fake parameters, where other modules are to be traced with the same.
        """
        # (What stands under "" is not handed down to the configs below.)
        tower = selection.tower_attention(plan)
        attention = {"": IMPLEMENTATION, "text_config": IMPLEMENTATION, "vision_config": tower}
        options: dict[str, Any] = {"dtype": torch_dtype(plan), "attn_implementation": attention}
        model = hf_config.accepted(
            lambda: fake(lambda: kind._from_config(self.config, **options), mode or fake_mode()),
            self.checkpoint,
        )
        self.check_weights(name.removeprefix("model.") for name in model.state_dict())
        return model

    def check_no_fit(self, recipe: Recipe) -> None:
        """Refuse a recipe that says how images become squares, where they do not.

        Raises:
            RecipeError: it does.
        """
        if recipe.fit is not None:
            raise RecipeError(
                f"has no meaning for {self.row.title}: its images become tiles and not squares",
                subject=f"fit: {recipe.fit}",
                hint="leave fit out",
            )
