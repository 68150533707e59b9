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

from gap_export.bundle import vision_inputs
from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.spec import Dim, GraphName, GraphSpec, TensorSpec
from gap_export.checkpoint import Checkpoint
from gap_export.modeling import staged
from gap_export.modeling.decoder import Decoder, DecoderHooks
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.rope import by_row
from gap_export.modeling.splice import Embed, Splice, SpliceSeveral, StagedSplice, StagedSpliceSeveral
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
        layers: of the module, which may be alike; whether they are is found out before any is left out of a trace.
    """

    module: nn.Module
    spec: GraphSpec
    weight_key: Callable[[str], str]
    settings: Hashable = field(default_factory=object)
    layers: LayerStack | None = None


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
        vision_layers: of the vision tower, where it calls them one after another.
    """

    vision: nn.Module
    vision_inputs: tuple[TensorSpec, ...]
    language_model: PreTrainedModel
    lm_head: nn.Module
    hooks: DecoderHooks = field(default_factory=DecoderHooks)
    vision_layers: LayerStack | None = None


def torch_dtype(plan: Plan) -> torch.dtype:
    """Of activations, and of weights before they are quantised."""
    dtype: torch.dtype = getattr(torch, plan.activations.dtype)
    return dtype


def square_images(plan: Plan, size: int) -> TensorSpec:
    """pixel_values [B, 3, size, size] of images that all have one size."""
    return vision_inputs.square_images(size, Dim(name="batch", minimum=1, optimum=1, maximum=plan.max_batch))


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
    specs, embedding = plan.graph_specs(spec), parts.language_model.get_input_embeddings()
    parts.language_model.rotary_emb = by_row(parts.language_model.rotary_emb)
    graphs: list[tuple[GraphSpec, nn.Module]] = [
        (specs.vision(parts.vision_inputs), parts.vision),
        (specs.splice, _splice(embedding, spec, plan, image_token_id)),
        (specs.embed, Embed(embedding, deepstack_levels=spec.deepstack_levels)),
    ]
    if plan.pruning.stages:
        modules = staged.decoder_modules(
            parts.language_model, parts.lm_head, plan, deepstack_levels=spec.deepstack_levels
        )
        graphs += zip((specs.prefill, specs.decode), modules, strict=True)
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
    decoder_layers = _decoder_layers(spec, plan)
    stacks: dict[GraphName, LayerStack | None] = {
        "vision": parts.vision_layers,
        "decoder": decoder_layers,
        "prefill": decoder_layers,
        "decode": decoder_layers,
    }
    return [
        Component(
            module.eval(),
            graph,
            weight_key,
            settings=depends.of(graph.name),
            layers=stacks.get(graph.name),
        )
        for graph, module in graphs
    ]


def _decoder_layers(spec: ModelSpec, plan: Plan) -> LayerStack:
    """In runs, between which tokens are dropped; without the layers behind which DeepStack adds something."""
    stages = tuple(stage.run for stage in plan.pruning.stages) or (range(spec.layers),)
    alike = (range(max(run.start, spec.deepstack_levels), run.stop) for run in stages)
    return LayerStack("language_model.layers", tuple(run for run in alike if run))


def _splice(embedding: nn.Embedding, spec: ModelSpec, plan: Plan, image_token_id: int) -> nn.Module:
    pruning = plan.pruning
    options: dict[str, Any] = {
        "image_token_id": image_token_id,
        "visual_tokens": None if spec.token_range is not None else spec.visual_tokens,
        "policy": pruning.positions,
        "mrope": spec.position_rows == 3,
        "deepstack_levels": spec.deepstack_levels,
    }
    kind: Any
    if pruning.stages:
        kind = StagedSpliceSeveral if plan.images > 1 else StagedSplice
        options["gives_image_slots"] = True
        if plan.images == 1:
            dropped = tuple(pruning.kept - stage.kept for stage in pruning.stages[1:])
            options["dropped"] = None if pruning.stage_counts_are_told else dropped
    else:
        kind = SpliceSeveral if plan.images > 1 else Splice
        options["gives_image_slots"] = spec.reads_image_slots
    splice: nn.Module = kind(embedding, **options)
    return splice


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
            told = pruning.stage_counts_are_told
            stages = told, *(pruning.kept - stage.kept for stage in pruning.stages if not told)
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
            mode = plan.pruning.keep_mode if plan.pruning.count_is_given else "fixed"
            mode = "ratio" if mode == "dynamic" else mode
            return _with_pruning(
                plan,
                positions=PositionPolicy.GAP,
                pruner="none",
                keep=1.0,
                keep_mode=mode,
                keep_range=None,
                stages=(),
            )
        return _with_pruning(plan, positions=order)


def _with_pruning(plan: Plan, **changes: object) -> Plan:
    return replace(plan, pruning=plan.pruning.model_copy(update=changes))
