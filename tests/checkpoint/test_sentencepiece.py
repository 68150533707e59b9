"""Ids of prompts on a real model of SentencePiece, held against slow tokenizers of the transformers versions that originals pin.

`slow_ids.json` was recorded by `bench/slow_tokenizers.py`, which trained the model too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.sentencepiece import strip_around
from gap_export.checkpoint.tokenizers import slow_tokenizer, stored_tokenizer, with_placeholder
from gap_export.errors import CheckpointError
from gap_export.families.shikra import ADDED

FOLDER = Path(__file__).parent / "sentencepiece"
ROWS: list[dict[str, Any]] = json.loads((FOLDER / "slow_ids.json").read_text(encoding="utf-8"))
VERSIONS = {"llava": {"4.31.0", "4.37.2"}, "minigpt_v2": {"4.28.1"}, "shikra": {"4.28.1"}}
PLACEHOLDERS = {"llava": "<image>", "minigpt_v2": "<ImageHere>", "shikra": "<im_patch>"}
IMAGE = -200


def checkpoint(folder: Path, legacy: bool | None, *added: str) -> Checkpoint:
    """As originals publish it: no tokenizer.json."""
    shutil.copy(FOLDER / "tokenizer.model", folder)
    config = {"tokenizer_class": "LlamaTokenizer", **({} if legacy is None else {"legacy": legacy})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        pieces = read(folder).get_vocab_size()
        ids = {name: pieces + number for number, name in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    return Checkpoint(folder, "x", {}, {})


def read(folder: Path) -> Tokenizer:
    return stored_tokenizer(Checkpoint(folder, "x", {}, {}))


def tokenizer_of(family: str, opened: Checkpoint) -> Tokenizer:
    """As the families make it."""
    tokenizer = slow_tokenizer(opened)
    if family == "shikra":
        return strip_around(tokenizer, ADDED)
    return with_placeholder(tokenizer, PLACEHOLDERS[family], tokenizer.get_vocab_size())


def check_rows(family: str, tokenizer: Tokenizer, legacy: bool | None) -> None:
    placeholder = tokenizer.token_to_id(PLACEHOLDERS[family])
    rows = [row for row in ROWS if row["family"] == family and row["legacy"] == legacy]
    assert {row["transformers"] for row in rows} == VERSIONS[family]
    for row in rows:
        ids = tokenizer.encode(row["prompt"].replace("{}", row["expression"])).ids
        assert [IMAGE if id_ == placeholder else id_ for id_ in ids] == row["ids"], row


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_ids_are_those_of_the_slow_tokenizers(family: str, legacy: bool | None, tmp_path: Path) -> None:
    added = ADDED if family == "shikra" else ()
    check_rows(family, tokenizer_of(family, checkpoint(tmp_path, legacy, *added)), legacy)


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_a_converted_tokenizer_is_read_by_the_same_rule(family: str, tmp_path: Path) -> None:
    """What newer versions of transformers save: the mark before the first piece of text alone."""
    opened = checkpoint(tmp_path, False, *(ADDED if family == "shikra" else ()))
    converted = stored_tokenizer(opened)
    converted.normalizer = None
    converted.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    converted.save(str(tmp_path / "tokenizer.json"))
    check_rows(family, tokenizer_of(family, opened), False)
    if family != "shikra":
        with_placeholder(converted, PLACEHOLDERS[family], converted.get_vocab_size())
    with pytest.raises(AssertionError):  # what the rule is for
        check_rows(family, converted, False)


@pytest.mark.parametrize("mark", ["of every piece", "of the first piece"])
@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_added_tokens_are_found_in_the_text_itself(family: str, mark: str, tmp_path: Path) -> None:
    """Conversions of 2023, which many copies of Llama were published with, look for them in normalised text."""
    opened = checkpoint(tmp_path, None, *(ADDED if family == "shikra" else ()))
    converted = stored_tokenizer(opened)
    if mark == "of the first piece":
        converted.normalizer = None
        converted.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    content = json.loads(converted.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_rows(family, tokenizer_of(family, opened), None)


def test_texts_come_back(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(checkpoint(tmp_path, None))
    for text in ("Please point out the red mug.", "naïve 猫 <3", "two  blanks"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_at_the_ends_follow_the_config(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, None)
    assert slow_tokenizer(opened).encode("a").ids[0] == 1
    file = tmp_path / "tokenizer_config.json"
    for config, first, last in (
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": False, "add_eos_token": True}, None, 2),
        ({"add_eos_token": True}, 1, 2),
    ):
        file.write_text(json.dumps(config))
        tokenizer = slow_tokenizer(opened)
        inner = tokenizer.encode("a", add_special_tokens=False).ids
        assert tokenizer.encode("a").ids == [*([first] if first else []), *inner, *([last] if last else [])]


def test_added_tokens_keep_their_ids_or_are_refused(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, None, "<image>", "<pad>")
    tokenizer, size = read(tmp_path), read(tmp_path).get_vocab_size(with_added_tokens=False)
    assert [tokenizer.token_to_id(name) for name in ("<image>", "<pad>")] == [size, size + 1]
    described = {str(size + 2): {"content": "<more>", "special": True, "rstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": described}))
    assert slow_tokenizer(opened).encode("<more>  a", add_special_tokens=False).ids[0] == size + 2
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size + 7}))
    with pytest.raises(CheckpointError, match=rf"pieces up to id {size - 1}, and <image> is to have the id"):
        slow_tokenizer(opened)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not a model of SentencePiece"):
        read(tmp_path)


def test_other_tokenizers_are_left_alone(tiny_checkpoint: Path) -> None:
    opened = Checkpoint(tiny_checkpoint, "x", {}, {})
    assert slow_tokenizer(opened).to_str() == stored_tokenizer(opened).to_str()
    assert not isinstance(slow_tokenizer(opened).normalizer, normalizers.Sequence)
