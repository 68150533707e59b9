"""A splice by itself, as a file: no model around it, a small table of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.graph import passes, trace
from gap_export.modeling.components import Component
from gap_export.positions import PositionPolicy


def splice_spec(
    policy: PositionPolicy, *, mrope: bool, hidden: int, per_prompt: tuple[int, ...] = ()
) -> GraphSpec:
    """The splice of images that differ in size.

    Args:
        policy: how survivors are numbered.
        mrope: three rows of ids.
        hidden: width of all that belongs to a token.
        per_prompt: (images,) where a prompt has several.
    """
    batch, text = (
        Dim(name="batch", minimum=1, optimum=2, maximum=4),
        Dim(name="text", minimum=1 + max(per_prompt, default=1), optimum=6, maximum=9),
    )
    kept = Dim(name="kept", minimum=max(per_prompt, default=1), optimum=4, maximum=8)
    spliced = Dim(name="spliced", minimum=2, optimum=8, maximum=16)

    def whole(name: str, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64", shape=shape)

    def real(name: str, tokens: Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(batch, tokens, hidden))

    keeps_ids = policy is PositionPolicy.GAP
    layout = (
        whole("image_grid", batch, *per_prompt, 2) if mrope else whole("visual_counts", batch, *per_prompt)
    )
    return GraphSpec(
        name="splice",
        inputs=(
            whole("input_ids", batch, text),
            real("visual_embeds", kept),
            *((whole("kept_indices", batch, kept),) if keeps_ids else ()),
            whole("kept_counts", batch, *per_prompt),
            *((layout,) if keeps_ids else ()),
        ),
        outputs=(
            real("inputs_embeds", spliced),
            whole("position_ids", *((3,) if mrope else ()), batch, spliced),
            whole("next_position", batch),
            whole("next_slot", batch),
        ),
    )


def write_splice(splice: nn.Module, spec: GraphSpec, table: Any, folder: Path) -> Path:
    """Trace a fake splice, give it a table, write it.

    Args:
        splice: over a fake embedding.
        spec: of its graph.
        table: [vocabulary, H] float32.
        folder: to write into.
    """
    component = Component(module=splice.eval(), spec=spec, weight_key=lambda name: name)
    model = trace.graph_from_component(component)
    for name, value in model.graph.initializers.items():
        if trace.is_fake(value.const_value):
            value.const_value = ir.tensor(table, name=name)
    passes.simplify(model)
    path = folder / "splice.onnx"
    passes.write_graph(model, spec, path)
    return path
