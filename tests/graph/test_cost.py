"""Operations counted in graphs, against sums written out by hand and against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel, LlamaConfig, LlavaForConditionalGeneration

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Graph
from gap_export.graph.cost import flops_of, weight_bytes_of
from tests.exported import GraphExporter


def evaluated(graph: Graph, **dims: int) -> int:
    return sum(term.factor * int(np.prod([dims[name] for name in term.dims])) for term in graph.flops)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 24), (3, 7)])
def test_the_decoder(tiny_graph: GraphExporter, tiny_checkpoint: Path, batch: int, sequence: int) -> None:
    """Every product of a Llama layer, attention over the whole cache; of the last layer keys and values, and one token of the rest."""
    decoder, capacity = tiny_graph("decoder"), 48
    model = decoder.model.spec
    config = LlamaConfig(
        **LlavaForConditionalGeneration.config_class.from_pretrained(tiny_checkpoint).text_config.to_dict()
    )
    width, inner = config.hidden_size, config.intermediate_size
    grouped = model.kv_heads * model.head_dim
    per_token = 2 * (2 * width * width + 2 * width * grouped + 3 * width * inner)
    attention = 4 * model.attention_heads * model.head_dim * capacity
    keys_and_values = 2 * 2 * width * grouped
    last = sequence * keys_and_values + per_token - keys_and_values + attention
    expected = sequence * (model.layers - 1) * (per_token + attention) + last + 2 * width * model.vocabulary
    dims = {"batch": batch, "sequence": sequence, "capacity": capacity}
    assert evaluated(decoder.graph, **dims) == batch * expected


def test_the_tower(tiny_graph: GraphExporter, tiny_checkpoint: Path) -> None:
    """PyTorch counts what its own model does; ours skips what no layer above the feature layer needs, and adds a projector.

    Of the feature layer itself, only keys and values are computed for patches that are dropped.
    """
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    tower: CLIPVisionModel = whole.model.vision_tower
    layers = tower.vision_model.encoder.layers if hasattr(tower, "vision_model") else tower.encoder.layers
    removed = len(layers) - 2  # the feature layer is the last but one
    pixels = torch.zeros(1, 3, 36, 36)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    everything = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layers[-1](hidden, attention_mask=None)
    last = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole.model.multi_modal_projector(hidden[:, 1:10])
    projector = counter.get_total_flops()
    assert removed == 1
    graph = tiny_graph("vision", pruner="spatial").graph
    (kept, slots), width, inner = (9, 37), tower.config.hidden_size, tower.config.intermediate_size
    dropped = (slots - kept) * (2 * (2 * width * width + 2 * width * inner) + 4 * slots * width)
    assert evaluated(graph, batch=1) == everything - last + projector - dropped
    attending = tiny_graph("vision").graph
    extra = evaluated(attending, batch=1) - evaluated(graph, batch=1)
    assert 0 < extra < 0.05 * everything, "one row of attention, once more"


def test_weights_are_counted_once(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle()
    for name, graph in bundle.manifest.graphs.items():
        model = ir.load(bundle.graph_path(name))
        assert graph.weight_bytes == weight_bytes_of(model)
    table = bundle.manifest.spec.vocabulary * bundle.manifest.spec.hidden_size * 4
    assert bundle.manifest.graphs["embed"].weight_bytes == pytest.approx(table, rel=0.02)


def product(left: Any, right: Any, op: str = "MatMul", **attributes: Any) -> ir.Model:
    values = [
        ir.Value(
            name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        for name, shape in (("left", left), ("right", right))
    ]
    node = ir.node(op, values, attributes)
    return ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)


def test_formulas() -> None:
    (term,) = flops_of(product(["b", 5, "s"], ["s", 7]))
    assert (term.factor, term.dims) == (2 * 5 * 7, ("b", "s"))
    (term,) = flops_of(product(["b", 4], [7, 4], "Gemm", transB=1))
    assert (term.factor, term.dims) == (2 * 4 * 7, ("b",))
    (term,) = flops_of(product(["s", "s"], ["s", "s"]))
    assert (term.factor, term.dims) == (2, ("s", "s", "s"))


def test_what_is_not_known_is_not_counted() -> None:
    assert flops_of(product(None, [4, 7])) == ()
    assert flops_of(product([None, 4], [4, 7])) == ()
