"""The graphs of a bundle: their specs against those that follow from the rest of the manifest, and the files against the specs."""

from __future__ import annotations

import itertools
from pathlib import Path

from gap_export.bundle.check.files import is_plain
from gap_export.bundle.check.limits import Faults
from gap_export.bundle.graph_specs import GraphSpecs
from gap_export.bundle.interface import interface_fault, shown
from gap_export.bundle.manifest import Manifest
from gap_export.bundle.onnx_header import Interface, read_interface
from gap_export.bundle.spec import GraphSpec, TensorSpec
from gap_export.bundle.vision_inputs import image_inputs
from gap_export.errors import BundleError, in_one_line
from gap_export.errors import shown as in_short
from gap_export.precision import precision


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Refuse graphs that take or give something else than the manifest says.

    Args:
        folder: of the bundle.
        manifest: of it, checked.

    Raises:
        BundleError: with the first graph that does, or that is no graph.
    """
    for graph in manifest.graphs.values():
        path = folder / graph.file
        found = read_interface(path)
        fault = interface_fault(graph.spec, found) or _weights_fault(found, manifest)
        if fault is not None:
            raise BundleError(
                f"{in_one_line(fault)}: it is another graph than the {graph.spec.name} of the manifest",
                subject=str(path),
                hint="the bundle is damaged: build it again",
            )


def _weights_fault(found: Interface, manifest: Manifest) -> str | None:
    for name in sorted(found.weight_files):
        if not is_plain(name) or name not in manifest.files:
            return f"has weights in {in_short(name)}, which is not among the files that are hashed"
    return None


def specs_of(manifest: Manifest) -> dict[str, GraphSpec]:
    """The graphs that follow from all else that a manifest says.

    Args:
        manifest: whose sizes are checked.
    """
    recipe, pruning, model = manifest.recipe, manifest.pruning, manifest.spec
    specs = GraphSpecs(
        model=model,
        dtype=precision(manifest.precision).activations.dtype,
        pruning=pruning,
        text_tower=manifest.text_tower,
        cache=pruning.cache_layout(model.layers, manifest.capacity, static=recipe.has_static_cache),
        max_text=recipe.max_text,
        max_batch=recipe.max_batch,
        images=manifest.prompt.images,
    )
    graphs = specs.graphs(image_inputs(manifest.layout, specs.batch, model.token_range))
    return {str(name): spec for name, spec in graphs.items()}


def spec_faults(manifest: Manifest) -> Faults:
    """Specs of the graphs against those that follow from the rest."""
    wanted = specs_of(manifest)
    if manifest.graphs.keys() != wanted.keys():
        yield f"graphs are {in_short(sorted(manifest.graphs))}, and this model has {in_short(sorted(wanted))}"
        return
    for name, graph in manifest.graphs.items():
        spec, right = graph.spec, wanted[name]
        if spec.name != name:
            yield f"graphs.{name}.spec.name is {spec.name}"
        sides = (("inputs", spec.inputs, right.inputs), ("outputs", spec.outputs, right.outputs))
        for side, there, following in sides:
            yield from _tensor_faults(f"graphs.{name}.spec.{side}", there, following)
        if spec.aliased != right.aliased:
            yield f"graphs.{name}.spec.aliased is not every present with its past"


def _tensor_faults(field: str, there: tuple[TensorSpec, ...], right: tuple[TensorSpec, ...]) -> Faults:
    names, following = [tensor.name for tensor in there], [tensor.name for tensor in right]
    if names != following:
        number = next(
            n for n, (one, other) in enumerate(itertools.zip_longest(names, following)) if one != other
        )
        said, built = (each[number] if number < len(each) else None for each in (names, following))
        yield f"{field}.{number} is {in_short(said)}, and what follows from the rest is {in_short(built)}"
    for number, (one, other) in enumerate(zip(there, right, strict=True)):
        if one != other:
            yield f"{field}.{number} is {one.name} {shown(one)}, and what follows from the rest is {shown(other)}"


def description_faults(manifest: Manifest) -> Faults:
    """Numbers that nothing is computed from but what is shown."""
    for name, graph in manifest.graphs.items():
        if not 0 <= graph.weight_bytes < 2**50:
            yield f"graphs.{name}.weight_bytes is {in_short(graph.weight_bytes)}"
        for operator, count in graph.operators.items():
            if not 0 <= count < 2**31:
                yield f"graphs.{name}.operators.{in_short(operator)} is {in_short(count)}"
        for term in graph.flops:
            if not 0 <= term.factor < 2**80 or len(term.dims) > 16:
                yield f"graphs.{name}.flops has a factor of {in_short(term.factor)} and {len(term.dims)} dims"
