"""The graphs of a model, from the pieces that a family puts in: names, shapes and dimensions are the same for all of them.

A family brings hollow modules; here they become components: `vision`, `splice`, `embed` and `decoder`, or `prefill` and `decode`
in the place of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.spec import Component, Dim, GraphName, GraphSpec, TensorSpec
from gap_export.modeling import staged
from gap_export.modeling.decoder import Decoder
from gap_export.modeling.splice import Embed, Splice
from gap_export.modeling.splice_several import SpliceSeveral
from gap_export.plan import Plan
from gap_export.positions import PositionPolicy

BATCH = "batch"


@dataclass(frozen=True)
class Pieces:
    """What a family brings.

    Attributes:
        vision: takes `vision_inputs`, gives visual_embeds [B, K, H], kept_indices [B, K] and, where an adaptive strategy
            finds how many tokens each image keeps, kept_counts [B]. Where images differ in how many tokens they have,
            it takes one image at a time.
        vision_inputs: of the vision graph, without those that any family may have (`text_ids`, `keep_count`).
        language_model: the decoder of transformers, token embeddings included, without its head.
        lm_head: hidden states to logits.
        image_token_id: id of the placeholder.
        weight_key: name of a parameter of any graph -> key in the checkpoint.
    """

    vision: nn.Module
    vision_inputs: tuple[TensorSpec, ...]
    language_model: PreTrainedModel
    lm_head: nn.Module
    image_token_id: int
    weight_key: Callable[[str], str]


def batch_dim(plan: Plan) -> Dim:
    """B."""
    return Dim(name=BATCH, minimum=1, optimum=1, maximum=plan.max_batch)


def torch_dtype(plan: Plan) -> torch.dtype:
    """Of activations, and of weights before they are quantised."""
    dtype: torch.dtype = getattr(torch, plan.activations.dtype)
    return dtype


def components(folder: Path, sizes: ModelSpec, plan: Plan, pieces: Pieces) -> list[Component]:
    """The components of a model.

    Args:
        folder: of the checkpoint, to tell its graphs from those of others.
        sizes: of the model.
        plan: of the build.
        pieces: hollow.
    """
    batch, differ = batch_dim(plan), sizes.token_range is not None

    def whole(name: str, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64", shape=shape)

    def real(name: str, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=plan.activations.dtype, shape=shape)

    longest, usual = plan.spliced(plan.pruning.max_tokens), plan.spliced(plan.pruning.kept)
    text = Dim(name="text", minimum=1 + plan.images, optimum=plan.max_text, maximum=plan.max_text)
    some_text = Dim(name="text", minimum=1, optimum=1, maximum=plan.max_text)
    spliced = Dim(
        name="spliced", minimum=plan.images * plan.pruning.min_tokens + 1, optimum=usual, maximum=longest
    )
    sequence = Dim(name="sequence", minimum=1, optimum=usual, maximum=longest)

    def visual(extent: int | Dim) -> tuple[TensorSpec, ...]:
        """What vision gives and splice takes, in this order."""
        shape = (batch,) if plan.images == 1 else (batch, plan.images)
        counts = (whole("kept_counts", *shape),) if plan.pruning.keep_mode == "adaptive" or differ else ()
        return (
            real("visual_embeds", batch, extent, sizes.embedding_width),
            whole("kept_indices", batch, extent),
            *counts,
        )

    vision = GraphSpec(
        name="vision",
        inputs=(*pieces.vision_inputs, *_expression(plan, 1 if differ else batch), *_keep_count(plan)),
        outputs=visual(plan.kept_dim if plan.pruning.count_is_given else plan.pruning.max_tokens)[
            : 2 if differ else None
        ],
    )

    embeds = real("inputs_embeds", batch, spliced, sizes.embedding_width)
    embedding = pieces.language_model.get_input_embeddings()
    mrope = sizes.position_rows == 3
    ids_rows = (3,) if mrope else ()
    placing: dict[str, Any] = {
        "image_token_id": pieces.image_token_id,
        "visual_tokens": None if differ else sizes.visual_tokens,
    }
    splice = GraphSpec(
        name="splice",
        inputs=(
            whole("input_ids", batch, text),
            *(
                given
                for given in visual(
                    plan.pruning.max_tokens if plan.pruning.keep_mode == "fixed" else plan.row_dim
                )
                # Policies that renumber do not look at which tokens were kept.
                if given.name != "kept_indices" or plan.pruning.positions is PositionPolicy.GAP
            ),
            *_layout(sizes, plan, batch),
        ),
        outputs=(
            embeds,
            whole("position_ids", *ids_rows, batch, spliced),
            whole("next_position", batch),
            whole("next_slot", batch),
            *(staged.splice_outputs(plan, batch) if plan.pruning.stages else ()),
        ),
    )
    if plan.pruning.stages:
        splicer: nn.Module = staged.StagedSplice(embedding, plan, **placing)
    else:
        spliced_by = SpliceSeveral if plan.images > 1 else Splice
        splicer = spliced_by(
            embedding,
            policy=plan.pruning.positions,
            mrope=mrope,
            deepstack_levels=sizes.deepstack_levels,
            **placing,
        )
    embed = GraphSpec(
        name="embed",
        inputs=(whole("input_ids", batch, some_text),),
        outputs=(real("inputs_embeds", batch, some_text, sizes.embedding_width),),
    )

    cache = [
        (f"{layer}.{part}", (batch, sizes.kv_heads, slots, sizes.head_dim))
        for layer, slots in enumerate(plan.layer_capacities(sizes.layers))
        for part in ("key", "value")
    ]
    past = [real(f"past.{name}", *shape) for name, shape in cache]
    present = [real(f"present.{name}", *shape) for name, shape in cache]
    logits = TensorSpec(name="logits", dtype="float32", shape=(batch, sizes.vocabulary))
    parts: list[tuple[GraphSpec, nn.Module]] = [
        (vision, pieces.vision),
        (splice, splicer),
        (embed, Embed(embedding, deepstack_levels=sizes.deepstack_levels)),
    ]
    decoding = (pieces.language_model, pieces.lm_head)
    if plan.pruning.stages:
        parts += staged.decoder_graphs(
            *decoding, plan, embeds=embeds, logits=logits, past=past, present=present
        )
    else:
        decoder = GraphSpec(
            name="decoder",
            inputs=(
                real("inputs_embeds", batch, sequence, sizes.embedding_width),
                whole("position_ids", *ids_rows, batch, sequence),
                whole("write_index", batch),
                whole("last_index", batch),
                *past,
            ),
            outputs=(logits, *present),
            aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
        )
        parts.append((decoder, Decoder(*decoding, deepstack_levels=sizes.deepstack_levels)))
    return [
        Component(
            module=module.eval(),
            spec=spec,
            weight_key=pieces.weight_key,
            settings=(folder, _settings(spec.name, plan)),
        )
        for spec, module in parts
    ]


def _expression(plan: Plan, batch: int | Dim) -> tuple[TensorSpec, ...]:
    if plan.text_tower is None:
        return ()
    longest = plan.text_tower.context
    tokens = Dim(name="expression", minimum=3, optimum=min(16, longest), maximum=longest)
    return (TensorSpec(name="text_ids", dtype="int64", shape=(batch, tokens)),)


def _keep_count(plan: Plan) -> tuple[TensorSpec, ...]:
    if not plan.pruning.count_is_given:
        return ()
    return (TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=plan.count_dim),)


def _layout(sizes: ModelSpec, plan: Plan, batch: Dim) -> tuple[TensorSpec, ...]:
    """What splice must know of each image, where images differ. Policies that renumber need not know it."""
    if sizes.token_range is None or plan.pruning.positions is not PositionPolicy.GAP:
        return ()
    images = (batch,) if plan.images == 1 else (batch, plan.images)
    if sizes.position_rows == 3:
        return (TensorSpec(name="image_grid", dtype="int64", shape=(*images, 2)),)
    return (TensorSpec(name="visual_counts", dtype="int64", shape=images),)


def _settings(graph: GraphName, plan: Plan) -> Hashable:
    """What of the plan a graph depends on, besides the shapes in its spec. The whole plan is always right."""
    if graph in ("embed", "decoder"):
        return None
    if graph == "splice":
        return plan.pruning.positions, tuple(stage.kept for stage in plan.pruning.stages)
    if graph == "prefill":
        return plan
    if graph == "decode":
        return plan.pruning.positions is PositionPolicy.GAP, plan.pruning.stages
    order = PositionPolicy.GAP if plan.pruning.positions.keeps_raster_order else PositionPolicy.PERMUTED
    if plan.pruning.stages:  # what drops tokens later encodes as if nothing did
        return _with_pruning(plan, positions=order, pruner="none", keep=1.0, stages=())
    return _with_pruning(plan, positions=order)


def _with_pruning(plan: Plan, **changes: object) -> Plan:
    return replace(plan, pruning=plan.pruning.model_copy(update=changes))
