"""What the graphs of a model take and give: it follows from the sizes of the model and of the build, for all families alike.

A build traces graphs to these specs. A manifest's specs are held against them (`check.py`), so that it cannot contradict itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gap_export.bundle.cache_layout import CacheLayout
from gap_export.bundle.manifest import ModelSpec, Pruning
from gap_export.bundle.spec import Dim, DType, GraphName, GraphSpec, TensorSpec, float_spec, int64_spec
from gap_export.inputs.prompt import TextTower
from gap_export.positions import PositionPolicy


@dataclass(frozen=True)
class GraphSpecs:
    """The specs of all graphs.

    Attributes:
        model: sizes of the model.
        dtype: element type of activations and of the cache.
        pruning: what is pruned.
        text_tower: of pruners that look at the expression.
        cache: of the decoder.
        max_text: text tokens of the longest prompt, placeholders included.
        max_batch: most rows per call.
        images: I, images in one prompt; all other numbers of visual tokens are those of one image.
    """

    model: ModelSpec
    dtype: DType
    pruning: Pruning
    text_tower: TextTower | None
    cache: CacheLayout
    max_text: int
    max_batch: int
    images: int = 1

    def graphs(self, image_inputs: tuple[TensorSpec, ...]) -> dict[GraphName, GraphSpec]:
        """Of every graph, in the order in which they run.

        Args:
            image_inputs: what the vision graph takes of an image.
        """
        decoders = (self.prefill, self.decode) if self.pruning.stages else (self.decoder,)
        graphs = (self.vision(image_inputs), self.splice, self.embed, *decoders)
        return {graph.name: graph for graph in graphs}

    # Dimensions

    @cached_property
    def batch(self) -> Dim:
        """B."""
        return Dim(name="batch", minimum=1, optimum=1, maximum=self.max_batch)

    @cached_property
    def kept_dim(self) -> Dim:
        """K as a dimension that varies between calls."""
        pruning = self.pruning
        return Dim(name="kept", minimum=pruning.min_tokens, optimum=pruning.kept, maximum=pruning.max_tokens)

    @cached_property
    def row_dim(self) -> Dim:
        """Visual tokens of a prompt, all images together, as a dimension that varies between calls."""
        one, images = self.kept_dim, self.images
        if images == 1:
            return one
        return Dim(
            name="row",
            minimum=one.minimum * images,
            optimum=one.optimum * images,
            maximum=one.maximum * images,
        )

    @cached_property
    def count_dim(self) -> Dim:
        """What calls of the vision graph are told: K without the tokens that are never pruned."""
        kept, never = self.kept_dim, self.model.token_range.never_pruned if self.model.token_range else 0
        if not never:
            return kept
        return Dim(
            name="chosen",
            minimum=kept.minimum,
            optimum=max(kept.minimum, kept.optimum - never),
            maximum=kept.maximum - never,
        )

    @cached_property
    def spliced(self) -> Dim:
        """S: slots of a prompt with its visual tokens in place."""
        text, pruning = self.max_text - self.images, self.pruning
        return Dim(
            name="spliced",
            minimum=self.images * pruning.min_tokens + 1,
            optimum=text + self.images * pruning.kept,
            maximum=text + self.images * pruning.max_tokens,
        )

    def stage_dim(self, number: int) -> Dim:
        """Slots of a prompt in a later stage."""
        stage, text = self.pruning.stages[number], self.max_text - self.images
        least = 1 if self.pruning.stage_counts_are_told else stage.kept
        return Dim(
            name=f"stage_{number}",
            minimum=self.images * least + 1,
            optimum=text + self.images * stage.kept,
            maximum=text + self.images * stage.max_kept,
        )

    # Graphs

    def vision(self, image_inputs: tuple[TensorSpec, ...]) -> GraphSpec:
        """Of the vision graph; arguments as of `graphs`."""
        text = self._expression(1 if self._differ else self.batch)
        count = (
            (TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=self.count_dim),)
            if self.pruning.count_is_given
            else ()
        )
        kept = self._visual(self.kept_dim if self.pruning.count_is_given else self.pruning.max_tokens)
        found = (int64_spec("kept_counts", 1 if self._differ else self.batch),)
        return GraphSpec(
            name="vision",
            inputs=(*image_inputs, *text, *count),
            outputs=(*kept[:2], *(found if self.pruning.finds_count else ())),
        )

    @cached_property
    def splice(self) -> GraphSpec:
        """Of the splice."""
        text = Dim(name="text", minimum=1 + self.images, optimum=self.max_text, maximum=self.max_text)
        one_count = self.pruning.keep_mode == "fixed" or self.pruning.enters_whole
        visual = self._visual(self.pruning.max_tokens if one_count else self.row_dim)
        return GraphSpec(
            name="splice",
            inputs=(
                int64_spec("input_ids", self.batch, text),
                *(
                    given
                    for given in visual
                    # Policies that renumber do not look at which tokens were kept.
                    if given.name != "kept_indices" or self.pruning.positions is PositionPolicy.GAP
                ),
                *self._unpruned(),
                *self._stage_counts,
            ),
            outputs=(
                self._inputs_embeds,
                int64_spec("position_ids", *self._ids_rows, self.batch, self.spliced),
                int64_spec("next_position", self.batch),
                int64_spec("next_slot", self.batch),
                *self._image_slots,
                *(int64_spec(f"next_slot.{number}", self.batch) for number in self._later_stages),
            ),
        )

    @cached_property
    def embed(self) -> GraphSpec:
        """Of the token embedding."""
        text = Dim(name="text", minimum=1, optimum=1, maximum=self.max_text)
        return GraphSpec(
            name="embed",
            inputs=(int64_spec("input_ids", self.batch, text),),
            outputs=(self._embeds("inputs_embeds", text),),
        )

    @cached_property
    def decoder(self) -> GraphSpec:
        """Of the decoder, for prefill and decode."""
        past, present = self._cached
        spliced = self.spliced
        sequence = Dim(name="sequence", minimum=1, optimum=spliced.optimum, maximum=spliced.maximum)
        return GraphSpec(
            name="decoder",
            inputs=(
                self._embeds("inputs_embeds", sequence),
                int64_spec("position_ids", *self._ids_rows, self.batch, sequence),
                int64_spec("write_index", self.batch),
                int64_spec("last_index", self.batch),
                *self._image_slots,
                *past,
            ),
            outputs=(self._logits, *present),
            aliased=self._aliased,
        )

    @cached_property
    def prefill(self) -> GraphSpec:
        """Of a decoder that drops tokens between its layers, for the prompt."""
        past, present = self._cached
        return GraphSpec(
            name="prefill",
            inputs=(
                self._inputs_embeds,
                int64_spec("position_ids", *self._ids_rows, self.batch, self.spliced),
                int64_spec("last_index", self.batch),
                *self._image_slots,
                *self._stage_counts,
                *self._stage_slots,
                *past,
            ),
            outputs=(
                self._logits,
                *(
                    int64_spec(f"kept_slots.{number}", self.batch, self.stage_dim(number))
                    for number in self._later_stages
                ),
                *present,
            ),
            aliased=self._aliased,
        )

    @cached_property
    def decode(self) -> GraphSpec:
        """Of the same decoder, for single tokens."""
        past, present = self._cached
        return GraphSpec(
            name="decode",
            inputs=(
                self._embeds("inputs_embeds", 1),
                int64_spec("position_ids", *self._ids_rows, self.batch, 1),
                int64_spec("write_index", self.batch),
                *(int64_spec(f"write_index.{number}", self.batch) for number in self._later_stages),
                *past,
            ),
            outputs=(self._logits, *present),
            aliased=self._aliased,
        )

    # What several graphs have

    @cached_property
    def _differ(self) -> bool:
        """Whether images differ in how many visual tokens they have."""
        return self.model.token_range is not None

    @cached_property
    def _per_image(self) -> tuple[int | Dim, ...]:
        """Shape of what there is once for every image."""
        return (self.batch,) if self.images == 1 else (self.batch, self.images)

    @cached_property
    def _ids_rows(self) -> tuple[int, ...]:
        return (3,) if self.model.position_rows == 3 else ()

    @cached_property
    def _later_stages(self) -> range:
        return range(1, len(self.pruning.stages))

    @cached_property
    def _inputs_embeds(self) -> TensorSpec:
        """Of a prompt with its visual tokens in place."""
        return self._embeds("inputs_embeds", self.spliced)

    @cached_property
    def _logits(self) -> TensorSpec:
        """Of one row per prompt."""
        return float_spec("logits", "float32", self.batch, self.model.vocabulary)

    @cached_property
    def _image_slots(self) -> tuple[TensorSpec, ...]:
        """What splice gives and the decoder takes where the mask looks at images, or tokens of them are dropped inside it."""
        if not self.model.reads_image_slots and not self.pruning.stages:
            return ()
        return (int64_spec("image_slots", self.batch, self.images, 2),)

    @cached_property
    def _stage_counts(self) -> tuple[TensorSpec, ...]:
        """Visual tokens of every image in every later stage, where counts are told."""
        if not self.pruning.stage_counts_are_told:
            return ()
        return (int64_spec("stage_counts", self.batch, self.images, len(self._later_stages)),)

    @cached_property
    def _stage_slots(self) -> tuple[TensorSpec, ...]:
        """Tokens of the longest row in every later stage; the same."""
        if not self.pruning.stage_counts_are_told:
            return ()
        return tuple(
            TensorSpec(
                name=f"stage_slots.{number}", dtype="int64", shape=(), extent_of=self.stage_dim(number)
            )
            for number in self._later_stages
        )

    @cached_property
    def _cached(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """(past, present): key and value of every layer, with the capacity of the layer's stage."""
        model = self.model
        shapes = [
            (f"{layer}.{part}", (self.batch, model.kv_heads, slots, model.head_dim))
            for layer, slots in enumerate(self.cache.layer_extents)
            for part in ("key", "value")
        ]
        past, present = (
            [float_spec(f"{when}.{name}", self.dtype, *shape) for name, shape in shapes]
            for when in ("past", "present")
        )
        return past, present

    @cached_property
    def _aliased(self) -> dict[str, str]:
        return {present.name: past.name for past, present in zip(*self._cached, strict=True)}

    def _embeds(self, name: str, extent: int | Dim) -> TensorSpec:
        return float_spec(name, self.dtype, self.batch, extent, self.model.embedding_width)

    def _visual(self, extent: int | Dim) -> tuple[TensorSpec, ...]:
        """What vision gives and splice takes, in this order."""
        has_counts = self.pruning.finds_count or self._differ
        return (
            self._embeds("visual_embeds", extent),
            int64_spec("kept_indices", self.batch, extent),
            *((int64_spec("kept_counts", *self._per_image),) if has_counts else ()),
        )

    def _expression(self, batch: int | Dim) -> tuple[TensorSpec, ...]:
        if self.text_tower is None:
            return ()
        longest = self.text_tower.context
        shortest = 3 if self.text_tower.kind == "clip" else 1  # what begins and what ends it, and a word
        tokens = Dim(name="expression", minimum=shortest, optimum=min(16, longest), maximum=longest)
        return (int64_spec("text_ids", batch, tokens),)

    def _unpruned(self) -> tuple[TensorSpec, ...]:
        """What splice must know of each unpruned image, where images differ. Policies that renumber need not know it."""
        if not self._differ or self.pruning.positions is not PositionPolicy.GAP:
            return ()
        if self.model.position_rows == 3:
            return (int64_spec("image_grid", *self._per_image, 2),)
        return (int64_spec("visual_counts", *self._per_image),)
