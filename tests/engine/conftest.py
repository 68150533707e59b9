"""Small graphs with the shape of real ones: a decoder with a cache written in place, a pruning tower, a splice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gap_export.bundle.spec import Dim, DType, GraphSpec, TensorSpec

HEADS, HEAD_SIZE, HIDDEN, CAPACITY, VOCABULARY = 4, 16, 32, 32, 40
ONNX_TYPES: dict[DType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
NUMPY_TYPES: dict[DType, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
}
BATCH = Dim(name="batch", minimum=1, optimum=1, maximum=2)
SEQUENCE = Dim(name="sequence", minimum=1, optimum=8, maximum=24)

GraphMaker = Callable[..., tuple[Path, GraphSpec]]


class GraphBuilder:
    """Collects nodes and initializers; every operator call returns the name of its output."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, dtype: DType, *shape: int) -> str:
        return self.constant(self._random.standard_normal(shape) * 0.1, NUMPY_TYPES[dtype])

    def op(
        self, kind: str, *inputs: str, to: str | None = None, name: str | None = None, **attributes: Any
    ) -> str:
        output = to or f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [output], name=name or f"node_{output}", **attributes)
        self.nodes.append(node)
        return output

    def cast(self, value: str, dtype: DType, *, to: str | None = None) -> str:
        output = to or f"cast_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node("Cast", [value], [output], name=f"node_{output}", to=ONNX_TYPES[dtype])
        )
        return output

    def save(self, path: Path, *, external: bool = False) -> Path:
        def info(tensor: TensorSpec) -> onnx.ValueInfoProto:
            shape = [dim if isinstance(dim, int) else dim.name for dim in tensor.shape]
            return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], shape)

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [info(t) for t in self.inputs],
            [info(t) for t in self.outputs],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(
            model, path, save_as_external_data=external, location=f"{path.stem}.weights", size_threshold=64
        )
        return path


def decoder_spec(dtype: DType = "float16", *, layers: int = 1, capacity: int | Dim = CAPACITY) -> GraphSpec:
    def tensor(name: str, kind: DType, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=kind, shape=shape)

    def cache(when: str) -> list[TensorSpec]:
        shape = (BATCH, HEADS, capacity, HEAD_SIZE)
        return [
            tensor(f"{when}.{layer}.{part}", dtype, *shape)
            for layer in range(layers)
            for part in ("key", "value")
        ]

    past, present = cache("past"), cache("present")
    return GraphSpec(
        name="decoder",
        inputs=(
            tensor("inputs_embeds", dtype, BATCH, SEQUENCE, HIDDEN),
            tensor("position_ids", "int64", BATCH, SEQUENCE),
            tensor("write_index", "int64", BATCH),
            tensor("last_index", "int64", BATCH),
            *past,
        ),
        outputs=(tensor("logits", "float32", BATCH, VOCABULARY), *present),
        aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
    )


def decoder_builder(spec: GraphSpec) -> GraphBuilder:
    """Decomposed RoPE in fp32, TensorScatter into the cache, one-output Attention with a mask made from slots."""
    dtype, layers = spec.inputs[0].dtype, len(spec.aliased) // 2
    g = GraphBuilder(spec.inputs, spec.outputs)
    zero, one, two, last = g.constant([0]), g.constant([1]), g.constant([2]), g.constant([3])
    half, whole = g.constant([HEAD_SIZE // 2]), g.constant([HEAD_SIZE])

    frequency = 100.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angle = g.op(
        "Mul", g.cast(g.op("Unsqueeze", "position_ids", two), "float32"), g.constant(frequency, np.float32)
    )
    angle = g.op("Unsqueeze", g.op("Concat", angle, angle, axis=-1), one)
    cos, sin = g.cast(g.op("Cos", angle), dtype), g.cast(g.op("Sin", angle), dtype)

    length = g.op("Squeeze", g.op("Gather", g.op("Shape", "inputs_embeds"), one, axis=0), zero)
    steps = g.op("Unsqueeze", g.op("Range", g.constant(0), length, g.constant(1)), zero)
    query_slots = g.op("Add", g.op("Unsqueeze", "write_index", one), steps)
    key_slots = g.constant(np.arange(CAPACITY).reshape(1, 1, CAPACITY))
    mask = g.op("Unsqueeze", g.op("LessOrEqual", key_slots, g.op("Unsqueeze", query_slots, two)), one)

    def heads(x: str) -> str:
        projected = g.op("MatMul", x, g.weight(dtype, HIDDEN, HEADS * HEAD_SIZE))
        split = g.op("Reshape", projected, g.constant([0, 0, HEADS, HEAD_SIZE]))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotated(x: str) -> str:
        left, right = g.op("Slice", x, zero, half, last), g.op("Slice", x, half, whole, last)
        turned = g.op("Concat", g.op("Neg", right), left, axis=-1)
        return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))

    hidden = "inputs_embeds"
    for layer in range(layers):
        query, fresh = rotated(heads(hidden)), {"key": rotated(heads(hidden)), "value": heads(hidden)}
        for part, value in fresh.items():
            inputs = (f"past.{layer}.{part}", value, "write_index")
            g.op(
                "TensorScatter", *inputs, to=f"present.{layer}.{part}", name=f"scatter_{layer}_{part}", axis=2
            )
        attended = g.op(
            "Attention",
            *(query, f"present.{layer}.key", f"present.{layer}.value", mask),
            name=f"attention_{layer}",
            is_causal=0,
        )
        merged = g.op("Transpose", attended, perm=[0, 2, 1, 3])
        merged = g.op("Reshape", merged, g.constant([0, 0, HEADS * HEAD_SIZE]))
        hidden = g.op("Add", hidden, g.op("MatMul", merged, g.weight(dtype, HEADS * HEAD_SIZE, HIDDEN)))
    row = g.op("Unsqueeze", g.op("Unsqueeze", "last_index", one), two)
    row = g.op("Expand", row, g.constant([1, 1, HIDDEN]))
    row = g.op("Squeeze", g.op("GatherElements", hidden, row, axis=1), one)
    g.cast(g.op("MatMul", row, g.weight(dtype, HIDDEN, VOCABULARY)), "float32", to="logits")
    return g


@pytest.fixture
def make_decoder(tmp_path: Path) -> GraphMaker:
    """`make_decoder(dtype, external=False, **spec)` -> (path, spec)."""

    def make(dtype: DType = "float16", *, external: bool = False, **options: Any) -> tuple[Path, GraphSpec]:
        spec = decoder_spec(dtype, **options)
        return decoder_builder(spec).save(tmp_path / "decoder.onnx", external=external), spec

    return make


@pytest.fixture
def make_graph(tmp_path: Path) -> GraphMaker:
    """`make_graph(inputs, outputs, fill)` -> (path, spec); `fill` adds nodes to a `GraphBuilder`."""

    def make(
        inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], fill: Callable[[GraphBuilder], None]
    ) -> tuple[Path, GraphSpec]:
        spec = GraphSpec(name="vision", inputs=tuple(inputs), outputs=tuple(outputs))
        builder = GraphBuilder(inputs, outputs)
        fill(builder)
        return builder.save(tmp_path / "graph.onnx"), spec

    return make
