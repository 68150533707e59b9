"""Decoders that drop tokens between layers: ids are followed through every choice, and lost ones are found."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from gap_export import prune
from gap_export.linter import Report, lint_graph
from gap_export.positions import PositionPolicy
from tests.exported import SLOWLY_TRACED, GraphExporter

pytestmark = pytest.mark.slow

GAP, SHIFTED, PERMUTED = PositionPolicy.GAP, PositionPolicy.SHIFTED, PositionPolicy.PERMUTED


def lint(model: ir.Model, policy: PositionPolicy = GAP) -> Report:
    return lint_graph(model, kind="decoder", strict=True, policy=policy)


def rules(report: Report) -> set[str]:
    return {finding.rule for finding in report.findings}


def producer(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node of a kind that a value comes from, along first operands."""
    while value is not None:
        node = value.producer()
        assert node is not None
        if node.op_type == op_type:
            return node
        value = node.inputs[0]
    raise AssertionError(f"no {op_type}")


def gathers_of_ids(model: ir.Model) -> list[ir.Node]:
    """The choices that position ids go through, in order."""
    current, found = [v for v in model.graph.inputs if v.name == "position_ids"], []
    for node in model.graph:
        if node.op_type != "GatherElements" or node.inputs[0] not in current:
            continue
        shape = node.outputs[0].shape
        if shape is not None and shape[-1] != 1:  # not the id of a single row that decides
            found.append(node)
            current.append(node.outputs[0])
    return found


@pytest.mark.parametrize(
    ("pruner", "policy"),
    [
        pytest.param(pruner, policy, marks=pytest.mark.long if (pruner, policy) in SLOWLY_TRACED else ())
        for pruner in prune.names(in_decoder=True)
        for policy in PositionPolicy
    ],
)
def test_both_graphs_carry_what_their_policy_says(
    pruner: str, policy: PositionPolicy, deep_graph: GraphExporter
) -> None:
    for name in ("prefill", "decode"):
        report = lint(ir.load(deep_graph(name, pruner=pruner, positions=policy).path), policy)
        assert report.findings == ()
        assert report.verdict.survives
        assert report.attention_layers == 4
        assert ("all 4 attention layers" in report.verdict.reason) == (policy is GAP)


@pytest.mark.parametrize("pruner", ["fastv", pytest.param("pyramiddrop", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_renumbered_stages_do_not_pass_for_gap(name: str, pruner: str, deep_graph: GraphExporter) -> None:
    report = lint(ir.load(deep_graph(name, pruner=pruner, positions=SHIFTED).path))
    assert not report.verdict.survives
    assert "rope-reads-position-ids" in rules(report)


def test_only_later_stages_may_renumber(deep_graph: GraphExporter) -> None:
    """Under a policy that renumbers, an id must still reach the layers it is read in."""
    model = ir.load(deep_graph("decode", pruner="fastv", positions=SHIFTED).path)
    (ids,) = (v for v in model.graph.inputs if v.name == "position_ids")
    (other,) = (v for v in model.graph.inputs if v.name == "write_index")
    wide = ir.node("Unsqueeze", [other, ir.Value(name="axis")])
    (axis,) = (ir.node("Constant", [], {"value": ir.tensor([1], dtype=ir.DataType.INT64)}) for _ in range(1))
    wide.replace_input_with(1, axis.outputs[0])
    first = next(iter(model.graph))
    model.graph.insert_before(first, [axis, wide])
    for use in list(ids.uses()):
        use.node.replace_input_with(use.idx, wide.outputs[0])
    report = lint(model, SHIFTED)
    assert "every-input-used" in rules(report)
    assert report.errors


def test_ids_gathered_with_another_index_are_found(deep_graph: GraphExporter) -> None:
    model = ir.load(deep_graph("prefill", pruner="pyramiddrop", positions=GAP).path)
    choices = gathers_of_ids(model)
    assert len(choices) == 3
    index = choices[0].inputs[1]
    shifted = ir.node("Add", [index, index])
    model.graph.insert_before(choices[0], shifted)
    choices[0].replace_input_with(1, shifted.outputs[0])
    report = lint(model)
    assert not report.verdict.survives
    assert "ids-follow-survivors" in rules(report)
    assert "another index" in report.verdict.reason


def test_ids_that_are_counted_again_are_found(deep_graph: GraphExporter) -> None:
    """A later stage that counts 0.. while the others keep their ids."""
    model = ir.load(deep_graph("prefill", pruner="fastv", positions=GAP).path)
    (choice,) = gathers_of_ids(model)
    running = ir.node("CumSum", [choice.inputs[1], next(v for v in model.graph.initializers.values() if v.const_value.size == 1 and v.const_value.dtype == ir.DataType.INT64 and v.const_value.numpy().item() == 1)])  # fmt: skip
    model.graph.insert_before(choice, running)
    for use in list(choice.outputs[0].uses()):
        use.node.replace_input_with(use.idx, running.outputs[0])
    report = lint(model)
    assert not report.verdict.survives


def test_indices_that_are_not_those_of_the_choice_are_found(deep_graph: GraphExporter) -> None:
    model = ir.load(deep_graph("prefill", pruner="fastv", positions=GAP).path)
    (kept,) = (v for v in model.graph.outputs if v.name == "kept_slots.1")
    maker = kept.producer()
    assert maker is not None
    assert maker.op_type == "GatherElements"
    places = maker.inputs[1]
    other = ir.node("Abs", [places])
    model.graph.insert_before(maker, other)
    maker.replace_input_with(1, other.outputs[0])
    report = lint(model)
    assert not report.verdict.survives
    assert {finding.node for finding in report.findings} == {"kept_slots.1"}


def test_score_order_is_found_where_raster_order_is_the_policy(deep_graph: GraphExporter) -> None:
    model = ir.load(deep_graph("prefill", pruner="fastv", positions=PERMUTED).path)
    assert not lint(model, PERMUTED).findings
    assert "ids-follow-survivors" in rules(lint(model, SHIFTED))
