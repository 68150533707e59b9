"""Checkpoints that are whole are read without their weights; those that are not are refused by name."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gap_export.checkpoint import open_checkpoint
from gap_export.checkpoint.safetensors import read_header
from gap_export.checkpoint.weight_map import find_key, with_shared_table
from gap_export.errors import CheckpointError
from gap_export.families import row_of
from gap_export.modeling.hf_config import PREFIXES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16)}, tmp_path / "model.safetensors")  # fmt: skip
    return tmp_path


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# Whole ones


def test_weights_are_found_where_safetensors_put_them(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.weights) == {"a", "b"}
    location = checkpoint.weights["a"]
    assert (location.dtype, location.shape, location.length) == ("F32", (2, 3), 24)
    raw = location.file.read_bytes()[location.offset : location.offset + location.length]
    assert np.frombuffer(raw, np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert checkpoint.model_type == "llava"
    assert checkpoint.name == str(folder)
    assert open_checkpoint(folder, name="mine").name == "mine"


def test_every_weight_of_a_saved_model_is_found(tiny_checkpoint: Path) -> None:
    from safetensors import safe_open

    checkpoint = open_checkpoint(tiny_checkpoint)
    with safe_open(tiny_checkpoint / "model.safetensors", "np") as stored:
        assert set(stored.keys()) == set(checkpoint.weights)
        for key, location in checkpoint.weights.items():
            values = np.memmap(location.file, np.float32, "r", location.offset, location.shape)
            assert np.array_equal(values, stored.get_tensor(key)), key


def test_shards_are_read_together(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a": np.zeros(2, np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.zeros(2, np.float32)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert {key: location.file.name for key, location in checkpoint.weights.items()} == index["weight_map"]
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-2\.safetensors, which is not there"):
        open_checkpoint(folder)


def test_a_weight_in_two_shards_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({"a": np.zeros(number, np.float32)}, folder / f"model-{number}.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'a', which another file of weights has too"):
        open_checkpoint(folder)


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip


@pytest.mark.parametrize(
    "there", [names for count in range(1, 5) for names in itertools.combinations(WEIGHT_FILES, count)]
)
def test_files_side_by_side_count_in_the_order_of_transformers(
    there: tuple[str, ...], tmp_path: Path
) -> None:
    """What `save_pretrained` twice leaves, and repositories that hold several formats."""
    import torch
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    for number, name in enumerate(there):
        key, file = f"of {name}", tmp_path / (name if not name.endswith(".json") else f"shard-{number}{Path(name.removesuffix('.index.json')).suffix}")  # fmt: skip
        if file.suffix == ".bin":
            torch.save({key: torch.zeros(1)}, file)
        else:
            save_file({key: np.zeros(1, np.float32)}, file)
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {key: file.name}}))
    loaded, _ = _get_resolved_checkpoint_files(tmp_path, None, None, None, None, is_remote_code=False)
    assert {str(weight.file) for weight in open_checkpoint(tmp_path).weights.values()} == set(loaded)
    assert len(loaded) == 1


def test_a_config_may_name_the_weight_file(folder: Path) -> None:
    save_file({"c": np.zeros(1, np.float32)}, folder / "other.safetensors")
    config = {"model_type": "llava", "transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert set(open_checkpoint(folder).weights) == {"c"}
    for name, message in (("../a.safetensors", "points outside"), ("none.safetensors", "has no none")):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


def test_absent_json_files_are_empty(folder: Path) -> None:
    assert open_checkpoint(folder).json("generation_config.json") == {}


# Damaged ones


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ".."},
        {"a": ""},
    ],
)
def test_an_index_cannot_point_out_of_the_folder(weight_map: dict[str, str], folder: Path) -> None:
    (folder.parent / "outside.safetensors").touch()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.subject.endswith("index.json")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]", "{", "\xff"]
)
def test_an_index_that_is_none(content: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_weights_of_another_name_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors \(only weights\.safetensors\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "\x00"])
def test_config_must_be_a_json_object(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="JSON"):
        open_checkpoint(folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(folder / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)


@given(keep=st.integers(0, 300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    cut = folder / "cut.safetensors"
    whole = path.read_bytes()
    cut.write_bytes(whole[: min(keep, len(whole) - 1)])
    with pytest.raises(CheckpointError) as caught:
        read_header(cut)
    assert caught.value.subject == str(cut)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json", b""),
        (b"", b""),
        ([], b""),
        ({"a": None}, b""),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, b"1234"),
        ({"a": {"dtype": "F8_E9", "shape": [1], "data_offsets": [4, 1]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    ],
)  # fmt: skip
def test_headers_that_lie(header: Any, data: bytes, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.subject == str(path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        read_header(path)


def test_metadata_is_no_weight(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = write_raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": entry}, b"1234")
    assert set(read_header(path)) == {"a"}


# Finding checkpoints, families and keys


@pytest.mark.parametrize("model_type", ["paligemma", "", "LLAVA"])
def test_unknown_families_are_refused(model_type: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match="not supported") as caught:
        row_of(open_checkpoint(folder))
    assert "llava" in caught.value.hint


@pytest.mark.parametrize(
    ("parameter", "stored"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "model.vision_tower.encoder.layers.0.mlp.fc1.weight"),
        ("multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("language_model.layers.1.mlp.up_proj.weight", "language_model.model.layers.1.mlp.up_proj.weight"),
        ("language_model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_keys_of_published_layouts(parameter: str, stored: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    save_file({stored: np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert find_key(open_checkpoint(tmp_path), parameter, with_shared_table(PREFIXES, tied=False)) == stored


def test_a_missing_weight_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weight for multi_modal_projector\.linear_1\.weight"):
        find_key(open_checkpoint(folder), "multi_modal_projector.linear_1.weight", PREFIXES)


TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("tied", "stored", "table", "head"),
    [
        (True, {TABLE}, TABLE, TABLE),
        (True, {HEAD}, HEAD, HEAD),
        (True, {TABLE, HEAD}, TABLE, HEAD),
        (False, {TABLE, HEAD}, TABLE, HEAD),
        (False, {TABLE}, TABLE, None),
        (False, {HEAD}, None, HEAD),
    ],
)
def test_head_and_table(
    tied: bool, stored: set[str], table: str | None, head: str | None, tmp_path: Path
) -> None:
    """transformers ties symmetrically: whichever of the two is stored is both."""
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    save_file({key: np.zeros(1, np.float32) for key in stored}, tmp_path / "model.safetensors")
    checkpoint, prefixes = open_checkpoint(tmp_path), with_shared_table(PREFIXES, tied=tied)
    for parameter, key in (("embed_tokens.weight", table), ("lm_head.weight", head)):
        if key is not None:
            assert find_key(checkpoint, parameter, prefixes) == key
            continue
        with pytest.raises(CheckpointError, match=f"has no weight for {parameter}") as caught:
            find_key(checkpoint, parameter, prefixes)
        assert ("tie_word_embeddings" in caught.value.hint) == (parameter == "lm_head.weight")
