"""Low precision: matrix products whose weights have few bits, activations and everything else are floats.

    int8       DynamicQuantizeLinear -> MatMulInteger -> scale. One scale per column of the weight, one per call for activations, found
               while running; towers and decoders.
    int4       DequantizeLinear in blocks of 32 along the input -> MatMul, in the decoder; its head as above, towers in float32. Runtimes
               read four bits and multiply in one go (ONNX Runtime: `MatMulNBits`).
    int4-fp16  the same blocks in half precision throughout, head and towers included: what engines take.
    fp8        QuantizeLinear -> DequantizeLinear for activations and DequantizeLinear for weights -> MatMul, in the decoder; its head
               and towers in half precision. Engines multiply E4M3 by E4M3.
    nvfp4      the same places in E2M1, with a scale per block of 16: activations by TensorRT's own operator, whose block scales are
               found while running.

Activations of fp8 and nvfp4 have one scale that is measured beforehand (`ranges.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from torch import nn

from gap_export.errors import TraceError
from gap_export.graph.quantized_weights import QuantizedStore, Scheme
from gap_export.graph.rounding import BLOCK, E4M3_MAX, FP4_BLOCK, nvfp4_whole
from gap_export.modeling.components import Component

DECODERS = ("decoder", "prefill", "decode")
_HEAD = "lm_head.weight"
_BLOCKS: dict[Scheme, int] = {"int8": 1, "int4": BLOCK, "fp8": 1, "nvfp4": FP4_BLOCK}
_OF_DECODERS: dict[str, Scheme] = {"int4": "int4", "int4-fp16": "int4", "fp8": "fp8", "nvfp4": "nvfp4"}
"""Precisions that leave towers alone, and what they do to the linear layers of decoders but for the head."""
ENGINE_DOMAIN = "trt"
"""Operators that only TensorRT knows."""


def schemes_of(component: Component, precision: str, parameters: Collection[str]) -> dict[str, Scheme]:
    """Parameter -> how it is quantised; empty for precisions that quantise nothing.

    Args:
        component: to be traced; weights of its linear layers are meant, and no others.
        precision: of the bundle.
        parameters: that the traced graph has.
    """
    shapes = {
        f"{name}.weight": module.weight.shape
        for name, module in component.module.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in parameters
    }
    if precision == "int8":
        return dict.fromkeys(shapes, "int8")
    if precision not in _OF_DECODERS or component.spec.name not in DECODERS:
        return {}
    scheme = _OF_DECODERS[precision]
    found: dict[str, Scheme] = {
        name: scheme
        for name, (columns, inner) in shapes.items()
        if not name.endswith(_HEAD) and columns % 2 == 0 and inner % _BLOCKS[scheme] == 0
    }
    return {name: found.get(name, "int8") for name in shapes} if precision == "int4" else found


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
        ranges: parameter -> largest magnitude of what it is multiplied with; for fp8 and nvfp4.

    Raises:
        TraceError: such a weight is used in another way than a linear layer uses it.
    """
    # Layers that do not reach an output are not there.
    weights = {name: model.graph.initializers[name] for name in schemes if name in model.graph.initializers}
    products = _Products(model, _largest(weights, ranges))
    for name, weight in weights.items():
        scheme = schemes[name]
        tensors = store.tensors(keys[name], scheme)
        values = [products.initializer(tensor, f"{name}.{part}") for part, tensor in tensors.items()]
        for product, turned in products_of(weight, name):
            if scheme == "int8":
                products.of_integers(product, *values)
            elif scheme == "int4":
                products.of_blocks(product, *values)
            elif scheme == "fp8":
                products.of_eight_bit_floats(product, *values)
            else:
                products.of_four_bit_floats(product, *values)
            if turned is not None and not turned.outputs[0].consumers():
                model.graph.remove(turned, safe=True)
        model.graph.initializers.pop(name)


def products_of(weight: ir.Value, name: str) -> list[tuple[ir.Node, ir.Node | None]]:
    """(product, what turns the weight for it) of every linear layer that has this weight.

    Raises:
        TraceError: it is used in another way.
    """
    found: list[tuple[ir.Node, ir.Node | None]] = []
    for node in weight.consumers():
        if node.op_type == "Gemm" and node.attributes["transB"].as_int() and node.inputs[1] is weight:
            found.append((node, None))
        elif node.op_type == "Transpose" and all(
            product.op_type == "MatMul" for product in node.outputs[0].consumers()
        ):
            found += [(product, node) for product in node.outputs[0].consumers()]
        else:
            raise TraceError(
                "is used in another way than a linear layer uses it",
                subject=name,
                hint="build with --precision fp32, and please report this",
            )
    return found


def _largest(weights: Mapping[str, ir.Value], ranges: Mapping[str, float]) -> dict[ir.Value, float]:
    """Of every activation the largest magnitude that was measured for any weight it meets.

    Where a graph computes fewer rows than another of the same model, weights that share an activation here may have had their own there.
    """
    found: dict[ir.Value, float] = {}
    for name in weights.keys() & ranges.keys():
        for product, _ in products_of(weights[name], name):
            found[_given(product)] = max(ranges[name], found.get(_given(product), 0.0))
    return found


class _Products:
    """Puts products of few bits in the place of others. Activations that several of them read are quantised once.

    Args:
        model: changed in place.
        largest: magnitudes that activations reach, of those that need a scale beforehand.
    """

    def __init__(self, model: ir.Model, largest: dict[ir.Value, float]) -> None:
        self._graph, self._largest = model.graph, largest
        self._integers: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._floats: dict[ir.Value, ir.Value] = {}

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """A tensor of the graph's own; one of that name that is already there is taken again."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def of_integers(self, product: ir.Node, numbers: ir.Value, scale: ir.Value) -> None:
        """Eight-bit whole numbers by such."""
        given, out = _given(product), product.outputs[0]
        if given not in self._integers:
            node = ir.node("DynamicQuantizeLinear", [given], num_outputs=3)
            node.outputs[0].shape, node.outputs[0].type = given.shape, ir.TensorType(ir.DataType.UINT8)
            self._graph.insert_before(product, [node])
            self._integers[given] = tuple(node.outputs)
        whole_numbers, step, zero = self._integers[given]
        whole = ir.node("MatMulInteger", [whole_numbers, numbers, zero])
        whole.outputs[0].shape, whole.outputs[0].type = out.shape, ir.TensorType(ir.DataType.INT32)
        real = ir.node("Cast", [whole.outputs[0]], {"to": ir.DataType.FLOAT})
        both = ir.node("Mul", [step, scale])
        self._replace(product, [whole, real, both, ir.node("Mul", [real.outputs[0], both.outputs[0]])])

    def of_blocks(self, product: ir.Node, numbers: ir.Value, scale: ir.Value) -> None:
        """Floats by four-bit whole numbers."""
        real = ir.node("DequantizeLinear", [numbers, scale], {"axis": 0, "block_size": BLOCK})
        real.outputs[0].shape, real.outputs[0].type = numbers.shape, scale.type
        self._replace(product, [real, ir.node("MatMul", [product.inputs[0], real.outputs[0]])])

    def of_eight_bit_floats(self, product: ir.Node, numbers: ir.Value, scale: ir.Value) -> None:
        """E4M3 by E4M3."""
        given = _given(product)
        if given not in self._floats:
            step = self._scalar(given, self._largest[given] / E4M3_MAX, ir.DataType.FLOAT16)
            zero = self.initializer(ir.tensor(np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy())), "fp8.zero")
            low = ir.node("QuantizeLinear", [given, step, zero])
            back = ir.node("DequantizeLinear", [low.outputs[0], step])
            low.outputs[0].shape, low.outputs[0].type = given.shape, ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            back.outputs[0].shape, back.outputs[0].type = given.shape, given.type
            self._graph.insert_before(product, [low, back])
            self._floats[given] = back.outputs[0]
        real = ir.node("DequantizeLinear", [numbers, scale], {"axis": 1})
        real.outputs[0].shape, real.outputs[0].type = numbers.shape, scale.type
        self._replace(product, [real, ir.node("MatMul", [self._floats[given], real.outputs[0]])])

    def of_four_bit_floats(
        self, product: ir.Node, numbers: ir.Value, scale: ir.Value, whole: ir.Value
    ) -> None:
        """E2M1 by E2M1."""
        given = _given(product)
        blocks = {"block_size": FP4_BLOCK}
        if given not in self._floats:
            step = self._scalar(given, nvfp4_whole(self._largest[given]), ir.DataType.FLOAT)
            low = ir.Node(
                ENGINE_DOMAIN,
                "TRT_FP4DynamicQuantize",
                [given, step],
                [
                    ir.AttrInt64("axis", -1),
                    ir.AttrInt64("block_size", FP4_BLOCK),
                    ir.AttrInt64("scale_type", ir.DataType.FLOAT8E4M3FN.value),
                ],
                num_outputs=2,
            )
            kinds = (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN)
            for value, kind in zip(low.outputs, kinds, strict=True):
                value.type = ir.TensorType(kind)
            low.outputs[0].shape = given.shape
            scales = ir.node("DequantizeLinear", [low.outputs[1], step])
            back = ir.node("DequantizeLinear", [low.outputs[0], scales.outputs[0]], {"axis": -1, **blocks})
            half = ir.node("Cast", [back.outputs[0]], {"to": ir.DataType.FLOAT16})
            half.outputs[0].shape, half.outputs[0].type = given.shape, given.type
            self._graph.insert_before(product, [low, scales, back, half])
            self._floats[given] = half.outputs[0]
            self._graph.opset_imports[ENGINE_DOMAIN] = 1
        scales = ir.node("DequantizeLinear", [scale, whole])
        real = ir.node("DequantizeLinear", [numbers, scales.outputs[0]], {"axis": 0, **blocks})
        half = ir.node("Cast", [real.outputs[0]], {"to": ir.DataType.FLOAT16})
        half.outputs[0].shape, half.outputs[0].type = numbers.shape, given.type
        self._replace(
            product, [scales, real, half, ir.node("MatMul", [self._floats[given], half.outputs[0]])]
        )

    def _scalar(self, given: ir.Value, number: float, kind: ir.DataType) -> ir.Value:
        """A scale of activations; one where they were zero throughout, or so small that half precision knows no such scale."""
        content = np.asarray(number, kind.numpy())
        content = content if content > 0 else np.ones_like(content)
        return self.initializer(ir.tensor(content), f"{given.name}.scale")

    def _replace(self, product: ir.Node, nodes: list[ir.Node]) -> None:
        """Put nodes in the place of a product, and add what a Gemm adds."""
        if len(product.inputs) > 2 and product.inputs[2] is not None:
            nodes = [*nodes, ir.node("Add", [nodes[-1].outputs[0], product.inputs[2]])]
        made, out = nodes[-1].outputs[0], product.outputs[0]
        made.shape, made.type = out.shape, out.type
        if out in self._largest:  # another linear layer reads this one as it is
            self._largest[made] = self._largest[out]
        ir.convenience.replace_nodes_and_values(self._graph, product, [product], nodes, [out], [made])


def _given(product: ir.Node) -> ir.Value:
    """The activations of a product."""
    given = product.inputs[0]
    assert given is not None
    return given
