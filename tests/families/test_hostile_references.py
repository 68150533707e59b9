"""The PyTorch reference refuses the same checkpoints as a build, in the same words, before transformers reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import CheckpointError
from gap_export.families import reference


def changed(file: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name, value in fields.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
        (folder / file).write_text(json.dumps(content))

    return change


def pipe(file: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return replace


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed("config.json", text_config={"num_attention_heads": 0}), "num_attention_heads is 0"),
        (changed("config.json", text_config={"rms_norm_eps": "x"}), "rms_norm_eps is 'x'"),
        (changed("config.json", text_config={"vocab_size": 10**9}), "vocab_size is 1000000000"),
        (changed("config.json", text_config={"pad_token_id": 64}), "pad_token_id"),
        (changed("config.json", vision_config={"patch_size": 7}), "image_size"),
        (changed("config.json", configuration_files=["other.json"]), "configuration_files"),
        (pipe("config.json"), "is a pipe"),
        (pipe("model.safetensors"), "is a pipe"),
        (cut, "is truncated"),
    ],
)
def test_what_a_build_refuses(damage: Callable[[Path], None], said: str, checkpoint_copy: Path) -> None:
    damage(checkpoint_copy)
    with pytest.raises(CheckpointError) as caught:
        reference.open_model("llava", checkpoint_copy, {})
    assert said in caught.value.message
    assert "transformers" not in caught.value.message


@pytest.mark.parametrize(
    "model_type", [None, "", "no such", "llama", "bert", "clip", "llava_next", "internvl"]
)
def test_checkpoint_of_another_family(model_type: str | None, checkpoint_copy: Path) -> None:
    """A build takes the family from the checkpoint; here it comes from the bundle, and the two must be one."""
    (checkpoint_copy / "config.json").write_text(
        json.dumps({} if model_type is None else {"model_type": model_type})
    )
    with pytest.raises(CheckpointError, match=r"is of the family|has model_type .* not supported"):
        reference.open_model("llava", checkpoint_copy, {})


def test_what_transformers_meets_itself_is_one_line_too(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is checked before: an assertion of torch's."""
    changed("config.json", text_config={"pad_token_id": 64})(checkpoint_copy)
    monkeypatch.setattr(reference, "_check", lambda *_: None)
    with pytest.raises(CheckpointError, match="could not be loaded by transformers: Padding_idx"):
        reference.open_model("llava", checkpoint_copy, {})
