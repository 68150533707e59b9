"""Which nodes of a graph ONNX Runtime's CUDA provider has no kernel for, by the list in docs/cuda_kernels.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnx
from onnx import TensorProto, defs

RECORD = Path(__file__).parents[2] / "bench" / "results" / "cuda_kernels.json"
HALVES = ("float16", "bfloat16")
_NAMES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


@cache
def kernels() -> dict[str, dict[str, list[str]]]:
    """Operator -> name of a type in its schema -> element types."""
    found: dict[str, dict[str, list[str]]] = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    return found


@cache
def documented_operators() -> set[str]:
    """Those in the table of docs/cuda_kernels.md."""
    page = (RECORD.parents[2] / "docs" / "cuda_kernels.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def without_kernel(graph: Path, half: str = "float16") -> set[str]:
    """Operators of nodes without a kernel, with the type that is missing: `TensorScatter`, `Attention bfloat16`.

    Args:
        graph: an ONNX file.
        half: element type that its float16 tensors would have in a bundle of another precision.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False))
    return {missing for node in model.graph.node for missing in _missing(node, _types(model.graph), half)}


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        weight.name: weight.data_type for weight in graph.initializer
    }


def _missing(node: onnx.NodeProto, types: dict[str, int], half: str) -> Iterator[str]:
    if node.op_type not in kernels():
        yield node.op_type
        return
    schema = defs.get_schema(node.op_type, 24, "")
    for names, formal in ((node.input, list(schema.inputs)), (node.output, list(schema.outputs))):
        for number, name in enumerate(names):
            of = formal[min(number, len(formal) - 1)].type_str
            element = _NAMES.get(types.get(name, TensorProto.UNDEFINED), "")
            element = half if element == "float16" else element
            allowed = kernels()[node.op_type].get(of)
            if name and element and allowed and element not in allowed:
                yield f"{node.op_type} {element}"
