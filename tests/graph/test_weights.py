"""Weights by reference: right bytes, no copy; conversion where the precision differs, and what cannot be converted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import external_data_helper
from safetensors import safe_open
from safetensors.numpy import save_file

from gap_export.bundle.folder import Bundle
from gap_export.bundle.hashes import record_of
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.safetensors import FILLER, read_header
from gap_export.errors import CheckpointError, MissingRequirementError
from gap_export.families import open_family
from gap_export.files import file
from gap_export.graph.weights import WeightStore
from gap_export.precision import precision as row_of

NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def values_at(path: Path, offset: Any, length: Any, kind: Any, shape: Any) -> NDArray[Any]:
    """What a runtime reads. (The onnx package refuses linked files, so its own loader is of no use here.)"""
    assert not path.is_symlink()
    raw = path.read_bytes()[int(offset) : int(offset) + int(length)]
    return np.frombuffer(raw, kind).reshape(tuple(int(extent) for extent in shape))


# In bundles


def initializers(bundle: Bundle) -> Iterator[tuple[str, onnx.TensorProto]]:
    for name in bundle.manifest.graphs:
        graph = onnx.load(bundle.graph_path(name), load_external_data=False).graph
        yield from ((name, tensor) for tensor in graph.initializer)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_reference_finds_the_weight_it_names(
    precision: str, tiny_bundle: Callable[..., Bundle], tiny_checkpoint: Path
) -> None:
    bundle = tiny_bundle() if precision == "fp32" else tiny_bundle(precision=precision)
    family = open_family(open_checkpoint(tiny_checkpoint))
    seen = 0
    with safe_open(tiny_checkpoint / "model.safetensors", "np") as stored:
        for graph, tensor in initializers(bundle):
            if not external_data_helper.uses_external_data(tensor):
                assert len(tensor.raw_data) < 4096, f"{graph}: {tensor.name} is inside the graph"
                continue
            lies = external_data_helper.ExternalDataInfo(tensor)
            assert Path(lies.location).name == lies.location
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = values_at(bundle.folder / lies.location, lies.offset, lies.length, kind, tensor.dims)
            expected = stored.get_tensor(family.weight_key(tensor.name)).astype(NUMPY[precision])
            assert values.dtype == expected.dtype
            assert np.array_equal(values, expected), tensor.name
            seen += 1
    assert seen > 60


def test_nothing_but_graphs_and_words_is_written_when_the_precision_is_the_checkpoints(
    tiny_bundle: Callable[..., Bundle], tiny_checkpoint: Path
) -> None:
    bundle = tiny_bundle()
    weights = [path for path in bundle.folder.iterdir() if path.suffix == ".safetensors"]
    assert [path.name for path in weights] == ["model.safetensors"]
    assert os.path.samefile(weights[0], tiny_checkpoint / "model.safetensors")


def test_converted_weights_are_a_file_of_the_bundles_own(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle(precision="fp16")
    weights = {path.name for path in bundle.folder.iterdir() if path.suffix == ".safetensors"}
    assert weights == {"weights-fp16.safetensors"}
    header = read_header(bundle.folder / "weights-fp16.safetensors")
    tensors = {key: location for key, location in header.items() if not key.startswith(FILLER)}
    assert all(location.offset % 64 == 0 for location in tensors.values())


# The store by itself


def store_of(folder: Path, tensors: dict[str, NDArray[Any]], precision: str, **options: Any) -> WeightStore:
    source, bundle = folder / "checkpoint", folder / "bundle"
    source.mkdir()
    bundle.mkdir()
    (source / "config.json").write_text("{}")
    save_file(tensors, source / "model.safetensors")
    checkpoint: Checkpoint = open_checkpoint(source)
    return WeightStore(checkpoint, row_of(precision).activations, bundle, **options)


def stored_values(store: WeightStore, key: str) -> NDArray[Any]:
    tensor = store.tensor(key, key)
    kind = tensor.dtype.numpy()
    return values_at(store.folder / str(tensor.location), tensor.offset, tensor.length, kind, tensor.shape)


def awkward(dtype: np.dtype[Any]) -> NDArray[Any]:
    """Every kind of number: normal, subnormal, halfway between neighbours, zeros of both signs, infinities, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**16, 3000).astype(np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 6e4)]
    between = (values[:-1] + values[1:]) / 2
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 6.1e-5, 5.9e-8, 2.9e-8, 65504.0, 1 / 3], np.float32
    )
    with np.errstate(over="ignore"):
        return np.concatenate([values, between, special]).astype(dtype)


@pytest.mark.parametrize("wanted", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_conversion_is_rounding_to_nearest(stored: str, wanted: str, tmp_path: Path) -> None:
    values = awkward(NUMPY[stored])
    values = values[np.abs(values.astype(np.float32)) != np.inf] if stored == "bf16" else values
    finite = values[~(np.isfinite(values.astype(np.float32)) & (np.abs(values.astype(np.float32)) > 65504))]
    store = store_of(tmp_path, {"a": finite, "b": np.ones((2, 3), NUMPY[stored])}, wanted)
    store.prepare(["a", "b", "a"])
    converted = stored_values(store, "a")
    expected = finite.astype(np.float32).astype(NUMPY[wanted])
    assert converted.dtype == NUMPY[wanted]
    assert converted.view(np.uint8).tolist() == expected.view(np.uint8).tolist()
    assert stored_values(store, "b").astype(np.float32).tolist() == [[1.0] * 3] * 2
    assert (store.written_bytes == 0) == (stored == wanted)


def test_large_tensors_are_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gap_export.graph.weights._CHUNK_ELEMENTS", 7)
    values = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    store = store_of(tmp_path, {"a": values, "b": values[:2]}, "fp16")
    store.prepare(["a", "b"])
    assert np.array_equal(stored_values(store, "a"), values.astype(np.float16))
    assert np.array_equal(stored_values(store, "b"), values[:2].astype(np.float16))


def test_only_what_has_another_precision_is_converted(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"norm": np.ones(4, np.float32), "weight": np.ones(4, np.float16)}, "fp16")
    store.prepare(["norm", "weight"])
    assert store.tensor("norm", "n").location == "weights-fp16.safetensors"
    assert store.tensor("weight", "w").location == "model.safetensors"
    assert set(read_header(store.folder / "weights-fp16.safetensors")) == {"norm"}


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e30])
def test_a_value_that_fp16_cannot_hold_is_refused(value: float, tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": np.array([1.0, value], np.float32)}, "fp16")
    with pytest.raises(CheckpointError, match="a has values up to") as caught:
        store.prepare(["a"])
    assert "bf16" in caught.value.hint


def test_bf16_holds_what_fp16_cannot(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": np.array([1e30], np.float32)}, "bf16")
    store.prepare(["a"])
    assert stored_values(store, "a").astype(np.float32)[0] == pytest.approx(1e30, rel=0.01)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": np.arange(3)}, "fp32")
    with pytest.raises(CheckpointError, match="a is stored as I64"):
        store.prepare(["a"])


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": np.ones(3, np.float32)}, "fp16")
    store.folder.rmdir()
    with pytest.raises(MissingRequirementError, match="cannot be written"):
        store.prepare(["a"])


@pytest.mark.parametrize("linked", [True, False])
def test_files_are_placed_once(linked: bool, tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float32), "b": np.zeros(5, np.float32)}
    store = store_of(tmp_path, tensors, "fp32", self_contained=not linked)
    store.prepare(["a", "b"])
    for key, values in tensors.items():
        assert np.array_equal(stored_values(store, key), values)
    source = tmp_path / "checkpoint" / "model.safetensors"
    assert store.written_bytes == (0 if linked else source.stat().st_size)
    assert os.path.samefile(source, store.folder / "model.safetensors") == linked


def test_a_checkpoint_on_another_file_system_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    store = store_of(tmp_path, {"a": np.arange(3, dtype=np.float32)}, "fp32")
    monkeypatch.setattr(file.os, "link", refuse)
    assert stored_values(store, "a").tolist() == [0, 1, 2]
    assert store.written_bytes > 0


def test_a_build_does_not_change_the_checkpoint(
    tiny_bundle: Callable[..., Bundle], tiny_checkpoint: Path
) -> None:
    record = record_of(tiny_checkpoint / "model.safetensors")
    tiny_bundle()
    tiny_bundle(precision="fp16")
    assert record_of(tiny_checkpoint / "model.safetensors") == record
