"""What a scheme is, and what it is given: a weight to round, a product to replace.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.graph.quantize.rounding import Grid, Importance
from gap_export.precision import Activations


@dataclass(frozen=True)
class Weight:
    """A weight of a linear layer, before it is quantised.

    Attributes:
        columns: N.
        inner: K.
        activations: element type of what it is multiplied with, and so of scales that multiply activations.
        largest: gives its largest magnitude; the whole weight is read for it, once.
    """

    columns: int
    inner: int
    activations: Activations
    largest: Callable[[], float]

    @property
    def float_type(self) -> ir.DataType:
        """The element type of activations, as ONNX calls it."""
        return ir.DataType[self.activations.onnx]


@dataclass(frozen=True)
class Piece:
    """One tensor of a quantised weight: its numbers, their scales, or the scale of those.

    Attributes:
        name: what it is called after the weight: unique within the weight.
        dtype: of its elements. Numbers of four bits lie in pairs, and need an even N.
        shape: as graphs see it: [..., N], transposed, so that nothing is transposed while running; or () for one number.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]


class Scheme(Protocol):
    """A module that quantises linear layers."""

    def fits(self, columns: int, inner: int) -> bool:
        """Whether a weight of N columns and inner extent K can be quantised."""
        ...

    def pieces(self, weight: Weight) -> tuple[Piece, ...]:
        """The tensors that a weight becomes."""
        ...

    def encode(self, rows_NK: NDArray[np.float32], weight: Weight) -> tuple[NDArray[Any], ...]:
        """Round some rows of a weight.

        Args:
            rows_NK: an even number of rows, but for the last of the weight.
            weight: that they belong to.

        Returns:
            One array per piece, [N, ...], that is, the transpose of the piece's part for these rows; numbers of four bits are not
            packed yet. A piece without a shape is the same number for all rows.
        """
        ...

    def nodes(self, product: ir.Node, pieces: Sequence[ir.Value], rewriter: Rewriter) -> list[ir.Node]:
        """What takes the place of a product.

        Args:
            product: MatMul or Gemm; what a Gemm adds is added by the caller.
            pieces: the weight's, in the graph.
            rewriter: of the graph the product is in.

        Returns:
            Nodes in order; the only output of the last is the product.
        """
        ...


@runtime_checkable
class BlockScheme(Scheme, Protocol):
    """A scheme whose numbers lie on a grid of even steps in every block of a row: it can be rounded column by column (`compensate.py`)."""

    @property
    def BLOCK(self) -> int:
        """Elements of a block; it divides K."""
        ...

    def grid(self, blocks_BL: NDArray[np.float32], weight: Weight, importance: Importance = 1.0) -> Grid:
        """The grid that loses least.

        Args:
            blocks_BL: [..., B, L] whole blocks, or [..., L] one of every row.
            weight: that they belong to.
            importance: what the squared error of each element of a block weighs.
        """
        ...

    def arranged(self, numbers_NK: NDArray[np.float32], grid: Grid) -> tuple[NDArray[Any], ...]:
        """What `encode` would give for rows that these are the numbers of.

        Args:
            numbers_NK: on the grid.
            grid: of [N, K / BLOCK] blocks.
        """
        ...


def load_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Args:
        name: of a module in this package; or, with dots in it, of a module anywhere.
    """
    scheme: Scheme = importlib.import_module(name if "." in name else f"{__package__}.{name}")
    return scheme


QuantizeActivations = Callable[[ir.Value, "Rewriter"], tuple[list[ir.Node], tuple[ir.Value, ...]]]
"""(activations, rewriter) -> (nodes in order, those of their outputs that products read)."""


class Rewriter:
    """What a scheme may do to a graph: add constants, and quantise activations once for all products that read them.

    Args:
        graph: changed in place.
        activations: element type of activations.
        ranges: largest magnitudes of activations, for schemes that need a scale beforehand.

    Attributes:
        graph: that is changed.
        float_type: element type of activations, as ONNX calls it.
    """

    def __init__(
        self, graph: ir.Graph, activations: Activations, ranges: Mapping[ir.Value, float] | None = None
    ) -> None:
        self.graph = graph
        self.float_type = ir.DataType[activations.onnx]
        self._ranges = dict(ranges or {})
        self._quantized: dict[tuple[ir.Value, QuantizeActivations], tuple[ir.Value, ...]] = {}

    def constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer; one of that name that is already there is taken again."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def number(self, content: float, name: str) -> ir.Value:
        """A constant float32 scalar of that name."""
        return self.constant(ir.tensor(np.array(content, np.float32)), name)

    def scale_of(self, activations: ir.Value, largest_number: float, dtype: ir.DataType) -> ir.Value:
        """A scalar scale of activations, from their range.

        Args:
            activations: whose range is known.
            largest_number: what the largest magnitude becomes when it is divided by the scale.
            dtype: of the scale.

        Returns:
            A constant; 1 where activations were zero throughout, or so small that the type knows no such scale.
        """
        content = np.asarray(self._ranges[activations] / largest_number, dtype.numpy())
        content = content if content > 0 else np.ones_like(content)
        return self.constant(ir.tensor(content), f"{activations.name}.scale")

    def quantized(self, product: ir.Node, quantize: QuantizeActivations) -> tuple[ir.Value, ...]:
        """The activations of a product in few bits. Products that read the same ones share the nodes that make them.

        Args:
            product: that is about to be replaced.
            quantize: a function of the scheme's module.
        """
        activations = activations_of(product)
        if (activations, quantize) not in self._quantized:
            nodes, outputs = quantize(activations, self)
            # Products are replaced in the order of their weights, which need not be that of the graph.
            first = next(node for node in self.graph if _multiplies(node, activations))
            self.graph.insert_before(first, nodes)
            self._quantized[activations, quantize] = outputs
        return self._quantized[activations, quantize]

    def replace(self, product: ir.Node, nodes: list[ir.Node]) -> None:
        """Put nodes in the place of a product, and add what a Gemm adds."""
        if len(product.inputs) > 2 and product.inputs[2] is not None:
            nodes = [*nodes, ir.node("Add", [nodes[-1].outputs[0], product.inputs[2]])]
        made, out = nodes[-1].outputs[0], product.outputs[0]
        made.shape, made.type = out.shape, out.type
        if out in self._ranges:  # another linear layer reads this one as it is
            self._ranges[made] = self._ranges[out]
        ir.convenience.replace_nodes_and_values(self.graph, product, [product], nodes, [out], [made])


def _multiplies(node: ir.Node, activations: ir.Value) -> bool:
    return node.op_type in ("MatMul", "Gemm") and node.inputs[0] is activations


def activations_of(product: ir.Node) -> ir.Value:
    """What a product multiplies its weight with."""
    activations = product.inputs[0]
    assert activations is not None
    return activations
