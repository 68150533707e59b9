"""What lies in the place of a checkpoint's files: pipes, folders, devices, links to nowhere, garbage, tokenizers that tokenize nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.tokenizers import check_in_vocabulary, slow_tokenizer, stored_tokenizer
from gap_export.errors import CheckpointError
from gap_export.inputs.tokenizer import load_tokenizer, tokenizer_errors
from tests.modeling.hostile_values import Small, small


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices cannot be made here")


IN_THE_PLACE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": _device,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an empty file": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"{\xff\xfe}"),
    "nulls": lambda path: path.write_bytes(bytes(1000)),
    "brackets": lambda path: path.write_bytes(b"[" * 10**5),
    "a list": lambda path: path.write_bytes(b"[]"),
    "too much": lambda path: (path.touch(), os.truncate(path, 300 * 2**20)),
}
FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "clip/config.json",
    "clip/model.safetensors",
    "clip/tokenizer.json",
)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Small:
    return small(tmp_path / "checkpoint", "llava", tiny_checkpoint / "tokenizer.json")


@pytest.mark.parametrize("what", IN_THE_PLACE)
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_of_its_kind_is_refused(file: str, what: str, checkpoint: Small) -> None:
    path = checkpoint.folder / file
    path.unlink()
    IN_THE_PLACE[what](path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open()
    assert caught.value.subject.startswith(str(path)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link to nowhere"])
def test_what_no_part_reads_is_let_be(what: str, checkpoint: Small) -> None:
    """A checkpoint's fingerprint is that of its JSON files; what is none waits for nobody."""
    before = checkpoint.open().checkpoint.fingerprint()
    IN_THE_PLACE[what](checkpoint.folder / "notes.json")
    assert checkpoint.open().checkpoint.fingerprint() == before


def test_a_folder_that_cannot_be_read(checkpoint: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(checkpoint.folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "a/b/" + "c" * 5000])
def test_names_that_no_checkpoint_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / name)


def test_shards_may_lie_in_folders_below(checkpoint: Small) -> None:
    """As transformers takes them; none may lie outside."""
    folder = checkpoint.folder
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards" / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    for name, said in (
        ("shards/one.safetensors", None),
        ("./shards/one.safetensors", None),
        ("shards/../../x", "names a file outside its folder"),
        ("/one.safetensors", "names a file outside its folder"),
        ("two.safetensors", "lists two.safetensors, which is not there"),
        ("x" * 10**4, "which is no name"),
        ("a\0b", "which is not there"),
    ):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        if said is None:
            assert open_checkpoint(folder).stored("x").file.name == "one.safetensors"
            continue
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(folder)


# Tokenizers


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    return content


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in inner for path in _paths(child, (*at, key)))]


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokenizers_with_other_values_are_refused_or_tokenize(
    data: st.DataObject, tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    """Any value of the file replaced by any other, also where the library panics."""
    content = json.loads(json.dumps(tokenizer))
    path = data.draw(st.sampled_from(_paths(content)[1:]))
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = data.draw(
        st.sampled_from([None, -1, 0, 2**32, 2**64, 1.5, "", "x", "<image>", [], {}, [1], True, "Sequence"])
    )
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    try:
        with tokenizer_errors(str(file), "cannot tokenize"):
            load_tokenizer(file).encode("the red mug <image>")
    except CheckpointError as error:
        assert_one_line(error)


def assert_one_line(error: CheckpointError) -> None:
    assert "\n" not in str(error)


class PanicException(BaseException):
    """As the library's, which cannot be imported."""


def test_a_panic_is_an_error_and_an_interruption_is_none() -> None:
    with (
        pytest.raises(CheckpointError, match="x: is not a tokenizer: index out of bounds"),
        tokenizer_errors("x"),
    ):
        raise PanicException("index out of bounds\nsecond line")
    with pytest.raises(KeyboardInterrupt), tokenizer_errors("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, r"added_tokens_decoder\.x is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {}}}, r"added_tokens_decoder\.-1 is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {}}}, "is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "x"}}, r"added_tokens_decoder\.5 is 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 5}}}, r"decoder\.5 is \{'content': 5\}"),
    ],
)  # fmt: skip
def test_added_tokens_that_are_none(file: str, content: Any, said: str, checkpoint: Small) -> None:
    checkpoint.write(file, content)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint.open()
    assert caught.value.subject == str(checkpoint.folder / file)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("added_tokens.json", {"x": "5"}, "x is '5'"),
        ("added_tokens.json", {"x": -5}, "x is -5"),
        ("added_tokens.json", {"x": 10**9}, "x is 1000000000"),
        ("added_tokens.json", {"x": 5}, "x is to have the id 5"),
        ("added_tokens.json", {"": 3}, " is 3"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "add_bos_token is 'no'"),
    ],
)
def test_what_lies_beside_sentencepiece(file: str, content: Any, said: str, tmp_path: Path) -> None:
    _write_model(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        slow_tokenizer(Checkpoint(tmp_path, "x", {}, {}))


@given(at=st.integers(0, 10**4), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_models_of_sentencepiece_with_damage(at: int, byte: int, cut: bool, tmp_path: Path) -> None:
    content = bytearray(_write_model(tmp_path))
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] = byte
    (tmp_path / "tokenizer.model").write_bytes(content)
    try:
        stored_tokenizer(Checkpoint(tmp_path, "x", {}, {}))
    except CheckpointError as error:
        assert_one_line(error)


def test_a_piece_of_a_megabyte_is_refused(tmp_path: Path) -> None:
    """It would be split at every place."""
    _write_model(tmp_path, longest=10**6)
    with pytest.raises(CheckpointError, match="is not a model of SentencePiece"):
        stored_tokenizer(Checkpoint(tmp_path, "x", {}, {}))


def _write_model(folder: Path, longest: int = 3) -> bytes:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = 2
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for number, piece in enumerate((*kinds, "▁", "a", "b", "ab", "▁ab", "c" * longest)):
        proto.pieces.add(piece=piece, score=-number, type=kinds.get(piece, 1))
    content: bytes = proto.SerializeToString()
    (folder / "tokenizer.model").write_bytes(content)
    return content


def test_words_without_an_embedding_are_refused(checkpoint: Small) -> None:
    """The tokenizer of another model, and the control: one that fits."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    opened = open_checkpoint(checkpoint.folder)
    check_in_vocabulary(tokenizer, 4, 64, opened)
    with pytest.raises(
        CheckpointError, match=r"the id 10, and the model has embeddings up to 9 \(vocab_size\)"
    ):
        check_in_vocabulary(tokenizer, 4, 10, opened)
    tokenizer.add_tokens(["added later"])
    check_in_vocabulary(tokenizer, 4, tokenizer.get_vocab_size() - 1, opened)
