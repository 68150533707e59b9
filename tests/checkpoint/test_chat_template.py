"""A checkpoint's chat template is the one that transformers finds, and damaged ones are refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.chat_template import LONGEST, StoredTemplate, special_tokens, stored_template
from gap_export.errors import CheckpointError

Files = dict[str, Any]

BY_NAME = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def written(folder: Path, files: Files) -> Checkpoint:
    """A checkpoint with files of texts, bytes and what is written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
    return Checkpoint(folder, str(folder), {"model_type": "llava"}, {})


def template(text: str) -> dict[str, str]:
    return {"chat_template": text}


FOUND: dict[str, tuple[Files, str, str]] = {
    "tokenizer_config": ({"tokenizer_config.json": template("T")}, "T", "tokenizer_config.json"),
    "by name": (
        {"tokenizer_config.json": {"chat_template": BY_NAME}},
        "plain",
        "tokenizer_config.json",
    ),
    "jinja": (
        {"chat_template.jinja": "J\r\nj", "tokenizer_config.json": template("T")},
        "J\nj",
        "chat_template.jinja",
    ),
    "json": ({"chat_template.json": template("L"), "chat_template.jinja": "J"}, "L", "chat_template.json"),
    "processor_config": (
        {
            "processor_config.json": {"processor_class": "LlavaProcessor", **template("P")},
            "chat_template.json": template("L"),
        },
        "P",
        "processor_config.json",
    ),
    "processor_config without": (
        {"processor_config.json": {"processor_class": "LlavaProcessor"}, "chat_template.jinja": "J"},
        "J",
        "chat_template.jinja",
    ),
    "additional": (
        {"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"},
        "J",
        "chat_template.jinja",
    ),
    "additional default": (
        {"additional_chat_templates/default.jinja": "D", "additional_chat_templates/rag.jinja": "R"},
        "D",
        "additional_chat_templates/default.jinja",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_template_is_the_one_that_transformers_finds(name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.processing_utils import ProcessorMixin

    files, text, source = FOUND[name]
    checkpoint = written(tmp_path, files)
    assert stored_template(checkpoint) == StoredTemplate(text, source)

    save_tokenizer(checkpoint)
    settings, _ = ProcessorMixin.get_processor_dict(tmp_path)
    theirs = settings.get("chat_template")
    if theirs is None:  # processors know no template of tokenizers, which are asked then
        theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert (theirs["default"] if isinstance(theirs, dict) else theirs) == text

    if name == "json":
        (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
        assert AutoProcessor.from_pretrained(tmp_path).chat_template == text


def save_tokenizer(checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer, models

    folder = checkpoint.folder
    Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    config = checkpoint.json("tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {}},
        {"tokenizer_config.json": {"chat_template": None}},
        {"chat_template.json": {"chat_template": None}},
    ],
)
def test_there_may_be_none(files: Files, tmp_path: Path) -> None:
    assert stored_template(written(tmp_path, files)) is None


def test_weights_without_a_config_have_none(tmp_path: Path) -> None:
    written(
        tmp_path, {"chat_template.jinja": "of something else", "tokenizer_config.json": {"bos_token": "x"}}
    )
    weights = Checkpoint(tmp_path, "minigpt.pth", {}, {})
    assert stored_template(weights) is None
    assert special_tokens(weights) == {}


DAMAGED: dict[str, tuple[Files, str]] = {
    "not UTF-8": ({"chat_template.jinja": b"a\n\xff"}, "line 2: is not UTF-8"),
    "too long": ({"chat_template.jinja": "a" * (LONGEST + 1)}, "1000001 characters"),
    "far too long": ({"chat_template.jinja": b"a" * 5_000_000}, "at most"),
    "empty": ({"chat_template.jinja": " \n"}, "an empty chat template"),
    "a number": ({"tokenizer_config.json": {"chat_template": 7}}, "chat_template is 7"),
    "a list of texts": (
        {"tokenizer_config.json": {"chat_template": ["a"]}},
        "objects with name and template",
    ),
    "a number by name": (
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": 7}]}},
        "chat_template is 7",
    ),
    "no default": (
        {"tokenizer_config.json": {"chat_template": BY_NAME[:1]}},
        "no chat template named default, .* \\(it has tool_use\\)",
    ),
    "an empty list": ({"tokenizer_config.json": {"chat_template": []}}, "no chat template named default"),
    "no additional default": ({"additional_chat_templates/rag.jinja": "R"}, "it has rag"),
    "no field": ({"chat_template.json": {}}, "has no chat_template"),
    "no JSON": ({"chat_template.json": "{"}, "is not JSON"),
    "no object": ({"chat_template.json": '["a"]'}, "is not a JSON object"),
    "two forms": (
        {"chat_template.json": template("L"), "additional_chat_templates/rag.jinja": "R"},
        "stands beside",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_ones_are_refused(name: str, tmp_path: Path) -> None:
    files, message = DAMAGED[name]
    with pytest.raises(CheckpointError, match=message) as refused:
        stored_template(written(tmp_path, files))
    assert "\n" not in str(refused.value)
    assert refused.value.subject.startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = written(tmp_path, {})
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        stored_template(checkpoint)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored_template(checkpoint)


TOKEN = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
TOKENS: dict[str, Files] = {
    "texts": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}},
    "objects": {"tokenizer_config.json": {"bos_token": {"__type": "AddedToken", **TOKEN}}},
    "further": {
        "tokenizer_config.json": {
            "unk_token": "<unk>",
            "add_bos_token": True,
            "image_token": "<image>",
            "extra_special_tokens": {"vision_bos_token": "<v>"},
            "additional_special_tokens": ["<more>"],
        }
    },
    "older": {
        "tokenizer_config.json": {"bos_token": "<old>", "cls_token": "<cls>"},
        "special_tokens_map.json": {"bos_token": TOKEN, "additional_special_tokens": ["<more>"]},
    },
    "described": {
        "tokenizer_config.json": {"bos_token": "<new>", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"bos_token": "<old>", "sep_token": "<sep>"},
    },
}


@pytest.mark.parametrize("name", TOKENS)
def test_special_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = written(tmp_path, TOKENS[name])
    found = special_tokens(checkpoint)
    save_tokenizer(checkpoint)
    assert found == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bos_token": 7}, "bos_token is 7"),
        ({"bos_token": {"lstrip": True}}, "bos_token is {"),
        ({"extra_special_tokens": {"image_token": []}}, r"image_token is \[\]"),
    ],
)
def test_a_token_that_is_no_text_is_refused(content: Files, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        special_tokens(written(tmp_path, {"tokenizer_config.json": content}))


def test_templates_are_fetched_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from gap_export.checkpoint.hub import resolve

    asked: list[str] = []
    (tmp_path / "model.safetensors").touch()

    def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    fetch: Callable[..., str] = download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("owner/name") == tmp_path
    assert "*.jinja" in asked
