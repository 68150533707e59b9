"""Component to graph: torch.export, translation to ONNX, names and symbols from the spec.

Nothing has storage here: parameters and example inputs are fake, so a 7B decoder is traced in the memory of its graph.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses import FakeTensor

from gap_export.bundle.spec import Dim, TensorSpec
from gap_export.errors import TraceError, first_line
from gap_export.graph.canonical import canonicalise
from gap_export.graph.repeat import repeat_layers
from gap_export.graph.torch_output import TorchOutput
from gap_export.modeling.attention import OPSET
from gap_export.modeling.components import Component
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.layers import LayerStack, Unlike, check_alike, passed_by, without_passed_by
from gap_export.progress import SILENT, Progress

_LOG = logging.getLogger(__name__)

_AMPLE = 2**20
_WITHOUT_BOUND = ("capacity", "sequence", "spliced", "text")

FAKE = "fake"
"""Stands for the file of a weight that is yet to be attached."""


def graph_from_component(
    component: Component, progress: Progress = SILENT, *, whole: bool = False
) -> ir.Model:
    """Trace one component. Of layers that are alike a few are traced, and repeated; the graph is the same in every byte.

    Args:
        component: module without weights, and spec.
        progress: told where layers are not alike, and all of them are traced.
        whole: trace all of them in any case.

    Returns:
        An ONNX model (opset 24) whose inputs and outputs carry the names, and whose shapes carry the symbols, of the
        spec. Initializers that are parameters have shape and type, and refer to no file (`is_fake`). Nothing in it says
        where it was made, so that equal components have equal graphs.

    Raises:
        TraceError: the module does not export; with torch's own reason.
    """
    spec, began = component.spec, time.process_time()
    stack = None if whole else component.layers
    model, how = None, "whole"
    with _one_function_table(), _without_garbage_collection():
        if stack is not None and stack.passed_by:
            try:
                model = _repeated(component, stack)
                how = f"{len(stack.passed_by)} layers are copies of others"
            except Unlike as why:
                how = f"whole, for its layers are not alike: {why}"
                progress.stage(f"tracing {spec.name} {how}")
        if model is None:
            model = _whole(component)
        canonicalise(model)
    _LOG.info("%s was traced in %.1f s of processor time (%s)", spec.name, time.process_time() - began, how)
    return model


def _repeated(component: Component, stack: LayerStack) -> ir.Model:
    """Trace some of the layers, and copy.

    Raises:
        Unlike: what is copied would not be what is traced.
    """
    module, spec, output = component.module, component.spec, TorchOutput()
    with output.held():
        args, kwargs, _ = _arguments(component)
        inputs = dict(zip((tensor.name for tensor in spec.inputs), (*args, *kwargs.values()), strict=True))
        check_alike(module, stack, lambda: module(*args, **kwargs), inputs)
    with passed_by(module, spec, stack):
        try:
            model = _exported(replace(component, spec=without_passed_by(spec, stack)), output)
        except Exception as error:  # whatever it is, the whole trace says it too
            raise Unlike(f"without some of them, there is no graph: {first_line(error)}") from error
    repeat_layers(model, stack, spec)
    return model


def _whole(component: Component) -> ir.Model:
    """Trace every layer.

    Raises:
        TraceError: the module does not export.
    """
    spec, output = component.spec, TorchOutput()
    try:
        return _exported(component, output)
    except Exception as error:  # torch raises a dozen unrelated types here; all mean "does not export"
        raise TraceError(
            f"could not be exported: {first_line(error)}",
            subject=spec.name,
            hint="the versions in constraints.txt are the tested ones; otherwise please report this, with "
            f"{output.write_log(spec.name, error)}",
        ) from error


def _exported(component: Component, output: TorchOutput) -> ir.Model:
    """What torch makes of a component, with the spec's names and symbols; raises whatever torch raises."""
    spec = component.spec
    with output.held():
        args, kwargs, shapes = _arguments(component)
        # What was compiled before in this process (bodies of loops) leaves guards against the extents it was compiled for.
        torch._dynamo.reset()
        exported = torch.export.export(component.module, args, kwargs, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            exported,
            (),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch gave no graph")
    model: ir.Model = program.model
    _name_symbols(model, spec.inputs)
    _count_from_scalars(model, spec.inputs)
    _leave_weights_out(model)
    return model


def traced_bounds(dim: Dim) -> tuple[int, int]:
    """Smallest and largest extent that a dimension is traced for.

    No graph has a capacity or the length of a text in it, only their names: they are traced for more than anyone asks for, so that
    bundles that differ in them have a trace in common. The count of kept tokens has a bound that graphs rely on, the number of
    tokens that there are; and torch reads the batch from one input or another as its bounds are.
    """
    ample = dim.name.startswith(_WITHOUT_BOUND)
    return dim.minimum, max(dim.maximum, _AMPLE if ample else 2)


def is_fake(tensor: ir.TensorProtocol | None) -> bool:
    """Whether an initializer's value is a parameter without storage, still to be attached."""
    return isinstance(tensor, ir.ExternalTensor) and tensor.location == FAKE


def _arguments(component: Component) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], Any]:
    """Example inputs and dynamic shapes as torch.export wants them.

    Returns:
        (positional arguments, keyword arguments, dynamic shapes of either): inputs go by name, so that a module may leave
        out those it has no use for; with `*args` they go by position, and the shapes of the rest are grouped.
    """
    examples, shapes = _example_inputs(component), _dynamic_shapes(component)
    parameters = inspect.signature(component.module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    if named == len(parameters):
        return (), examples, shapes
    in_order = tuple(shapes.values())
    return tuple(examples.values()), {}, (*in_order[:named], in_order[named:])


def _traced_shape(tensor: TensorSpec) -> tuple[int | Dim, ...]:
    """A scalar that is an extent is traced as a vector of that extent: torch follows extents symbolically, not values."""
    return tensor.shape if tensor.extent_of is None else (tensor.extent_of,)


def _example_inputs(component: Component) -> dict[str, torch.Tensor]:
    """Fake inputs; every symbol gets an extent of its own, so that no two are taken for the same.

    Earlier ones get the larger extents, as counts of what is chosen come behind what they are chosen of.
    """
    weight = next(component.module.parameters(), None)
    mode = fake_mode() if weight is None else weight.fake_mode  # type: ignore[attr-defined]
    shapes = {tensor.name: _traced_shape(tensor) for tensor in component.spec.inputs}
    dims = {dim.name: dim for shape in shapes.values() for dim in shape if isinstance(dim, Dim)}
    extents = {
        name: min(traced_bounds(dim)[1], max(2, dim.minimum) + len(dims) - place)
        for place, (name, dim) in enumerate(dims.items())
    }
    with mode:
        return {
            tensor.name: torch.zeros(
                [dim if isinstance(dim, int) else extents[dim.name] for dim in shapes[tensor.name]],
                dtype=getattr(torch, tensor.dtype),
            )
            for tensor in component.spec.inputs
        }


def _dynamic_shapes(component: Component) -> dict[str, Any]:
    """Per input, axis -> symbol."""
    symbols: dict[str, Any] = {}

    def symbol(dim: Dim) -> Any:
        bounds = traced_bounds(dim)
        return symbols.setdefault(dim.name, torch.export.Dim(dim.name, min=bounds[0], max=bounds[1]))

    return {
        tensor.name: {
            axis: symbol(dim) for axis, dim in enumerate(_traced_shape(tensor)) if isinstance(dim, Dim)
        }
        for tensor in component.spec.inputs
    }


def _count_from_scalars(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Put scalars in the place of vectors that were traced for their extent: `Range(0, scalar, 1)` is such a vector."""
    graph = model.graph
    for position, tensor in enumerate(inputs):
        if tensor.extent_of is None:
            continue
        counting = graph.inputs[position]
        scalar = ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        ends = [ir.node("Constant", [], {"value": ir.tensor(np.array(end, np.int64))}) for end in (0, 1)]
        start, step = (end.outputs[0] for end in ends)
        spread = ir.node("Range", [start, scalar, step])
        spread.outputs[0].type, spread.outputs[0].shape = counting.type, counting.shape
        counting.name = f"{tensor.name}.counting"
        counting.replace_all_uses_with(spread.outputs[0])
        graph.inputs[position] = scalar
        graph.insert_before(graph[0], [*ends, spread])


def _name_symbols(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Replace torch's symbol names (`s10`) by the spec's (`batch`) wherever they stand alone."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, inputs, strict=True):
        for axis, dim in enumerate(_traced_shape(tensor)):
            if isinstance(dim, Dim) and value.shape is not None:
                names[str(value.shape[axis])] = dim.name
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else names.get(str(d), str(d)) for d in value.shape]
            )
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape(
                    [d if isinstance(d, int) else names.get(str(d), str(d)) for d in output.shape]
                )


def _leave_weights_out(model: ir.Model) -> None:
    """Put something that can be written to a file in the place of every fake tensor."""
    for name, value in model.graph.initializers.items():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.ExternalTensor(
                location=FAKE,
                offset=0,
                length=0,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )


@contextmanager
def _one_function_table() -> Iterator[None]:
    """Let torch keep its table of ONNX functions from one export to the next.

    Every `torch.onnx.export` translates the 500 functions of torchlib from their Python source again, which takes 0.4 s: two
    thirds of the time of a small graph. The table depends on the opset alone, and exports only read it. There is no public
    way to hand one in, so for as long as an export takes, the function that makes it is replaced by one that remembers. A
    torch without that function makes the same graphs, more slowly.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        make = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return
    with mock.patch.object(ONNXRegistry, "from_torchlib", functools.partial(_function_table, make)):
        yield


@functools.lru_cache(maxsize=1)
def _function_table(make: Callable[..., Any], **opset: int) -> Any:
    return make(**opset)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects that live until its end: looking for garbage among them takes a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
