"""One graph of a recipe, without the bundle around it, for tests that ask about one graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.bundle.manifest import Graph
from gap_export.bundle.spec import GraphName
from gap_export.graph.trace_cache import Tracer
from gap_export.pipeline.graphs import trace_graphs, write_graphs
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.plan import Plan, plan_for
from gap_export.recipe.recipe import Recipe

SLOWLY_TRACED = [
    (pruner, policy) for pruner in ("sparsevlm", "pyramiddrop") for policy in ("shifted", "permuted")
]
"""Pruners inside the decoder, with policies, whose tests are long."""


@dataclass(frozen=True)
class ExportedGraph:
    """A graph on the disk, the same as in a bundle of its recipe.

    Attributes:
        path: of the ONNX file; its weights lie beside it.
        graph: as the manifest would list it.
        model: that it is of.
        plan: that it was traced for.
        keys: of the weights that it reads, in the checkpoint.
    """

    path: Path
    graph: Graph
    model: OpenedModel
    plan: Plan
    keys: list[str]


class GraphExporter:
    """`exporter("vision", pruner=..., keep=...)`: the graph, made on first use. Not to be changed.

    Args:
        folder: for graphs, each in a folder of its own.
        options: fields of the recipe, where nothing else is said.
        tracer: of all of them.
    """

    def __init__(self, folder: Path, options: dict[str, Any], tracer: Tracer) -> None:
        self._folder, self._options, self._tracer = folder, options, tracer
        self._made: dict[str, ExportedGraph] = {}

    def __call__(self, name: GraphName, **changes: Any) -> ExportedGraph:
        """Open, plan, trace and write."""
        recipe = Recipe.model_validate({**self._options, **changes})
        key = f"{name} {recipe.model_dump_json()}"
        if key not in self._made:
            model = open_model(recipe)
            plan = plan_for(recipe, model.spec, model.text_tower)
            traced = trace_graphs(model, plan, only={name}, tracer=self._tracer)
            folder = self._folder / str(len(self._made))
            folder.mkdir()
            graph = write_graphs(traced, model, plan, folder).graphs[name]
            self._made[key] = ExportedGraph(
                folder / graph.file, graph, model, plan, [key for each in traced for key in each.float_keys]
            )
        return self._made[key]
