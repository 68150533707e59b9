"""Weights by reference: initializers point into the checkpoint's own files; only what must change is written.

A safetensors file is raw tensor bytes at known offsets, which is exactly what ONNX external data refers to. So the
checkpoint's file is hard-linked into the bundle and every initializer becomes (file, offset, length). Where the element
type differs from the bundle's precision, the tensor is converted, some rows at a time, into a file of the bundle's own; so are
weights that a family computes from stored ones (`checkpoint.Derived`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import Derived, TensorHeader, WeightLocation, lay_out
from gap_export.errors import CheckpointError, MissingRequirementError, TraceError
from gap_export.files import place_file, writing
from gap_export.graph.trace import is_fake
from gap_export.modeling.components import Component
from gap_export.precision import ACTIVATIONS, Activations

_NUMPY = {"F64": np.dtype(np.float64)} | {each.safetensors: np.dtype(each.dtype) for each in ACTIVATIONS}
"""Types that weights may be stored in."""
_CHUNK_ELEMENTS = 4 * 2**20


@dataclass
class WeightStore:
    """Puts the weights that graphs ask for into a bundle folder, each once.

    Attributes:
        checkpoint: where they come from.
        activations: element type they must have, those excepted that are quantised.
        folder: the bundle being built.
        self_contained: copy instead of linking.
        written_bytes: bytes newly written so far (links cost none).
    """

    checkpoint: Checkpoint
    activations: Activations
    folder: Path
    self_contained: bool = False
    written_bytes: int = 0
    _placed: dict[Path, str] = field(default_factory=dict)
    _converted: dict[str, WeightLocation] = field(default_factory=dict)

    def prepare(self, keys: list[str]) -> None:
        """Convert or compute, in one file, all tensors that are not stored as they are wanted.

        Raises:
            CheckpointError: a tensor that cannot be represented (overflow, or not a floating-point type).
            MissingRequirementError: no space on the disk.
        """
        wanted = self.activations.safetensors
        weights = self.checkpoint.weights
        foreign = [key for key in dict.fromkeys(keys) if not _is_stored_as(weights[key], wanted)]
        if foreign:
            path = self.folder / f"weights-{self.activations.name}.safetensors"
            self._converted = self._write_converted(path, foreign, wanted)

    def tensor(self, key: str, name: str) -> ir.ExternalTensor:
        """An initializer that refers to the weight's bytes in the bundle folder."""
        location = self._converted.get(key) or self.checkpoint.stored(key)
        return ir.ExternalTensor(
            location=self._place(location.file),
            offset=location.offset,
            length=location.length,
            dtype=ir.DataType[self.activations.onnx],
            shape=ir.Shape(location.shape),
            name=name,
            base_dir=str(self.folder),
        )

    def stand_in(self, key: str, name: str) -> ir.ExternalTensor:
        """Shape and type of a weight, and no bytes."""
        shape = self.checkpoint.weights[key].shape
        return ir.ExternalTensor(
            location="quantized",
            offset=0,
            length=0,
            dtype=ir.DataType[self.activations.onnx],
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.folder),
        )

    def _place(self, file: Path) -> str:
        if file.parent == self.folder:
            return file.name
        if file not in self._placed:
            # Checkpoints that a model is joined from may use one name for different files.
            name = file.name if file.name not in self._placed.values() else f"{file.parent.name}-{file.name}"
            self.written_bytes += place_file(file, self.folder / name, copy=self.self_contained)
            self._placed[file] = name
        return self._placed[file]

    def _write_converted(self, path: Path, keys: list[str], wanted: str) -> dict[str, WeightLocation]:
        width = _NUMPY[wanted].itemsize
        parts = []
        for key in keys:
            source = self.checkpoint.weights[key]
            _check_type(source, key)
            elements = int(np.prod(source.shape, dtype=np.int64))
            parts.append(TensorHeader(key, wanted, source.shape, elements * width))
        head, offsets, _ = lay_out(parts)
        converted: dict[str, WeightLocation] = {}
        with (
            writing(path, kind=MissingRequirementError, hint="free disk space and build again"),
            path.open("wb") as out,
        ):
            out.write(head)
            for part in parts:
                offset = offsets[part.name]
                out.seek(offset)
                self._stream(part.name, out.write, wanted)
                converted[part.name] = WeightLocation(path, wanted, part.shape, offset, part.length)
            self.written_bytes += out.tell()
        return converted

    def _stream(self, key: str, write: Callable[[bytes], object], wanted: str) -> None:
        """Convert or compute one tensor in pieces of a few megabytes."""
        source = self.checkpoint.weights[key]
        stored = [_mapped(each) for each in _stored_sources(source)]
        # A scalar is one row.
        rows, row_elements = (source.shape or (1,))[0], int(np.prod(source.shape[1:], dtype=np.int64))
        step = max(1, _CHUNK_ELEMENTS // max(1, row_elements))
        for start in range(0, rows, step):
            piece = _rows_of(source, stored, slice(start, min(start + step, rows)))
            with np.errstate(over="ignore"):
                changed = piece.astype(_NUMPY[wanted])
            if not np.isfinite(changed.astype(np.float32)).all() and np.isfinite(piece).all():
                raise CheckpointError(
                    f"{key} has values up to {np.abs(piece).max():g}, beyond what {self.activations.name} can hold",
                    subject=str(source.file),
                    hint="use --precision bf16 or fp32",
                )
            write(changed.tobytes())


class WeightReader:
    """Rows of one weight in float32, whatever it is stored as or computed from; nothing is held.

    Args:
        checkpoint: where it lies.
        key: of the weight.
    """

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self._weight = checkpoint.weights[key]
        self._stored = [_mapped(each) for each in _stored_sources(self._weight)]

    def rows(self, rows: slice) -> NDArray[np.float32]:
        """Some of them."""
        return _rows_of(self._weight, self._stored, rows)


def check_weights(checkpoint: Checkpoint, components: Collection[Component]) -> None:
    """Refuse a checkpoint whose headers do not have what the components need, before anything is traced.

    The graph of a tower may do without some of its module's weights (layers above the one that is read), which checkpoints leave out:
    there, only a part of which nothing is stored is missed. What the graph does need is looked up again when it is there.

    Raises:
        CheckpointError: a weight is missing, of another shape than the config implies, or no floating-point type.
    """
    for component in components:
        whole = component.spec.name != "vision"
        left: dict[str, CheckpointError] = {}
        found: set[str] = set()
        for name, parameter in component.module.named_parameters():
            try:
                key = component.weight_key(name)
            except CheckpointError as error:
                if whole:
                    raise
                left.setdefault(name.partition(".")[0], error)
                continue
            found.add(name.partition(".")[0])
            _check_shape(checkpoint, key, list(parameter.shape))
            _check_type(checkpoint.weights[key], key)
        for part, missing in left.items():
            if part not in found:
                raise missing


def _check_shape(checkpoint: Checkpoint, key: str, wanted: list[Any]) -> None:
    shape = list(checkpoint.weights[key].shape)
    if shape != wanted:
        raise CheckpointError(
            f"{key} has shape {shape} where config.json implies {wanted}",
            subject=str(checkpoint.folder),
            hint="config and weights do not belong together",
        )


def _check_type(weight: WeightLocation | Derived, key: str) -> None:
    foreign = [each.dtype for each in _stored_sources(weight) if each.dtype not in _NUMPY]
    if foreign:
        raise CheckpointError(
            f"{key} is stored as {foreign[0]}, which is quantised or no weight at all",
            subject=str(weight.file),
            hint="use a checkpoint in fp32, fp16 or bf16",
        )


def _is_stored_as(weight: WeightLocation | Derived, wanted: str) -> bool:
    return isinstance(weight, WeightLocation) and weight.dtype == wanted


def _stored_sources(weight: WeightLocation | Derived) -> tuple[WeightLocation, ...]:
    return (weight,) if isinstance(weight, WeightLocation) else weight.sources


def _mapped(location: WeightLocation) -> NDArray[Any]:
    """The tensor as it lies in its file; nothing is read yet."""
    return np.memmap(
        location.file,
        dtype=_NUMPY[location.dtype],
        mode="r",
        offset=location.offset,
        shape=location.shape or (1,),
    )


def _rows_of(
    weight: WeightLocation | Derived, stored: list[NDArray[Any]], rows: slice
) -> NDArray[np.float32]:
    if isinstance(weight, WeightLocation):
        return stored[0][rows].astype(np.float32)
    return np.ascontiguousarray(weight.rule(stored, rows), np.float32)


def parameters_of(model: ir.Model) -> list[str]:
    """Names of the initializers that are parameters of the traced module."""
    return [name for name, value in model.graph.initializers.items() if is_fake(value.const_value)]


def attach_weights(
    model: ir.Model,
    store: WeightStore,
    weight_key: Callable[[str], str],
    *,
    stand_ins: Collection[str] = (),
) -> None:
    """Replace every fake initializer by a reference into the bundle's weight files.

    Args:
        model: a traced graph; changed in place.
        store: prepared for the keys of this graph.
        weight_key: parameter name -> checkpoint key.
        stand_ins: parameters that are about to be quantised, and get a tensor that nothing may read.

    Raises:
        CheckpointError: a weight whose shape is not what the config says.
    """
    for name in parameters_of(model):
        value = model.graph.initializers[name]
        key = weight_key(name)
        tensor = store.stand_in(key, name) if name in stand_ins else store.tensor(key, name)
        _check_shape(store.checkpoint, key, [] if value.shape is None else list(value.shape))
        value.const_value = tensor
    left = parameters_of(model)
    if left:
        raise TraceError("weights were not attached", subject=", ".join(left[:3]), hint="please report this")
