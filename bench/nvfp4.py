"""Which boxes does nvfp4 give? No CPU runs it, so its graphs are rewritten in standard operators, number for number. See README.md.

    python bench/nvfp4.py --ranges FILE [--model RECIPE] [--keep K] [--cases N] [--threads N] [--label TEXT] [--smoke]

The bundle and its baselines (other ids, nothing pruned) are built as an engine would get them. In each decoder four-bit weights become
the half-precision numbers that they stand for, and TensorRT's operator for activations becomes what its documentation says it does.
Then comes what `gap-export validate` does. What a GPU makes of the same graphs was not measured. The last line printed is the record,
also stored in bench/results/.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx_ir as ir
from rich.console import Console

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.report.terminal import print_parity
from gap_export.evaluation.validate import validate
from gap_export.graph.quantize import DECODERS
from gap_export.graph.quantize.nvfp4 import BLOCK, E2M1_MAX, ENGINE_DOMAIN
from gap_export.graph.quantize.rounding import E4M3_MAX
from gap_export.pipeline.build import build
from gap_export.progress import Stages
from gap_export.recipe.recipe import load_recipe
from gap_export.runtime.ort import OnnxRuntimeSession


def main() -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--ranges", type=Path, required=True, help="file of `gap-export calibrate`")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="48 cases, nothing stored")
    options = parser.parse_args()
    console = Console(stderr=True)
    recipe = load_recipe(options.model).replaced(
        precision="nvfp4", ranges=str(options.ranges.absolute()), keep=options.keep
    )
    with tempfile.TemporaryDirectory() as scratch, console.status("building") as status:
        folder = Path(scratch) / "bundle"
        build(recipe, folder, golden=False)
        report = validate(
            folder,
            limit=48 if options.smoke else options.cases,
            threads=options.threads,
            progress=Stages(status.update),
            opened=in_standard_operators,
        )
    print_parity(report, Console())
    measured = report.model_dump(mode="json", include={"measurement", "gates", "controls", "grounding"})
    return harness.finish("nvfp4", measured, label=options.label, ok=report.ok, store=not options.smoke)


def in_standard_operators(bundle: Bundle, backend: str, *, threads: int) -> OnnxRuntimeSession:
    """A session in half precision. The bundle's decoder is rewritten where it lies: it is a scratch copy."""
    for name, graph in bundle.manifest.graphs.items():
        if name in DECODERS:
            model = ir.load(bundle.folder / graph.file)
            rewrite(model)
            (bundle.folder / graph.file).write_bytes(ir.to_proto(model).SerializeToString())
    half = bundle.manifest.model_copy(update={"precision": "fp16"})
    return OnnxRuntimeSession(Bundle(bundle.folder, half), threads=threads)


def rewrite(model: ir.Model) -> None:
    """Replace four-bit floats; in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "TRT_FP4DynamicQuantize":
            _replace_quantizer(graph, node)
    for name, value in list(graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT4E2M1:
            _replace_weight(graph, value)
            del graph.initializers[name]
    model.opset_imports.pop(ENGINE_DOMAIN, None)


def _replace_weight(graph: ir.Graph, numbers: ir.Value) -> None:
    """DequantizeLinear(numbers, DequantizeLinear(scale, global_scale)) -> Cast becomes a constant."""
    (restored,) = numbers.consumers()
    scales = _made_by(restored.inputs[1])
    cast = _only_reader(restored)
    scale, global_scale = (_content(value) for value in scales.inputs[:2])
    weight_KN = _content(numbers) * np.repeat(scale * global_scale, BLOCK, axis=0)
    made = ir.Value(name=f"{numbers.name}.half", const_value=ir.tensor(weight_KN.astype(np.float16)))
    made.shape, made.type = numbers.shape, ir.TensorType(ir.DataType.FLOAT16)
    graph.register_initializer(made)
    cast.outputs[0].replace_all_uses_with(made)
    for node in (cast, restored, scales):
        graph.remove(node, safe=True)


def _replace_quantizer(graph: ir.Graph, low: ir.Node) -> None:
    """Quantise and restore, the four nodes from TensorRT's operator to the Cast, in steps that every runtime has."""
    given, step = low.inputs[0], low.inputs[1]
    (restored,) = low.outputs[0].consumers()
    (scales,) = low.outputs[1].consumers()
    cast = _only_reader(restored)
    made: list[ir.Node] = []

    def op(kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        node = ir.node(kind, [_constant(graph, each) for each in inputs], attributes)
        made.append(node)
        return node.outputs[0]

    real = op("Cast", given, to=ir.DataType.FLOAT)
    blocks = op("Reshape", real, np.array([0, 0, -1, BLOCK], np.int64))
    largest = op("ReduceMax", op("Abs", blocks), np.array([-1], np.int64), keepdims=1)
    wanted = op("Min", op("Div", op("Div", largest, np.float32(E2M1_MAX)), step), np.float32(E4M3_MAX))
    stored = op("Cast", op("Cast", wanted, to=ir.DataType.FLOAT8E4M3FN), to=ir.DataType.FLOAT)
    scale = op("Mul", stored, step)
    empty = op("Equal", scale, np.float32(0))
    safe = op("Where", empty, np.float32(1), scale)
    size = op("Min", op("Div", op("Abs", blocks), safe), np.float32(E2M1_MAX))
    # E2M1 has steps of a half below 2, of one below 4, of two above; Round goes to the even one, as E2M1 does.
    fine = op("Where", op("Less", size, np.float32(4)), np.float32(1), np.float32(2))
    fine = op("Where", op("Less", size, np.float32(2)), np.float32(0.5), fine)
    rounded = op("Mul", op("Round", op("Div", size, fine)), fine)
    back = op("Mul", op("Mul", rounded, op("Sign", blocks)), scale)
    half = op("Cast", op("Reshape", back, op("Shape", given)), to=ir.DataType.FLOAT16)
    half.shape, half.type = cast.outputs[0].shape, cast.outputs[0].type
    graph.insert_before(low, made)
    cast.outputs[0].replace_all_uses_with(half)
    for node in (cast, restored, scales, low):
        graph.remove(node, safe=True)


def _constant(graph: ir.Graph, value: Any) -> ir.Value:
    if isinstance(value, ir.Value):
        return value
    content = np.asarray(value)
    name = f"constant.{content.dtype}.{content.tolist()}"
    if name not in graph.initializers:
        made = ir.Value(name=name, const_value=ir.tensor(content))
        made.shape, made.type = ir.Shape(content.shape), ir.TensorType(made.const_value.dtype)
        graph.register_initializer(made)
    return graph.initializers[name]


def _content(value: ir.Value | None) -> Any:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def _made_by(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def _only_reader(node: ir.Node) -> ir.Node:
    (reader,) = node.outputs[0].consumers()
    return reader


if __name__ == "__main__":
    sys.exit(main())
