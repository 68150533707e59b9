"""Weights of few bits, written into the bundle's own file.

They are written once, turned so that nothing is turned while running, some rows at a time: a 7B model takes no more memory than its
largest matrix.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import Part, lay_out
from gap_export.errors import MissingRequirementError
from gap_export.files import writing
from gap_export.graph.rounding import (
    BLOCK,
    FP4_BLOCK,
    fp8_rows,
    int4_rows,
    int8_rows,
    nvfp4_rows,
    nvfp4_whole,
    packed_pairs,
)
from gap_export.graph.weights import WeightReader

Scheme = Literal["int8", "int4", "fp8", "nvfp4"]

FILE = "weights-quantized.safetensors"
_STEP_ELEMENTS = 4 * 2**20
_STORED = {
    ir.DataType.FLOAT: ("F32", 4),
    ir.DataType.FLOAT16: ("F16", 2),
    ir.DataType.INT8: ("I8", 1),
    ir.DataType.FLOAT8E4M3FN: ("F8_E4M3", 1),
}
"""Element type -> safetensors' name of it, and bytes of one."""
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
"""Two of them in a byte: safetensors knows no such type."""


@dataclass(frozen=True)
class _Piece:
    """One tensor of a quantised weight: its numbers, their scales, or the scale of those.

    Attributes:
        name: what it is called after the weight's key.
        dtype: of its elements.
        shape: as graphs see it.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    def stored(self, key: str) -> Part:
        """How it lies in the file."""
        elements = math.prod(self.shape)
        if self.dtype in _FOUR_BITS:
            return Part(f"{key}.{self.name}", "U8", (elements // 2,), elements // 2)
        kind, width = _STORED[self.dtype]
        return Part(f"{key}.{self.name}", kind, self.shape, elements * width)


def _pieces(scheme: Scheme, columns: int, inner: int, real: ir.DataType) -> tuple[_Piece, ...]:
    """What a weight of that shape becomes, `real` being the type of scales that multiply activations."""
    turned = (inner, columns)
    if scheme == "int8":
        return _Piece("int8", ir.DataType.INT8, turned), _Piece("scale", real, (columns,))
    if scheme == "int4":
        return _Piece("int4", ir.DataType.INT4, turned), _Piece("scale", real, (inner // BLOCK, columns))
    if scheme == "fp8":
        return _Piece("fp8", ir.DataType.FLOAT8E4M3FN, turned), _Piece("scale", real, (columns,))
    return (
        _Piece("fp4", ir.DataType.FLOAT4E2M1, turned),
        _Piece("scale", ir.DataType.FLOAT8E4M3FN, (inner // FP4_BLOCK, columns)),
        _Piece("whole", ir.DataType.FLOAT, ()),
    )


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
    _offsets: dict[str, int] = field(default_factory=dict)

    def prepare(self, wanted: Mapping[str, Scheme]) -> None:
        """Quantise all weights that are asked for, in one file.

        Args:
            wanted: checkpoint key -> scheme.

        Raises:
            MissingRequirementError: no room on the disk.
        """
        if not wanted:
            return
        parts = [
            piece.stored(key) for key, scheme in wanted.items() for piece in self._pieces_of(key, scheme)
        ]
        head, self._offsets, size = lay_out(parts)
        path = self.folder / FILE
        with writing(path, kind=MissingRequirementError, hint="free disk space and build again"):
            with path.open("wb") as out:
                out.write(head)
                out.truncate(size)
            for key, scheme in wanted.items():
                self._write(path, key, scheme)
        self.written_bytes = size

    def tensors(self, key: str, scheme: Scheme) -> dict[str, ir.ExternalTensor]:
        """The tensors of a weight: `int8`, `int4`, `fp8` or `fp4`; `scale`; and `whole` where scales have a scale."""
        return {
            piece.name: ir.ExternalTensor(
                location=FILE,
                offset=self._offsets[f"{key}.{piece.name}"],
                length=piece.stored(key).length,
                dtype=piece.dtype,
                shape=ir.Shape(piece.shape),
                name=f"{key}.{piece.name}",
                base_dir=str(self.folder),
            )
            for piece in self._pieces_of(key, scheme)
        }

    def _pieces_of(self, key: str, scheme: Scheme) -> tuple[_Piece, ...]:
        columns, inner = self.checkpoint.weights[key].shape
        return _pieces(scheme, columns, inner, ir.DataType.FLOAT16 if self.half else ir.DataType.FLOAT)

    def _write(self, path: Path, key: str, scheme: Scheme) -> None:
        columns = self.checkpoint.weights[key].shape[0]
        # What lies in the file, as bytes that NumPy has a type for; four bits lie in pairs of neighbouring columns.
        numbers_K, scales, *whole = (
            self._mapped(path, key, piece, columns // 2 if piece.dtype in _FOUR_BITS else columns)
            for piece in self._pieces_of(key, scheme)
        )
        kind = np.float16 if self.half else np.float32
        largest = self._largest(key) if scheme == "nvfp4" else 0.0
        for rows, rows_NK in self._rows(key):
            pairs = slice(rows.start // 2, rows.stop // 2)
            if scheme == "int8":
                numbers_NK, scales_N = int8_rows(rows_NK)
                numbers_K[:, rows], scales[rows] = numbers_NK.T.view(np.uint8), scales_N.astype(kind)
            elif scheme == "fp8":
                numbers_NK, scales_N = fp8_rows(rows_NK, kind)
                numbers_K[:, rows], scales[rows] = numbers_NK.T.view(np.uint8), scales_N.astype(kind)
            elif scheme == "int4":
                numbers_NK, scales_NB = int4_rows(rows_NK, kind)
                numbers_K[:, pairs], scales[:, rows] = packed_pairs(numbers_NK).T, scales_NB.T.astype(kind)
            else:
                numbers_NK, scales_NB = nvfp4_rows(rows_NK, nvfp4_whole(largest))
                numbers_K[:, pairs], scales[:, rows] = packed_pairs(numbers_NK).T, scales_NB.T.view(np.uint8)
        if whole:
            whole[0][...] = nvfp4_whole(largest)

    def _mapped(self, path: Path, key: str, piece: _Piece, columns: int) -> NDArray[Any]:
        """The bytes of a piece, to be written: floats as such, everything else as bytes [..., columns]."""
        floats = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}
        shape = (*piece.shape[:-1], columns) if piece.shape else (1,)
        kind = floats.get(piece.dtype, np.uint8)
        return np.memmap(path, kind, "r+", offset=self._offsets[f"{key}.{piece.name}"], shape=shape)

    def _rows(self, key: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """(which rows, [N, K] float32) of a weight, an even number at a time, as far as there are."""
        columns, inner = self.checkpoint.weights[key].shape
        step, read = 2 * max(1, _STEP_ELEMENTS // inner // 2), WeightReader(self.checkpoint, key)
        for start in range(0, columns, step):
            rows = slice(start, min(start + step, columns))
            yield rows, read.rows(rows)

    def _largest(self, key: str) -> float:
        return max(float(np.abs(rows_NK).max()) for _, rows_NK in self._rows(key))
