"""Low precision in standard operators: matrix products whose weights are whole numbers, activations and everything else are floats.

    int8    DynamicQuantizeLinear -> MatMulInteger -> scale. One scale per column of the weight, one per call for activations, found while
            running; towers and decoders.
    int4    DequantizeLinear in blocks of 32 along the input -> MatMul, in the decoder; its head as above, towers in float32. Runtimes read
            four bits and multiply in one go (ONNX Runtime: `MatMulNBits`).
    int4-fp16   the same blocks in half precision throughout, head and towers included: what engines take.

Rounding is to nearest, symmetric about zero; a block of int4 is scaled by its extreme value, which becomes -8 (as llama.cpp's Q4_0).
Weights are written once, turned so that nothing is turned while running, some rows at a time: a 7B model takes no more memory than
its largest matrix.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from gap_export.bundle import Precision
from gap_export.checkpoint import Checkpoint
from gap_export.errors import EnvironmentLacks, TraceError
from gap_export.graph.weights import WeightReader
from gap_export.spec import Component
from gap_export.weight_files import Part, lay_out

Scheme = Literal["int8", "int4"]

BLOCK = 32
FILE = "weights-quantized.safetensors"

_DECODERS = ("decoder", "prefill", "decode")
_HEAD = "lm_head.weight"
_STEP_ELEMENTS = 4 * 2**20
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a block's extreme that -8 may stand for: cutting the extreme off a little often rounds the other 31 better."""


def schemes_of(component: Component, precision: Precision, parameters: Collection[str]) -> dict[str, Scheme]:
    """Parameter -> how it is quantised; empty for precisions that quantise nothing.

    Args:
        component: to be traced; weights of its linear layers are meant, and no others.
        precision: of the bundle.
        parameters: that the traced graph has.
    """
    if precision not in ("int8", "int4", "int4-fp16"):
        return {}
    shapes = {
        f"{name}.weight": module.weight.shape
        for name, module in component.module.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in parameters
    }
    if precision == "int8":
        return dict.fromkeys(shapes, "int8")
    if component.spec.name not in _DECODERS:
        return {}
    in_blocks = {
        name: not name.endswith(_HEAD) and columns % 2 == 0 and inner % BLOCK == 0
        for name, (columns, inner) in shapes.items()
    }
    if precision == "int4-fp16":
        return {name: "int4" for name, fits in in_blocks.items() if fits}
    return {name: "int4" if fits else "int8" for name, fits in in_blocks.items()}


@dataclass(frozen=True)
class _Place:
    """Where one part of a quantised weight lies in the file."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass
class QuantizedStore:
    """Writes quantised weights into a bundle folder, each once.

    Attributes:
        checkpoint: where they come from.
        folder: the bundle being built.
        half: whether scales are in fp16, as activations are then.
        written_bytes: so far.
    """

    checkpoint: Checkpoint
    folder: Path
    half: bool = False
    written_bytes: int = 0
    _places: dict[tuple[str, Scheme], tuple[_Place, _Place]] = field(default_factory=dict)

    def prepare(self, wanted: Mapping[str, Scheme]) -> None:
        """Quantise all weights that are asked for, in one file.

        Args:
            wanted: checkpoint key -> scheme.

        Raises:
            EnvironmentLacks: no room on the disk.
        """
        if not wanted:
            return
        parts = [part for key, scheme in wanted.items() for part in self._parts(key, scheme)]
        head, offsets, size = lay_out(parts)
        path = self.folder / FILE
        try:
            with path.open("wb") as out:
                out.write(head)
                out.truncate(size)
            for key, scheme in wanted.items():
                data, scale = self._parts(key, scheme)
                columns, inner = self.checkpoint.weights[key].shape
                number = ir.DataType.INT8 if scheme == "int8" else ir.DataType.INT4
                self._places[key, scheme] = (
                    _Place(number, (inner, columns), offsets[data.name], data.length),
                    _Place(
                        ir.DataType.FLOAT16 if self.half else ir.DataType.FLOAT,
                        scale.shape,
                        offsets[scale.name],
                        scale.length,
                    ),
                )
                self._write(path, key, scheme)
        except OSError as error:
            raise EnvironmentLacks(
                f"could not be written: {error.strerror}",
                subject=str(path),
                hint="free disk space and build again",
            ) from error
        self.written_bytes = size

    def _parts(self, key: str, scheme: Scheme) -> tuple[Part, Part]:
        """(numbers, scales) of a weight, as they are stored."""
        columns, inner = self.checkpoint.weights[key].shape
        scale = (columns,) if scheme == "int8" else (inner // BLOCK, columns)
        kind, width = ("F16", 2) if self.half else ("F32", 4)
        scales = Part(f"{key}.scale", kind, scale, width * math.prod(scale))
        if scheme == "int8":
            return Part(f"{key}.int8", "I8", (inner, columns), inner * columns), scales
        packed = inner * columns // 2  # safetensors knows no four bits
        return Part(f"{key}.int4", "U8", (packed,), packed), scales

    def tensors(self, key: str, scheme: Scheme) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """(numbers, scales) of a weight."""
        data, scale = (
            ir.ExternalTensor(
                location=FILE,
                offset=place.offset,
                length=place.length,
                dtype=place.dtype,
                shape=ir.Shape(place.shape),
                name=f"{key}.{part}",
                base_dir=str(self.folder),
            )
            for part, place in zip((scheme, "scale"), self._places[key, scheme], strict=True)
        )
        return data, scale

    def _write(self, path: Path, key: str, scheme: Scheme) -> None:
        data, scale = self._places[key, scheme]
        columns, inner = self.checkpoint.weights[key].shape
        step = 2 * max(1, _STEP_ELEMENTS // inner // 2)
        packed = columns if scheme == "int8" else columns // 2
        numbers = np.memmap(path, np.uint8, "r+", offset=data.offset, shape=(inner, packed))
        kind = np.float16 if self.half else np.float32
        scales = np.memmap(path, kind, "r+", offset=scale.offset, shape=scale.shape)
        read = WeightReader(self.checkpoint, key)
        for start in range(0, columns, step):
            rows_NK = read.rows(slice(start, min(start + step, columns)))
            if scheme == "int8":
                quantized_NK, scales_N = int8_rows(rows_NK)
                numbers[:, start : start + step] = quantized_NK.T.view(np.uint8)
                scales[start : start + step] = scales_N
            else:
                quantized_NK, scales_NB = int4_rows(rows_NK, kind)
                numbers[:, start // 2 : (start + step) // 2] = packed_pairs(quantized_NK).T
                scales[:, start : start + step] = scales_NB.T


def int8_rows(rows_NK: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([N, K] int8 in -127..127, [N] float32 scales); their product is nearest to the rows."""
    scales_N = _never_zero(np.abs(rows_NK).max(axis=1) / 127)
    return np.clip(np.rint(rows_NK / scales_N[:, None]), -127, 127).astype(np.int8), scales_N


def int4_rows(
    rows_NK: NDArray[np.float32], kind: type[np.floating[Any]] = np.float32
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([N, K] int8 in -8..7, [N, K / 32] float32 scales, which have the sign that makes a block's extreme -8).

    Args:
        rows_NK: of the weight.
        kind: what scales are stored in: weights are rounded to what they will be multiplied with.
    """
    columns, inner = rows_NK.shape
    blocks_NBL = rows_NK.reshape(columns, inner // BLOCK, BLOCK)
    place_NB1 = np.abs(blocks_NBL).argmax(axis=2)[..., None]
    extreme_NB1 = np.take_along_axis(blocks_NBL, place_NB1, axis=2)
    wholes, steps, losses = [], [], []
    for shrunk in _SHRUNK:
        step_NB1 = _never_zero((extreme_NB1 * (shrunk / -8)).astype(kind))
        whole_NBL = np.clip(np.rint(blocks_NBL / step_NB1), -8, 7)
        losses.append(np.square(whole_NBL * step_NB1 - blocks_NBL).sum(axis=2, keepdims=True))
        wholes.append(whole_NBL.astype(np.int8))
        steps.append(step_NB1)
    best_1NB1 = np.stack(losses).argmin(axis=0)[None]
    quantized_NBL, scales_NB1 = (
        np.take_along_axis(np.stack(tried), best_1NB1, axis=0)[0] for tried in (wholes, steps)
    )
    return quantized_NBL.reshape(columns, inner), scales_NB1[..., 0]


def _never_zero(scales: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """One where there is nothing to scale, or so little that its scale is no number in float32 any more."""
    return np.asarray(np.where(scales != 0, scales, 1), np.float32)


def packed_pairs(quantized_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """[N / 2, K] uint8: two neighbours of a column in one byte, the first in its low half, as ONNX packs four-bit numbers."""
    halves = quantized_NK.view(np.uint8) & 0xF
    return (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)


def quantize(
    model: ir.Model, schemes: Mapping[str, Scheme], keys: Mapping[str, str], store: QuantizedStore
) -> None:
    """Replace matrix products with weights that were quantised; in place.

    Args:
        model: simplified; weights that are quantised have stand-ins, which vanish.
        schemes: parameter -> scheme.
        keys: parameter -> checkpoint key.
        store: prepared for those keys.

    Raises:
        TraceError: such a weight is used in another way than a linear layer uses it.
    """
    activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for name, scheme in schemes.items():
        weight = model.graph.initializers.get(name)
        if weight is None:  # a layer that does not reach an output
            continue
        data, scale = (
            _initializer(model, tensor, f"{name}.{part}")
            for tensor, part in zip(store.tensors(keys[name], scheme), (scheme, "scale"), strict=True)
        )
        for product, turned in _products(weight, name):
            if scheme == "int8":
                _integer_product(model.graph, product, data, scale, activations)
            else:
                _block_product(model.graph, product, data, scale)
            if turned is not None and not turned.outputs[0].consumers():
                model.graph.remove(turned, safe=True)
        model.graph.initializers.pop(name)


def _products(weight: ir.Value, name: str) -> list[tuple[ir.Node, ir.Node | None]]:
    """(product, what turns the weight for it) of every linear layer that has this weight."""
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


def _initializer(model: ir.Model, tensor: ir.ExternalTensor, name: str) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _integer_product(
    graph: ir.Graph,
    product: ir.Node,
    data: ir.Value,
    scale: ir.Value,
    activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]],
) -> None:
    given, out = product.inputs[0], product.outputs[0]
    assert given is not None
    if given not in activations:  # one for all products of the same activations
        node = ir.node("DynamicQuantizeLinear", [given], num_outputs=3)
        node.outputs[0].shape, node.outputs[0].type = given.shape, ir.TensorType(ir.DataType.UINT8)
        graph.insert_before(product, [node])
        activations[given] = node.outputs[0], node.outputs[1], node.outputs[2]
    numbers, step, zero = activations[given]
    whole = ir.node("MatMulInteger", [numbers, data, zero])
    whole.outputs[0].shape, whole.outputs[0].type = out.shape, ir.TensorType(ir.DataType.INT32)
    real = ir.node("Cast", [whole.outputs[0]], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [step, scale])
    scaled = ir.node("Mul", [real.outputs[0], both.outputs[0]])
    _replace(graph, product, [whole, real, both, scaled])


def _block_product(graph: ir.Graph, product: ir.Node, data: ir.Value, scale: ir.Value) -> None:
    real = ir.node("DequantizeLinear", [data, scale], {"axis": 0, "block_size": BLOCK})
    real.outputs[0].shape, real.outputs[0].type = data.shape, scale.type
    _replace(graph, product, [real, ir.node("MatMul", [product.inputs[0], real.outputs[0]])])


def _replace(graph: ir.Graph, product: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of a product, and add what a Gemm adds."""
    if len(product.inputs) > 2 and product.inputs[2] is not None:
        nodes = [*nodes, ir.node("Add", [nodes[-1].outputs[0], product.inputs[2]])]
    made, out = nodes[-1].outputs[0], product.outputs[0]
    made.shape, made.type = out.shape, out.type
    ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [out], [made])
