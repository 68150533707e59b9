"""The graphs of a model, from the parts that a family brings: names, shapes and dimensions are the same for all of them.

A family brings modules without weights; here they become components: `vision`, `splice`, `embed` and `decoder`, or `prefill` and
`decode` in the place of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.spec import Dim, GraphName, GraphSpec, TensorSpec, float_spec, int64_spec
from gap_export.checkpoint import Checkpoint
from gap_export.modeling import staged
from gap_export.modeling.decoder import Decoder, DecoderHooks
from gap_export.modeling.rope import by_row
from gap_export.modeling.splice import Embed, Splice, SpliceSeveral
from gap_export.plan import Plan
from gap_export.positions import PositionPolicy


@dataclass(frozen=True)
class Component:
    """A piece of a model on its way to becoming a graph.

    Attributes:
        module: takes the spec's inputs, by name unless it takes them all by position (`*past`), and gives its outputs in
            order. An input with `extent_of` reaches it as [extent] int64 counting from 0. Its parameters are fake (shapes
            and types without storage), its buffers real.
        spec: inputs and outputs.
        weight_key: name of a parameter of the module -> key in the checkpoint.
        settings: all that the graph depends on besides the spec and the code: components of equal spec and equal settings
            have the same graph, and it need not be traced again. Plain values (numbers, text, and tuples and dataclasses of
            such), so that they can be told apart in other processes too. By default, equal to no other's.
    """

    module: nn.Module
    spec: GraphSpec
    weight_key: Callable[[str], str]
    settings: Hashable = field(default_factory=object)


@dataclass(frozen=True)
class ModelParts:
    """What a family brings: modules without weights.

    Attributes:
        vision: takes `vision_inputs`, gives visual_embeds [B, K, H], kept_indices [B, K] and, where an adaptive pruner
            finds how many tokens each image keeps, kept_counts [B]. Where images differ in how many tokens they have,
            it takes one image at a time.
        vision_inputs: of the vision graph, without those that any family may have (`text_ids`, `keep_count`).
        language_model: the decoder of transformers, token embeddings included, without its head.
        lm_head: hidden states to logits.
        hooks: what the decoder does otherwise than others.
    """

    vision: nn.Module
    vision_inputs: tuple[TensorSpec, ...]
    language_model: PreTrainedModel
    lm_head: nn.Module
    hooks: DecoderHooks = field(default_factory=DecoderHooks)


def torch_dtype(plan: Plan) -> torch.dtype:
    """Of activations, and of weights before they are quantised."""
    dtype: torch.dtype = getattr(torch, plan.activations.dtype)
    return dtype


def square_images(plan: Plan, size: int) -> TensorSpec:
    """pixel_values [B, 3, size, size] of images that all have one size."""
    return float_spec("pixel_values", "float32", _batch(plan), 3, size, size)


def build_components(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plan: Plan,
    parts: ModelParts,
    *,
    family: str,
    image_token_id: int,
    weight_key: Callable[[str], str],
) -> list[Component]:
    """The components of a model.

    Args:
        checkpoint: to tell its graphs from those of others.
        spec: sizes of the model.
        plan: of the build.
        parts: of the model.
        family: its name: two families may have all else in common.
        image_token_id: id of the placeholder.
        weight_key: name of a parameter of any graph -> key in the checkpoint.
    """
    specs, embedding = _Specs(spec, plan), parts.language_model.get_input_embeddings()
    parts.language_model.rotary_emb = by_row(parts.language_model.rotary_emb)
    graphs: list[tuple[GraphSpec, nn.Module]] = [
        (specs.vision(parts.vision_inputs), parts.vision),
        (specs.splice, _splice(embedding, spec, plan, image_token_id)),
        (specs.embed, Embed(embedding, deepstack_levels=spec.deepstack_levels)),
    ]
    if plan.pruning.stages:
        past, present = specs.cache
        graphs += staged.decoder_graphs(
            parts.language_model,
            parts.lm_head,
            plan,
            embeds=specs.inputs_embeds,
            logits=specs.logits,
            past=past,
            present=present,
        )
    else:
        decoder = Decoder(
            parts.language_model,
            parts.lm_head,
            parts.hooks,
            deepstack_levels=spec.deepstack_levels,
            takes_image_slots=spec.reads_image_slots,
        )
        graphs.append((specs.decoder, decoder))
    depends = _Dependencies(checkpoint, family, spec, plan, embedding, image_token_id)
    return [
        Component(module.eval(), graph, weight_key, settings=depends.of(graph.name))
        for graph, module in graphs
    ]


def _splice(embedding: nn.Embedding, spec: ModelSpec, plan: Plan, image_token_id: int) -> nn.Module:
    placing: dict[str, Any] = {
        "image_token_id": image_token_id,
        "visual_tokens": None if spec.token_range is not None else spec.visual_tokens,
    }
    if plan.pruning.stages:
        return staged.StagedSplice(embedding, plan, **placing)
    kind: Any = SpliceSeveral if plan.images > 1 else Splice
    splice: nn.Module = kind(
        embedding,
        policy=plan.pruning.positions,
        mrope=spec.position_rows == 3,
        deepstack_levels=spec.deepstack_levels,
        gives_image_slots=spec.reads_image_slots,
        **placing,
    )
    return splice


def _batch(plan: Plan) -> Dim:
    return Dim(name="batch", minimum=1, optimum=1, maximum=plan.max_batch)


@dataclass(frozen=True)
class _Specs:
    """What the graphs take and give."""

    model: ModelSpec
    plan: Plan

    @cached_property
    def _differ(self) -> bool:
        """Whether images differ in how many visual tokens they have."""
        return self.model.token_range is not None

    @cached_property
    def _images(self) -> tuple[int | Dim, ...]:
        """Shape of what there is once for every image."""
        batch, plan = _batch(self.plan), self.plan
        return (batch,) if plan.images == 1 else (batch, plan.images)

    @cached_property
    def _ids_rows(self) -> tuple[int, ...]:
        return (3,) if self.model.position_rows == 3 else ()

    def _embeds(self, name: str, extent: int | Dim) -> TensorSpec:
        return float_spec(
            name, self.plan.activations.dtype, _batch(self.plan), extent, self.model.embedding_width
        )

    @cached_property
    def _spliced(self) -> Dim:
        """Slots of a prompt with its visual tokens in place."""
        plan = self.plan
        return Dim(
            name="spliced",
            minimum=plan.images * plan.pruning.min_tokens + 1,
            optimum=plan.spliced(plan.pruning.kept),
            maximum=plan.spliced(plan.pruning.max_tokens),
        )

    @cached_property
    def inputs_embeds(self) -> TensorSpec:
        """Of a prompt with its visual tokens in place."""
        return self._embeds("inputs_embeds", self._spliced)

    @cached_property
    def _image_slots(self) -> tuple[TensorSpec, ...]:
        """What splice gives and the decoder takes where the mask looks at images."""
        if not self.model.reads_image_slots:
            return ()
        return (int64_spec("image_slots", _batch(self.plan), self.plan.images, 2),)

    @cached_property
    def logits(self) -> TensorSpec:
        """Of one row per prompt."""
        return float_spec("logits", "float32", _batch(self.plan), self.model.vocabulary)

    @cached_property
    def cache(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """(past, present): key and value of every layer, with the capacity of the layer's stage."""
        model, batch = self.model, _batch(self.plan)
        shapes = [
            (f"{layer}.{part}", (batch, model.kv_heads, slots, model.head_dim))
            for layer, slots in enumerate(self.plan.cache_layout(model.layers).layer_extents)
            for part in ("key", "value")
        ]
        past, present = (
            [float_spec(f"{when}.{name}", self.plan.activations.dtype, *shape) for name, shape in shapes]
            for when in ("past", "present")
        )
        return past, present

    def _visual(self, extent: int | Dim) -> tuple[TensorSpec, ...]:
        """What vision gives and splice takes, in this order."""
        has_counts = self.plan.pruning.keep_mode == "adaptive" or self._differ
        return (
            self._embeds("visual_embeds", extent),
            int64_spec("kept_indices", _batch(self.plan), extent),
            *((int64_spec("kept_counts", *self._images),) if has_counts else ()),
        )

    def vision(self, inputs: tuple[TensorSpec, ...]) -> GraphSpec:
        """Of the vision graph, whose own inputs the family knows."""
        plan = self.plan
        text = self._expression(1 if self._differ else _batch(plan))
        count = (
            (TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=plan.count_dim),)
            if plan.pruning.count_is_given
            else ()
        )
        kept = self._visual(plan.kept_dim if plan.pruning.count_is_given else plan.pruning.max_tokens)
        return GraphSpec(
            name="vision", inputs=(*inputs, *text, *count), outputs=kept[: 2 if self._differ else None]
        )

    def _expression(self, batch: int | Dim) -> tuple[TensorSpec, ...]:
        if self.plan.text_tower is None:
            return ()
        longest = self.plan.text_tower.context
        tokens = Dim(name="expression", minimum=3, optimum=min(16, longest), maximum=longest)
        return (int64_spec("text_ids", batch, tokens),)

    @cached_property
    def splice(self) -> GraphSpec:
        """Of the splice."""
        plan, batch = self.plan, _batch(self.plan)
        text = Dim(name="text", minimum=1 + plan.images, optimum=plan.max_text, maximum=plan.max_text)
        visual = self._visual(plan.pruning.max_tokens if plan.pruning.keep_mode == "fixed" else plan.row_dim)
        return GraphSpec(
            name="splice",
            inputs=(
                int64_spec("input_ids", batch, text),
                *(
                    given
                    for given in visual
                    # Policies that renumber do not look at which tokens were kept.
                    if given.name != "kept_indices" or plan.pruning.positions is PositionPolicy.GAP
                ),
                *self._unpruned(),
            ),
            outputs=(
                self.inputs_embeds,
                int64_spec("position_ids", *self._ids_rows, batch, self._spliced),
                int64_spec("next_position", batch),
                int64_spec("next_slot", batch),
                *self._image_slots,
                *(staged.splice_outputs(plan, batch) if plan.pruning.stages else ()),
            ),
        )

    def _unpruned(self) -> tuple[TensorSpec, ...]:
        """What splice must know of each unpruned image, where images differ. Policies that renumber need not know it."""
        if not self._differ or self.plan.pruning.positions is not PositionPolicy.GAP:
            return ()
        if self.model.position_rows == 3:
            return (int64_spec("image_grid", *self._images, 2),)
        return (int64_spec("visual_counts", *self._images),)

    @cached_property
    def embed(self) -> GraphSpec:
        """Of the token embedding."""
        text = Dim(name="text", minimum=1, optimum=1, maximum=self.plan.max_text)
        return GraphSpec(
            name="embed",
            inputs=(int64_spec("input_ids", _batch(self.plan), text),),
            outputs=(self._embeds("inputs_embeds", text),),
        )

    @cached_property
    def decoder(self) -> GraphSpec:
        """Of the decoder, for prefill and decode."""
        batch, (past, present) = _batch(self.plan), self.cache
        sequence = Dim(
            name="sequence", minimum=1, optimum=self._spliced.optimum, maximum=self._spliced.maximum
        )
        return GraphSpec(
            name="decoder",
            inputs=(
                self._embeds("inputs_embeds", sequence),
                int64_spec("position_ids", *self._ids_rows, batch, sequence),
                int64_spec("write_index", batch),
                int64_spec("last_index", batch),
                *self._image_slots,
                *past,
            ),
            outputs=(self.logits, *present),
            aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
        )


@dataclass(frozen=True)
class _Dependencies:
    """What a build's graphs depend on, besides the code and the shapes in their specs."""

    checkpoint: Checkpoint
    family: str
    model: ModelSpec
    plan: Plan
    embedding: nn.Module
    image_token_id: int

    def of(self, graph: GraphName) -> Hashable:
        """For `Component.settings`."""
        plan, model, pruning = self.plan, self.model, self.plan.pruning
        if graph == "embed":
            return self._table, model.deepstack_levels
        if graph == "splice":
            visual_tokens = None if model.token_range is not None else model.visual_tokens
            placed = self.image_token_id, visual_tokens, model.position_rows, model.deepstack_levels
            stages = (pruning.kept, *(stage.kept for stage in pruning.stages)) if pruning.stages else ()
            return self._table, placed, model.reads_image_slots, plan.images, pruning.positions, stages
        if graph == "vision":
            return self.checkpoint.fingerprint(), self.family, model, self.image_token_id, self._encoding
        settings = {
            "decoder": (),
            "prefill": self._plan,
            "decode": (pruning.positions is PositionPolicy.GAP, pruning.stages),
        }
        added = model.deepstack_levels, model.reads_image_slots
        return self._reading, self.family, added, settings[graph]

    @cached_property
    def _reading(self) -> str:
        return self.checkpoint.fingerprint(without=("text_tower",))

    @cached_property
    def _table(self) -> Hashable:
        """The token embedding: of a checkpoint, `splice` and `embed` have nothing else."""
        table = self.embedding
        if type(table) is not nn.Embedding:
            return self._reading
        return table.num_embeddings, table.embedding_dim, table.padding_idx, str(table.weight.dtype)

    @cached_property
    def _plan(self) -> Plan:
        """The whole of it; but where a text tower lies is no matter."""
        tower = self.plan.text_tower
        return replace(self.plan, text_tower=tower and tower.model_copy(update={"checkpoint": ""}))

    @cached_property
    def _encoding(self) -> Plan:
        """What a vision tower sees of the plan: nothing of prompts, answers and caches."""
        plan = replace(self._plan, capacity=0, static_cache=False, max_text=0, max_batch=0, images=1)
        keeps_order = plan.pruning.positions.keeps_raster_order
        order = PositionPolicy.GAP if keeps_order else PositionPolicy.PERMUTED
        if plan.pruning.stages:  # what drops tokens later encodes as if nothing did
            return _with_pruning(plan, positions=order, pruner="none", keep=1.0, stages=())
        return _with_pruning(plan, positions=order)


def _with_pruning(plan: Plan, **changes: object) -> Plan:
    return replace(plan, pruning=plan.pruning.model_copy(update=changes))
