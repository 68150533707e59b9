"""The verdict on graphs that torch really exports, and on our own bundle, broken in one place at a time."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gap_export.linter import lint_graph
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import load_recipe

pytestmark = pytest.mark.slow

LAYERS, HIDDEN, HEAD = 2, 32, 8


class Traced(nn.Module):
    """A tiny Llama, called in one of the ways in which people export it."""

    def __init__(self, way: str, attention: str) -> None:
        super().__init__()
        self.way = way
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            attn_implementation=attention,
        )
        self.model = LlamaForCausalLM(config).eval()

    def forward(
        self, embeds: Tensor, other: Tensor, mask: Tensor | None = None, *past: Tensor
    ) -> tuple[Tensor, ...]:
        if self.way == "no mask":
            return (self.model(inputs_embeds=embeds, position_ids=other, use_cache=False).logits,)
        if self.way == "ones":
            ones = torch.ones(embeds.shape[:2], dtype=torch.int64)
            return (
                self.model(
                    inputs_embeds=embeds, position_ids=other, attention_mask=ones, use_cache=False
                ).logits,
            )
        if self.way == "no ids":
            return (self.model(inputs_embeds=embeds, attention_mask=other, use_cache=False).logits,)
        if self.way == "cumsum":
            ids = (other.cumsum(-1) - 1).clamp(min=0)
            return (
                self.model(
                    inputs_embeds=embeds, position_ids=ids, attention_mask=other, use_cache=False
                ).logits,
            )
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(inputs_embeds=embeds, position_ids=other, attention_mask=mask, past_key_values=cache)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def exported(way: str, opset: int, attention: str) -> ir.Model:
    auto = torch.export.Dim.AUTO
    second = "attention_mask" if way in ("no ids", "cumsum") else "position_ids"
    inputs: list[Tensor] = [torch.randn(1, 6, HIDDEN), torch.arange(6)[None]]
    names, outputs = ["inputs_embeds", second], ["logits"]
    shapes: list[object] = [{1: auto}, {1: auto}]
    past: list[Tensor] = []
    if way == "cache":
        inputs.append(torch.ones(1, 11, dtype=torch.int64))
        past = [torch.randn(1, 2, 5, HEAD) for _ in range(2 * LAYERS)]
        kinds = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
        names += ["attention_mask", *(f"past_key_values.{kind}" for kind in kinds)]
        outputs += [f"present.{kind}" for kind in kinds]
        shapes += [{1: auto}, tuple({2: auto} for _ in past)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Traced(way, attention),
            (*inputs, *past),
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert program is not None
    return program.model


@pytest.mark.parametrize(
    ("way", "opset", "attention", "survives", "words"),
    [
        ("no mask", 23, "sdpa", False, "mask"),
        ("ones", 24, "sdpa", True, "all 2 attention layers"),
        ("ones", 18, "eager", True, "all 2 attention layers"),
        ("cache", 24, "sdpa", True, "all 2 attention layers"),
        ("no ids", 24, "sdpa", False, "counted by Range"),
        ("cumsum", 23, "sdpa", False, "counted by CumSum over attention_mask"),
    ],
)
def test_ways_of_exporting_llama(way: str, opset: int, attention: str, survives: bool, words: str) -> None:
    report = lint_graph(exported(way, opset, attention))
    assert report.attention_layers == LAYERS
    assert report.verdict.survives == survives, report.verdict.reason
    assert words in report.verdict.reason
    if way == "no mask":
        assert {f.rule for f in report.errors} == {"mask-follows-slots"}
    if way == "cache":
        assert {f.rule for f in report.findings} == {"cache-in-place"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lint") / "bundle"
    build(load_recipe("shapes"), out, golden=False)
    return out


@pytest.mark.parametrize("name", ["vision", "splice", "embed", "decoder"])
def test_our_own_graphs_pass_and_are_recognised(bundle: Path, name: str) -> None:
    report = lint_graph(bundle / f"{name}.onnx", strict=True)
    assert (report.kind, report.findings) == (name, ())
    assert report.verdict.survives


def only(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def test_our_decoder_with_its_ids_counted_is_caught(bundle: Path) -> None:
    model = ir.load(bundle / "decoder.onnx")
    ids = next(v for v in model.graph.inputs if v.name == "position_ids")
    readers = [use for use in ids.uses() if use.node.op_type != "Shape"]
    axis = ir.node("Constant", [], attributes={"value_int": 1})
    one = ir.node("Constant", [], attributes={"value_int": 1})
    ones = ir.node("Sub", [ids, ids])
    counted = ir.node("Add", [ones.outputs[0], one.outputs[0]])
    summed = ir.node("CumSum", [counted.outputs[0], axis.outputs[0]])
    nodes = [axis, one, ones, counted, summed]
    for node in nodes:
        node.outputs[0].name = f"counted_{node.op_type}_{id(node)}"
    model.graph.insert_before(model.graph[0], nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, summed.outputs[0])
    report = lint_graph(model, strict=True)
    assert not report.verdict.survives
    assert {f.rule for f in report.errors} == {"rope-reads-position-ids"}


def test_our_decoder_with_one_causal_flag_is_caught(bundle: Path) -> None:
    model = ir.load(bundle / "decoder.onnx")
    only(model, "Attention").attributes.add(ir.AttrInt64("is_causal", 1))
    report = lint_graph(model, strict=True)
    assert [(f.rule, f.count) for f in report.errors] == [("no-causal-flag-with-cache", 1)]


def test_our_decoder_writing_one_layer_at_its_ids_is_caught(bundle: Path) -> None:
    model = ir.load(bundle / "decoder.onnx")
    ids = next(v for v in model.graph.inputs if v.name == "position_ids")
    least = ir.node("ReduceMax", [ids, None], attributes={"keepdims": 0, "noop_with_empty_axes": 0})
    least.outputs[0].name = "slot_from_ids"
    scatter = only(model, "TensorScatter")
    model.graph.insert_before(scatter, least)
    scatter.replace_input_with(2, least.outputs[0])
    report = lint_graph(model, strict=True)
    assert not report.verdict.survives
    assert {f.rule for f in report.errors} == {"cache-follows-slots"}


def test_our_vision_graph_without_its_sort_is_caught(bundle: Path) -> None:
    model = ir.load(bundle / "vision.onnx")
    picks, sorts = (n for n in model.graph if n.op_type == "TopK")
    sorts.outputs[0].replace_all_uses_with(picks.outputs[1], replace_graph_outputs=True)
    sorts.outputs[0].name, picks.outputs[1].name = "sorted_indices", "kept_indices"
    report = lint_graph(model, strict=True)
    assert not report.verdict.survives
    assert "in score order" in report.verdict.reason
