"""Clean-up of a traced graph, without touching its arithmetic or its weights, and writing it out."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from gap_export import __version__


def simplify(model: ir.Model) -> None:
    """Fold constants, drop dead and duplicate nodes; in place.

    Weights are external and stay so: folding the `Transpose` of one would write a second copy of it into the model.
    """
    for clean in (
        common.InlinePass(),
        _fold_constants,
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
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


def write_graph(model: ir.Model, path: Path) -> None:
    """Write the ONNX file; external tensors stay references (`ir.save` would inline them)."""
    path.write_bytes(ir.to_proto(model).SerializeToString())
