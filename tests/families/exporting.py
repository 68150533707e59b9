"""A splice by itself, as a file: no model around it, a small table of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from gap_export.graph import passes, trace
from gap_export.spec import Component, GraphSpec


def write_splice(splice: nn.Module, spec: GraphSpec, table: Any, folder: Path) -> Path:
    """Trace a hollow splice, give it a table, write it.

    Args:
        splice: over a hollow embedding.
        spec: of its graph.
        table: [vocabulary, H] float32.
        folder: to write into.
    """
    component = Component(module=splice.eval(), spec=spec, weight_key=lambda name: name)
    model = trace.graph_from_component(component)
    for name, value in model.graph.initializers.items():
        if trace.is_hollow(value.const_value):
            value.const_value = ir.tensor(table, name=name)
    passes.simplify(model)
    path = folder / "splice.onnx"
    passes.write_graph(model, spec, path)
    return path
