"""Layers that are copied in the place of being traced: the graph is that of the whole trace, or the whole trace is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from gap_export.graph import trace
from gap_export.graph.trace_cache import Tracer
from gap_export.graph.trace_folder import TraceFolder
from gap_export.modeling.components import Component
from gap_export.modeling.layers import LayerStack, Unlike, check_alike
from tests.graph.stacks import LAYERS, WIDTH, Layer, Stack, component
from tests.graph.traced import traced

Change = Callable[[Stack], None]
COPIED = "3 layers are copies of others"


def check(made: Component) -> None:
    """What is done before a trace that leaves layers out."""
    args, kwargs, _ = trace._arguments(made)
    names = [tensor.name for tensor in made.spec.inputs]
    inputs = dict(zip(names, (*args, *kwargs.values()), strict=True))
    assert made.layers is not None
    check_alike(made.module, made.layers, lambda: made.module(*args, **kwargs), inputs)


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The graph of the stack as it is, every layer traced."""
    graph, how, told = traced(component(), whole=True)
    assert how == "whole"
    assert not told
    return graph


def test_layers_that_are_alike_are_copied(whole: bytes) -> None:
    """And the module is then as it was."""
    made = component()
    before = list(made.module.layers)
    graph, how, told = traced(made)
    assert how == COPIED
    assert not told
    assert graph == whole
    assert list(made.module.layers) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in before)


@pytest.mark.long
@pytest.mark.parametrize(
    ("runs", "how"),
    [
        ((range(6), range(6, 7)), "2 layers are copies of others"),
        ((range(1), range(1, 6), range(6, 7)), "1 layers are copies of others"),
        ((range(4), range(4, 7)), "whole"),  # none to spare
    ],
    ids=["one", "in the middle", "none"],
)
def test_runs_are_repeated_each_by_itself(runs: tuple[range, ...], how: str, whole: bytes) -> None:
    graph, done, _ = traced(component(runs=runs))
    assert done == how
    assert graph == whole


def test_both_ways_have_one_entry_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken from there was made in either way: the graphs are the same."""
    asked: list[bool] = []

    def graph(made: Component, progress: object, *, whole: bool) -> ir.Model:
        asked.append(whole)
        inputs = [ir.Value(name=tensor.name) for tensor in made.spec.inputs]
        outputs = inputs[: len(made.spec.outputs)]
        return ir.Model(ir.Graph(inputs, outputs, nodes=(), opset_imports={"": 24}), ir_version=11)

    monkeypatch.setattr(trace, "graph_from_component", graph)
    folder = TraceFolder(tmp_path)
    cached = [Tracer(folder, whole=whole)(component()).cached for whole in (True, False, True)]
    assert cached == [False, True, True]
    assert asked == [True]


# Layers that are not alike

ODD = 4
"""A layer that would be passed by."""


def replaced(**changes: object) -> Change:
    def change(stack: Stack) -> None:
        stack.layers[ODD] = Layer(ODD, **changes)  # type: ignore[arg-type]

    return change


def attribute(name: str, value: object) -> Change:
    return lambda stack: setattr(stack.layers[ODD], name, value)


def another_activation(stack: Stack) -> None:
    stack.layers[ODD].act = nn.Tanh()


def another_mask(stack: Stack) -> None:
    """Chosen by the model: the layer does not know of it."""
    stack.masks[ODD] = 2.0


def added_between(stack: Stack) -> None:
    """As DeepStack does."""
    stack.after[ODD] = lambda hidden: hidden + 1.0


class _ByNumber(Layer):
    """Does otherwise by its number alone, when it runs."""

    def forward(self, hidden_BSH: torch.Tensor, mask: torch.Tensor, **cache: object) -> torch.Tensor:
        given = super().forward(hidden_BSH, mask, **cache)  # type: ignore[arg-type]
        return given * 2 if self.layer_idx == ODD else given


def by_number(stack: Stack) -> None:
    for number in range(LAYERS):
        stack.layers[number] = _ByNumber(number)


def not_called(stack: Stack) -> None:
    stack.forward = lambda hidden, write_index, *past: (hidden * 2, *past)  # type: ignore[method-assign]


UNLIKE = {
    "width": (replaced(width=2 * WIDTH), "the parameters or buffers of write"),
    "bias": (replaced(bias=False), "the parameters or buffers of write"),
    "attribute": (attribute("scale", 0.25), "scale of itself"),
    "window": (attribute("window", 4), "window of itself"),
    "module": (another_activation, "the type of act"),
    "mask": (another_mask, "is not computed as layers.1 is, or is given something else"),
    "between": (added_between, "is not computed as layers.1 is, or is given something else"),
    "number": (by_number, "is not computed as layers.1 is, or is given something else"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_layer_unlike_the_others_is_found(what: str) -> None:
    change, why = UNLIKE[what]
    made = component(change)
    with pytest.raises(Unlike, match=re.escape(why)):
        check(made)


ONE_OF_EACH = [what if what == "attribute" else pytest.param(what, marks=pytest.mark.long) for what in UNLIKE]


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_then_all_are_traced_and_it_is_said_why(
    what: str, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of both ways notices if it is not found."""
    change, why = UNLIKE[what]
    right = traced(component(change), whole=True)[0]
    assert right != whole or what == "window", "what differs is in the graph"
    graph, how, told = traced(component(change))
    assert how.startswith("whole, for its layers are not alike: layers.")
    assert why in how
    assert told == [f"tracing decoder {how}"]
    assert graph == right
    monkeypatch.setattr(trace, "check_alike", lambda *_: None)
    graph, how, _ = traced(component(change))
    assert (how == COPIED) == (what != "between")
    assert (graph == right) == (what in ("between", "window"))


def at(number: int, change: Callable[[Layer], object]) -> Change:
    return lambda stack: change(stack.layers[number])  # type: ignore[arg-type, return-value]


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (at(2, lambda layer: setattr(layer, "scale", 0.25)), "different numbers of nodes"),
        (lambda stack: stack.layers.__setitem__(2, Layer(2, bias=False)), "different numbers of nodes"),
        (lambda stack: stack.after.update({1: lambda hidden: hidden + 1.0}), "do not lie together"),
        (lambda stack: stack.masks.update({2: 2.0}), "in the graph of layers.2 is not"),
    ],
    ids=["attribute", "bias", "between", "mask"],
)
def test_traced_layers_are_compared_as_graphs(
    change: Change, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the modules not looked at: the two that are traced must be equal."""
    monkeypatch.setattr(trace, "check_alike", lambda *_: None)
    graph, how, _ = traced(component(change))
    assert why in how
    assert graph == traced(component(change), whole=True)[0]


def test_layers_that_are_not_called_are_not_known_to_be_alike() -> None:
    made = component(not_called)
    with pytest.raises(Unlike, match="is not called"):
        check(made)


@pytest.mark.parametrize(
    "stack", [LayerStack("blocks", (range(LAYERS),)), LayerStack("layers", (range(LAYERS + 1),))], ids=str
)
def test_layers_that_are_not_there_are_not_known_to_be_alike(stack: LayerStack) -> None:
    with pytest.raises(Unlike, match="is no list of"):
        check(replace(component(), layers=stack))


def test_what_cannot_be_run_on_fake_tensors_is_traced_whole() -> None:
    """Such a module may still export, or not: then the error is that of the whole trace."""
    made = component()

    def call() -> None:
        raise RuntimeError("no")

    with pytest.raises(Unlike, match="cannot be run on fake tensors"):
        check_alike(made.module, LayerStack("layers", (range(LAYERS),)), call, {})
