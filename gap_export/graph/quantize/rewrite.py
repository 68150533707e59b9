"""Which weights are quantised, and the graph with their products replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir
from torch import nn

from gap_export.graph.quantize.linear_layers import products_of
from gap_export.graph.quantize.scheme import Rewriter, Scheme, activations_of, load_scheme
from gap_export.graph.quantize.store import QuantizedStore
from gap_export.modeling.components import Component
from gap_export.precision import Precision

DECODERS = ("decoder", "prefill", "decode")
_HEAD = "lm_head.weight"


def schemes_of(component: Component, precision: Precision, parameters: Collection[str]) -> dict[str, Scheme]:
    """Parameter -> how it is quantised; empty for precisions that quantise nothing.

    Args:
        component: to be traced; weights of its linear layers are meant, and no others.
        precision: of the bundle.
        parameters: that the traced graph has.
    """
    found: dict[str, Scheme] = {}
    for name, module in component.module.named_modules():
        parameter = f"{name}.weight"
        if isinstance(module, nn.Linear) and parameter in parameters:
            columns, inner = module.weight.shape
            wide = columns > inner
            for scheme in _schemes_for(component.spec.name, parameter, precision, wide=wide):
                if scheme.fits(columns, inner):
                    found[parameter] = scheme
                    break
    return found


def _schemes_for(graph: str, parameter: str, precision: Precision, *, wide: bool) -> list[Scheme]:
    """In the order in which they are tried, for a product that is wider than what it reads or not."""
    if graph not in DECODERS:
        names = [precision.elsewhere]
    elif parameter.endswith(_HEAD):
        names = [precision.head]
    else:
        names = [precision.wide if wide else None, precision.decoder, precision.head]
    return [load_scheme(name) for name in names if name is not None]


def quantize(
    model: ir.Model,
    schemes: Mapping[str, Scheme],
    keys: Mapping[str, str],
    store: QuantizedStore,
    ranges: Mapping[str, float],
) -> None:
    """Replace matrix products with weights that were quantised; in place.

    Args:
        model: simplified; weights that are quantised have stand-ins, which vanish.
        schemes: parameter -> scheme.
        keys: parameter -> checkpoint key.
        store: prepared for those keys.
        ranges: parameter -> largest magnitude of what it is multiplied with; for schemes that need one beforehand.

    Raises:
        TraceError: such a weight is used in another way than a linear layer uses it.
    """
    # Layers that do not reach an output are not there.
    weights = {name: model.graph.initializers[name] for name in schemes if name in model.graph.initializers}
    rewriter = Rewriter(model.graph, store.activations, _ranges_of_activations(weights, ranges))
    for name, weight in weights.items():
        scheme = schemes[name]
        tensors = store.tensors(keys[name], scheme)
        pieces = [rewriter.constant(tensor, f"{name}.{piece}") for piece, tensor in tensors.items()]
        for product, transposed in products_of(weight, name):
            rewriter.replace(product, scheme.nodes(product, pieces, rewriter))
            if transposed is not None and not transposed.outputs[0].consumers():
                model.graph.remove(transposed, safe=True)
        model.graph.initializers.pop(name)


def _ranges_of_activations(
    weights: Mapping[str, ir.Value], ranges: Mapping[str, float]
) -> dict[ir.Value, float]:
    """Of every activation the largest magnitude that was measured for any weight it meets.

    Where a graph computes fewer rows than another of the same model, weights that share an activation here may have had their own there.
    """
    found: dict[ir.Value, float] = {}
    for name in weights.keys() & ranges.keys():
        for product, _ in products_of(weights[name], name):
            activations = activations_of(product)
            found[activations] = max(ranges[name], found.get(activations, 0.0))
    return found
