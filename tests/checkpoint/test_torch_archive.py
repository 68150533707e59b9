"""Files of torch.save: tensors are found where they lie, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.safetensors import Derived, WeightLocation
from gap_export.errors import CheckpointError
from gap_export.graph.weights import WeightStore
from gap_export.precision import FP32

WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.arange(5, dtype=torch.float16),
    "c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d": torch.arange(12.0).reshape(3, 4)[1:],
}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "stage3.pth"])
def test_tensors_are_found_in_place(name: str, wrapper: str | None, tmp_path: Path) -> None:
    content: Any = WEIGHTS if wrapper is None else {wrapper: WEIGHTS, "epoch": 3, "config": {"lr": 0.1}}
    torch.save(content, tmp_path / name)
    if name.endswith(".bin"):
        (tmp_path / "config.json").write_text("{}")
    checkpoint = opened(tmp_path)
    assert set(checkpoint.weights) == set(WEIGHTS)
    raw = (tmp_path / name).read_bytes()
    for key, tensor in WEIGHTS.items():
        location = checkpoint.stored(key)
        assert location.shape == tuple(tensor.shape)
        assert raw[location.offset :][: location.length] == bytes(
            tensor.contiguous().view(torch.uint8).numpy()
        )


def test_a_file_may_be_named_itself(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS}, tmp_path / "one.pth")
    torch.save({"model": {}}, tmp_path / "other.pth")
    assert set(opened(tmp_path / "one.pth").weights) == set(WEIGHTS)
    message = r"has no config\.json, and several weight files \(one\.pth, other\.pth\)"
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path)
    assert str(tmp_path / "one.pth") in caught.value.hint
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        opened(tmp_path / "other.pth")


def test_shards_of_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = {"pytorch_model-1.bin": ["a.weight", "c"], "pytorch_model-2.bin": ["b.bias", "d"]}
    for name, keys in shards.items():
        torch.save({key: WEIGHTS[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {key: opened(tmp_path).stored(key).file.name for key in WEIGHTS} == index["weight_map"]
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lists pytorch_model-2\.bin, which is not there"):
        opened(tmp_path)


class _Trap:
    """Unpickled by an unsuspecting program, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["archive", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "model.pth"
    if kind == "archive":
        torch.save({"model": WEIGHTS, "config": _Trap(sprung)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": _Trap(sprung)}))
    with pytest.raises(CheckpointError, match="asks for code to be run, which is refused"):
        opened(file)
    assert not sprung.exists()
    torch.load(file, weights_only=False) if kind == "archive" else pickle.loads(file.read_bytes())
    assert sprung.exists(), "the trap is a real one"


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save(WEIGHTS, file)
    content = {"cut": file.read_bytes()[:500], "empty": b"", "text": b"<html>not found</html>"}[damage]
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        opened(file)


def test_what_cannot_be_pointed_at_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="cannot be pointed at"):
        opened(tmp_path / "model.pth")


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_what_is_computed_is_written_and_its_sources_are_not(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gap_export.graph.weights._CHUNK_ELEMENTS", chunk)
    torch.save(WEIGHTS, tmp_path / "model.pth")
    checkpoint = opened(tmp_path / "model.pth")
    whole = checkpoint.stored("a.weight")
    twice = Derived((3, 4), (whole, whole), lambda stored, rows: stored[0][rows] + stored[1][rows])
    checkpoint = checkpoint.with_weights({"twice": twice})
    folder = tmp_path / "bundle"
    folder.mkdir()
    store = WeightStore(checkpoint, FP32, folder)
    store.prepare(["twice", "d", "b.bias"])
    expected = {"twice": 2 * WEIGHTS["a.weight"], "b.bias": WEIGHTS["b.bias"].float(), "d": WEIGHTS["d"]}
    for key, values in expected.items():
        tensor = store.tensor(key, key)
        raw = (folder / tensor.location).read_bytes()[tensor.offset :][: tensor.length]
        assert raw == values.numpy().tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["model.pth", "weights-fp32.safetensors"]
    assert os.stat(folder / "model.pth").st_nlink == 2
    assert store.written_bytes < 400
    assert isinstance(checkpoint.weights["twice"], Derived)
    with pytest.raises(CheckpointError, match="has no twice"):
        checkpoint.stored("twice")
    assert isinstance(checkpoint.weights["d"], WeightLocation)
