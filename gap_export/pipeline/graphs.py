"""Components to ONNX files: trace, place the weights, simplify, quantise, write, lint.

    trace_graphs:  OpenedModel, Plan -> TracedGraph per component
    write_graphs:  TracedGraphs -> files in a folder

Both work on any subset of a model's graphs; `export_graphs` is for those who want a few of them and no bundle around.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from gap_export import linter
from gap_export.bundle.manifest import Graph
from gap_export.bundle.spec import GraphName
from gap_export.errors import InputError
from gap_export.graph import cost, passes, quantize, weights
from gap_export.graph.quantize.calibration import Calibrate, hand_over_moments
from gap_export.graph.quantize.scheme import BlockScheme, Scheme
from gap_export.graph.quantize.store import QuantizedStore
from gap_export.graph.trace_cache import Tracer
from gap_export.graph.trace_folder import user_folder
from gap_export.graph.weights import WeightStore
from gap_export.modeling.components import Component
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.plan import Plan, plan_for
from gap_export.precision import precision
from gap_export.progress import SILENT, Progress
from gap_export.recipe.calibration import CALIBRATION
from gap_export.recipe.ranges import RANGES
from gap_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class TracedGraph:
    """A component and its graph, whose weights are still to be attached.

    Attributes:
        component: that was traced.
        model: its graph, changed in place by what follows.
        cached: whether it was traced before, and taken from the trace cache.
        parameters: names of the weights that it has, in its own order.
        schemes: of those, the ones that are quantised, and how.
    """

    component: Component
    model: ir.Model
    cached: bool
    parameters: tuple[str, ...]
    schemes: dict[str, Scheme]

    @property
    def name(self) -> GraphName:
        """Of the graph."""
        return self.component.spec.name

    @property
    def float_keys(self) -> list[str]:
        """Keys in the checkpoint of the weights that stay floats."""
        return [self.component.weight_key(name) for name in self.parameters if name not in self.schemes]

    @property
    def quantized_keys(self) -> dict[str, str]:
        """Parameter -> key in the checkpoint, of the weights that are quantised."""
        return {name: self.component.weight_key(name) for name in self.schemes}


@dataclass(frozen=True)
class WrittenGraphs:
    """Graphs on the disk, linted.

    Attributes:
        graphs: by name, as the manifest lists them.
        weight_bytes: newly written for their weights; linked ones cost nothing.
    """

    graphs: dict[str, Graph]
    weight_bytes: int


def export_graphs(
    recipe: Recipe,
    folder: Path,
    *,
    only: Collection[GraphName] | None = None,
    tracer: Tracer | None = None,
    progress: Progress = SILENT,
) -> WrittenGraphs:
    """Some graphs of a recipe, the same as in its bundle, without the rest of the bundle.

    Args:
        recipe: of the bundle.
        folder: where graphs and weights are put; must be there.
        only: names of the graphs; all of them by default.
        tracer: of the components; where several recipes are exported, one for all of them. By default one with the user's cache.
        progress: told when a stage begins.

    Raises:
        GapExportError: a stage failed; what was written before is left in the folder.
    """
    model = open_model(recipe, progress=progress)
    plan = plan_for(recipe, model.spec, model.text_tower)
    traced = trace_graphs(model, plan, only=only, tracer=tracer, progress=progress)
    return write_graphs(traced, model, plan, folder, progress=progress)


def trace_graphs(
    model: OpenedModel,
    plan: Plan,
    *,
    only: Collection[GraphName] | None = None,
    tracer: Tracer | None = None,
    progress: Progress = SILENT,
) -> list[TracedGraph]:
    """Trace the components of a model.

    Args:
        model: opened.
        plan: for it.
        only: names of the graphs; all of them by default.
        tracer: of the components; where several recipes are built, one for all of them. By default one with the user's cache.
        progress: told of every component.

    Raises:
        CheckpointError: a weight is missing, or not what the config implies.
        TraceError: a component does not export.
        InputError: a graph is asked for that this model has not.
    """
    components = model.components(plan)
    names = {component.spec.name for component in components}
    unknown = set(only or ()) - names
    if unknown:
        raise InputError(
            f"has no graph {min(unknown)!r}",
            subject=model.recipe.name,
            hint=f"it has {', '.join(sorted(names))}",
        )
    weights.check_weights(model.checkpoint, components)
    tracer = tracer or Tracer(user_folder())
    traced = []
    for component in components:
        if only is not None and component.spec.name not in only:
            continue
        graph = tracer(component, progress)
        parameters = tuple(weights.parameters_of(graph.model))
        schemes = quantize.schemes_of(component, precision(model.recipe.precision), parameters)
        traced.append(TracedGraph(component, graph.model, graph.cached, parameters, schemes))
    return traced


def write_graphs(
    traced: Sequence[TracedGraph],
    model: OpenedModel,
    plan: Plan,
    folder: Path,
    *,
    self_contained: bool = False,
    progress: Progress = SILENT,
) -> WrittenGraphs:
    """Put weights and graphs into a folder, and lint every file.

    Args:
        traced: changed in place.
        model: that they are of.
        plan: of the build.
        folder: of the bundle.
        self_contained: copy weights instead of linking them.
        progress: told when a stage begins.

    Raises:
        CheckpointError: a weight does not fit its graph, or cannot be represented; or activations overflow while it is calibrated.
        RecipeError: the ranges are of another model.
        LintError: a graph would not carry position ids.
        MissingRequirementError: no space on the disk.
    """
    progress.stage("placing the weights")
    ranges = _ranges_of(traced, model, folder)
    floats = WeightStore(model.checkpoint, plan.activations, folder, self_contained)
    floats.prepare([key for graph in traced for key in graph.float_keys])
    quantized = QuantizedStore(model.checkpoint, folder, plan.activations)
    quantized.prepare(
        {key: graph.schemes[name] for graph in traced for name, key in graph.quantized_keys.items()},
        _calibration_of(traced, model, folder, progress),
    )
    graphs: dict[str, Graph] = {}
    for graph in traced:
        progress.stage(f"writing and linting {graph.name}.onnx")
        weights.attach_weights(graph.model, floats, graph.component.weight_key, stand_ins=graph.schemes)
        passes.simplify(graph.model)
        quantize.quantize(graph.model, graph.schemes, graph.quantized_keys, quantized, ranges)
        graphs[graph.name] = _write_graph(graph, model, plan, folder)
    return WrittenGraphs(graphs, floats.written_bytes + quantized.written_bytes)


def _ranges_of(traced: Sequence[TracedGraph], model: OpenedModel, folder: Path) -> dict[str, float]:
    """Parameter -> largest magnitude of what it is multiplied with, where the recipe names ranges; they become part of the bundle."""
    ranges = model.ranges
    if ranges is None:
        return {}
    ranges.check_covers([name for graph in traced for name in graph.schemes], model.family.row.name)
    ranges.write(folder / RANGES)
    return ranges.largest


def _calibration_of(
    traced: Sequence[TracedGraph], model: OpenedModel, folder: Path, progress: Progress
) -> Calibrate | None:
    """What measures the decoder on the recipe's calibration text, which becomes part of the bundle; None where there is no text."""
    text = model.calibration
    decoder = next((graph for graph in traced if graph.name in quantize.DECODERS), None)
    if text is None or decoder is None:
        return None
    (folder / CALIBRATION).write_bytes(text.text.encode())
    wanted = {
        name: key
        for name, key in decoder.quantized_keys.items()
        if isinstance(decoder.schemes[name], BlockScheme)
    }
    return partial(
        hand_over_moments,
        component=decoder.component,
        checkpoint=model.checkpoint,
        ids_BS=text.ids_BS,
        wanted=wanted,
        progress=progress,
    )


def _write_graph(graph: TracedGraph, model: OpenedModel, plan: Plan, folder: Path) -> Graph:
    """Write a finished graph and lint the file."""
    written = Graph(
        file=f"{graph.name}.onnx",
        spec=graph.component.spec,
        operators=passes.operators(graph.model),
        flops=cost.flops_of(graph.model),
        weight_bytes=cost.weight_bytes_of(graph.model),
    )
    passes.write_graph(graph.model, graph.component.spec, folder / written.file)
    kind = "decoder" if graph.name == "prefill" or graph.name == "decode" else graph.name
    linter.lint_graph(
        folder / written.file,
        kind=kind,
        strict=True,
        policy=plan.pruning.positions,
        mask=model.spec.attention_mask,
    ).raise_for_errors()
    return written
