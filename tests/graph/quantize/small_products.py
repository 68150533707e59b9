"""One linear layer in a graph of its own, its weight in the numbers of a scheme: what ONNX Runtime makes of it.

Shape letters: B batch, S tokens, N columns of the product, K its inner extent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from gap_export.graph.quantize.linear_layers import products_of
from gap_export.graph.quantize.scheme import Rewriter, Weight, load_scheme
from gap_export.precision import FP32, Activations


@dataclass(frozen=True)
class Layer:
    """A linear layer without bias, quantised.

    Attributes:
        scheme: name of its module.
        rows_NK: its weight before that, float32.
        activations: element type of what it reads and gives.
        largest: magnitude of activations, for schemes that measure it beforehand.
        session: further entries of ONNX Runtime's configuration, as (name, value).
    """

    scheme: str
    rows_NK: NDArray[np.float32]
    activations: Activations = FP32
    largest: float | None = None
    session: tuple[tuple[str, str], ...] = ()

    @cached_property
    def pieces(self) -> dict[str, NDArray[Any]]:
        """What is stored, by the names of the pieces, [..., N]."""
        scheme = load_scheme(self.scheme)
        parts = scheme.encode(self.rows_NK, self._weight)
        pieces = scheme.pieces(self._weight)
        return {
            piece.name: np.asarray(part.T, piece.dtype.numpy())
            for piece, part in zip(pieces, parts, strict=True)
        }

    @property
    def _weight(self) -> Weight:
        columns, inner = self.rows_NK.shape
        return Weight(columns, inner, self.activations, lambda: float(np.abs(self.rows_NK).max()))

    @cached_property
    def run(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """[B, S, K] -> [B, S, N]."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        for name, value in self.session:
            options.add_session_config_entry(name, value)
        session = ort.InferenceSession(
            ir.to_proto(self._model()).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kind = np.dtype(self.activations.dtype)

        def product(x_BSK: NDArray[Any]) -> NDArray[Any]:
            (out_BSN,) = session.run(None, {"x": x_BSK.astype(kind)})
            return np.asarray(out_BSN, np.float64)

        return product

    def _model(self) -> ir.Model:
        columns, inner = self.rows_NK.shape
        kind = ir.TensorType(ir.DataType[self.activations.onnx])
        x = ir.Value(name="x", shape=ir.Shape(["batch", "sequence", inner]), type=kind)
        weight = ir.Value(
            name="layer.weight",
            shape=ir.Shape([columns, inner]),
            type=kind,
            const_value=ir.tensor(self.rows_NK),
        )
        transposed = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, transposed.outputs[0]])
        # An output of the graph keeps its name: products are inside of graphs.
        last = ir.node("Identity", [product.outputs[0]])
        out = last.outputs[0]
        product.outputs[0].shape = ir.Shape(["batch", "sequence", columns])
        product.outputs[0].type = kind
        out.name, out.type, out.shape = "y", kind, ir.Shape(["batch", "sequence", columns])
        graph = ir.Graph(
            [x],
            [out],
            nodes=[transposed, product, last],
            initializers=[weight],
            opset_imports={"": 23},
            name="g",
        )
        ranges: Mapping[ir.Value, float] = {} if self.largest is None else {x: self.largest}
        rewriter = Rewriter(graph, self.activations, ranges)
        pieces = [
            rewriter.constant(
                ir.tensor(content, dtype=piece.dtype, name=f"layer.weight.{piece.name}"),
                f"layer.weight.{piece.name}",
            )
            for piece, content in zip(
                load_scheme(self.scheme).pieces(self._weight), self.pieces.values(), strict=True
            )
        ]
        ((found, _),) = products_of(weight, "layer.weight")
        rewriter.replace(found, load_scheme(self.scheme).nodes(found, pieces, rewriter))
        graph.remove(transposed, safe=True)
        graph.initializers.pop("layer.weight")
        return ir.Model(graph, ir_version=11)
