"""What a graph takes and gives: names, element types, shapes with named dimensions.

A spec is stored in the bundle's manifest, checked by the runtimes, and turned into dynamic shapes for tracing and
into TensorRT profiles. One definition serves all three.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gap_export.records import Record

DType = Literal["float32", "float16", "bfloat16", "int64", "bool"]
GraphName = Literal["vision", "splice", "embed", "decoder", "prefill", "decode"]


class Dim(Record):
    """A named dimension that varies between calls, with the values an engine must serve.

    Attributes:
        name: one of `batch`, `text`, `kept`, `sequence`, ... (the symbol in the graph).
        minimum: smallest extent.
        optimum: the extent engines are tuned for.
        maximum: largest extent.
    """

    name: str
    minimum: int = Field(ge=1)
    optimum: int = Field(ge=1)
    maximum: int = Field(ge=1)


class TensorSpec(Record):
    """Name, element type and shape of one graph input or output.

    Attributes:
        name: in the graph.
        dtype: element type.
        shape: extents.
        extent_of: for a scalar whose *value* is the extent of a named dimension of other tensors (how many tokens to keep).
    """

    name: str
    dtype: DType
    shape: tuple[int | Dim, ...]
    extent_of: Dim | None = None

    def extents(self, which: Literal["minimum", "optimum", "maximum"]) -> tuple[int, ...]:
        """The shape with every named dimension at its minimum, optimum or maximum."""
        return tuple(d if isinstance(d, int) else int(getattr(d, which)) for d in self.shape)


def int64_spec(name: str, *shape: int | Dim) -> TensorSpec:
    """Of a tensor of integers."""
    return TensorSpec(name=name, dtype="int64", shape=shape)


def float_spec(name: str, dtype: DType, *shape: int | Dim) -> TensorSpec:
    """Of a tensor of floats of that type."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


class GraphSpec(Record):
    """Inputs and outputs of one graph.

    Attributes:
        name: which one. A bundle whose decoder drops tokens has `prefill` and `decode` in the place of `decoder`.
        inputs: in graph order.
        outputs: in graph order.
        aliased: output name -> input name of tensors that share one buffer at run time (the cache).
    """

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliased: dict[str, str] = Field(default_factory=dict)
