"""Weights of few bits, written into the bundle's own file.

They are written once, transposed so that nothing is transposed while running, some rows at a time: a 7B model takes no more memory
than its largest matrix.

Shape letters: N columns of the product (rows of the stored weight), K its inner extent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import TensorHeader, lay_out
from gap_export.errors import MissingRequirementError
from gap_export.files import writing
from gap_export.graph.quantize.calibration import Calibrate, Moments
from gap_export.graph.quantize.compensate import Shares, compensated
from gap_export.graph.quantize.rounding import packed_pairs
from gap_export.graph.quantize.scheme import BlockScheme, Piece, Scheme, Weight
from gap_export.graph.weights import WeightReader
from gap_export.precision import ACTIVATIONS, Activations

FILE = "weights-quantized.safetensors"
_STEP_ELEMENTS = 4 * 2**20
_SAFETENSORS = {ir.DataType[each.onnx]: each.safetensors for each in ACTIVATIONS} | {
    ir.DataType.INT8: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
}
"""Element type -> safetensors' name of it. Types that it has no name for lie there as bytes."""


@dataclass
class QuantizedStore:
    """Writes quantised weights into a bundle folder, each once.

    Attributes:
        checkpoint: where they come from.
        folder: the bundle being built.
        activations: element type of activations.
        written_bytes: so far.
    """

    checkpoint: Checkpoint
    folder: Path
    activations: Activations
    written_bytes: int = 0
    _offsets: dict[str, int] = field(default_factory=dict)

    def prepare(self, wanted: Mapping[str, Scheme], calibrate: Calibrate | None = None) -> None:
        """Quantise all weights that are asked for, in one file.

        Args:
            wanted: checkpoint key -> scheme.
            calibrate: hands over moments of linear layers; the rounding of their weights is compensated by them.

        Raises:
            MissingRequirementError: no space on the disk.
        """
        if not wanted:
            return
        parts = [
            _part(key, piece) for key, scheme in wanted.items() for piece in scheme.pieces(self._weight(key))
        ]
        head, self._offsets, size = lay_out(parts)
        path = self.folder / FILE
        with writing(path, kind=MissingRequirementError, hint="free disk space and build again"):
            with path.open("wb") as out:
                out.write(head)
                out.truncate(size)
            left = dict(wanted)

            def write_compensated(found: Moments) -> None:
                shares = Shares.of(found.moments_KK)
                for key in found.keys:
                    self._write(path, key, left.pop(key), shares)

            if calibrate is not None:
                calibrate(write_compensated)
            for key, scheme in left.items():
                self._write(path, key, scheme)
        self.written_bytes = size

    def tensors(self, key: str, scheme: Scheme) -> dict[str, ir.ExternalTensor]:
        """The tensors of a weight, by the names of the scheme's pieces, in their order."""
        return {
            piece.name: ir.ExternalTensor(
                location=FILE,
                offset=self._offsets[f"{key}.{piece.name}"],
                length=_part(key, piece).length,
                dtype=piece.dtype,
                shape=ir.Shape(piece.shape),
                name=f"{key}.{piece.name}",
                base_dir=str(self.folder),
            )
            for piece in scheme.pieces(self._weight(key))
        }

    def _weight(self, key: str) -> Weight:
        columns, inner = self.checkpoint.weights[key].shape
        return Weight(columns, inner, self.activations, functools.cache(lambda: self._largest(key)))

    def _write(self, path: Path, key: str, scheme: Scheme, shares: Shares | None = None) -> None:
        weight = self._weight(key)
        pieces = scheme.pieces(weight)
        stored = [_mapped(path, self._offsets[f"{key}.{piece.name}"], piece) for piece in pieces]
        for rows, rows_NK in self._rows(key):
            if shares is not None and isinstance(scheme, BlockScheme):
                rounded = compensated(rows_NK, shares, scheme, weight)
            else:
                rounded = scheme.encode(rows_NK, weight)
            for piece, out, encoded in zip(pieces, stored, rounded, strict=True):
                if not piece.shape:
                    out[...] = encoded
                elif _lies_in_pairs(piece):
                    out[..., rows.start // 2 : rows.stop // 2] = packed_pairs(encoded).T
                else:
                    out[..., rows] = encoded.T

    def _rows(self, key: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """(which rows, [N, K] float32) of a weight, an even number at a time, as far as there are."""
        columns, inner = self.checkpoint.weights[key].shape
        step, read = 2 * max(1, _STEP_ELEMENTS // inner // 2), WeightReader(self.checkpoint, key)
        for start in range(0, columns, step):
            rows = slice(start, min(start + step, columns))
            yield rows, read.rows(rows)

    def _largest(self, key: str) -> float:
        return max(float(np.abs(rows_NK).max()) for _, rows_NK in self._rows(key))


def _part(key: str, piece: Piece) -> TensorHeader:
    """How a piece of the weight of that key lies in the file."""
    length = math.prod(piece.shape) * piece.dtype.bitwidth // 8
    kind = _SAFETENSORS.get(piece.dtype)
    return TensorHeader(f"{key}.{piece.name}", kind or "U8", piece.shape if kind else (length,), length)


def _mapped(path: Path, offset: int, piece: Piece) -> NDArray[Any]:
    """The bytes of a piece, to be written: [..., N] of its type; [..., N / 2] bytes where two numbers lie in one."""
    if _lies_in_pairs(piece):
        *outer, columns = piece.shape
        return np.memmap(path, np.uint8, "r+", offset=offset, shape=(*outer, columns // 2))
    return np.memmap(path, piece.dtype.numpy(), "r+", offset=offset, shape=piece.shape)


def _lies_in_pairs(piece: Piece) -> bool:
    return piece.dtype.bitwidth == 4
