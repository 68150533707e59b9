"""Clean-up of a traced graph, without touching its arithmetic or its weights, and writing it out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from gap_export import __version__
from gap_export.bundle.spec import GraphSpec
from gap_export.errors import TraceError
from gap_export.graph.constants import integers
from gap_export.graph.fuse import fuse
from gap_export.graph.rows import select_rows_early


def simplify(model: ir.Model) -> None:
    """Fold constants, fuse what has an operator of its own, drop rows and nodes that nothing reads; in place.

    Weights are external and stay so: folding the `Transpose` of one would write a second copy of it into the model.
    """
    for clean in (
        common.InlinePass(),
        _fold_constants,
        _state_extents,
        fuse,
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        select_rows_early,
        common.RemoveUnusedNodesPass(),
        _fold_constants,
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),  # where the two counters are equal (nothing pruned), both outputs stay
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    ):
        clean(model)
    model.producer_name, model.producer_version = "gap-export", __version__
    model.metadata_props.clear()


def _fold_constants(model: ir.Model) -> None:
    onnxscript.optimizer.fold_constants(model, should_fold=_foldable, onnx_shape_inference=False)


def _foldable(node: ir.Node) -> bool | None:
    """Never compute on weights; leave everything else to the optimiser's own size limits."""
    return (
        False
        if any(isinstance(getattr(i, "const_value", None), ir.ExternalTensor) for i in node.inputs)
        else None
    )


def _state_extents(model: ir.Model) -> None:
    """Replace the -1 of a Reshape by the extent that it stands for, where that is the same in every call.

    TensorRT does not work it out where the other extents are computed (a sequence that lost a few tokens), and then takes the
    number of heads for unknown.
    """
    for node in list(model.graph):
        parts = (
            node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] is not None else None
        )
        extents = node.outputs[0].shape
        if parts is None or parts.op_type != "Concat" or extents is None or len(extents) != len(parts.inputs):
            continue
        for place, (part, extent) in enumerate(zip(parts.inputs, extents, strict=True)):
            if isinstance(extent, int) and integers(part) == [-1]:
                stated = ir.node("Constant", [], {"value": ir.tensor([extent], dtype=ir.DataType.INT64)})
                # Other Reshapes may share the old one and mean another extent by their -1.
                inputs = [*parts.inputs[:place], stated.outputs[0], *parts.inputs[place + 1 :]]
                whole = ir.node("Concat", inputs, {"axis": 0})
                model.graph.insert_before(node, [stated, whole])
                node.replace_input_with(1, whole.outputs[0])


def operators(model: ir.Model) -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


def write_graph(model: ir.Model, spec: GraphSpec, path: Path) -> None:
    """Write the ONNX file; external tensors stay references (`ir.save` would inline them).

    Raises:
        TraceError: clean-up lost an input or output.
    """
    inputs = [value.name for value in model.graph.inputs]
    if inputs != [tensor.name for tensor in spec.inputs] or len(model.graph.outputs) != len(spec.outputs):
        raise TraceError(
            "lost an input or an output in clean-up", subject=spec.name, hint="please report this"
        )
    # Where two outputs had equal values, clean-up computed one and aliased the other, under a name of its own.
    for position, value in enumerate(model.graph.outputs):
        value.name = f"output_{position}"
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.name = tensor.name
    path.write_bytes(ir.to_proto(model).SerializeToString())
