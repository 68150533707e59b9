"""Adapters and quantised weights are refused by name, from headers alone; what only looks like them is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}


def write(folder: Path, config: dict[str, Any] | None, *keys: str) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    if keys:
        save_file({key: np.zeros(1, np.float32) for key in keys}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config", [None, {}])
@pytest.mark.parametrize("weights", [(), ("a.weight",)])
def test_an_adapter_is_no_model(
    config: dict[str, Any] | None, weights: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, config, *weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file(
        {"base_model.model.x.lora_A.weight": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"adapter \(adapter_config\.json: LoRA over owner/base\)"
    ) as caught:
        open_checkpoint(tmp_path)
    assert "merge" in caught.value.hint


@pytest.mark.parametrize("content", ["", "[]", "{}", "3"])
def test_an_adapter_that_says_nothing_of_itself(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter .* over its base model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"by gptq \(quantization_config in"),
        ({"quantization_config": {"load_in_4bit": True}}, r"is quantised \(quantization_config in"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            r"by awq \(text_config\.quantization_config",
        ),
        ({"compression_config": {"format": "int-quantized"}}, r"compression_config in config\.json"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"is quantised \(quantization in config\.json"),
    ],
)
def test_configs_that_say_so(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Before any weight file is opened: there is none."""
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(write(tmp_path, config))
    assert "fp32, fp16 or bf16" in caught.value.hint


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_files_that_say_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"is quantised .{name}"):
        open_checkpoint(write(tmp_path, {}))


@pytest.mark.parametrize(
    "piece",
    ["qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB",
     "weight.quant_state.bitsandbytes__nf4", "scales", "W_q", "weight._data"],
)  # fmt: skip
def test_keys_that_say_so(piece: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"is quantised .*q_proj\.{piece}"):
        open_checkpoint(write(tmp_path, {}, "q_proj.weight", f"q_proj.{piece}"))


def test_what_is_not_quantised(tmp_path: Path) -> None:
    config = {"quantization_config": None, "text_config": {"quantization_config": {}}}
    keys = {"q_proj.weight", "logit_scale", "scales.weight", "mlp.SCB_like.weight"}
    assert set(open_checkpoint(write(tmp_path, config, *keys)).weights) == keys


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4988025760\n"
"""What `git clone` leaves in the place of a large file where Git LFS is not installed."""

PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model-1.safetensors", "tokenizer.json", "tokenizer.model"],
)
@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [(POINTER, "is a pointer of Git LFS", "git lfs pull"), (PAGE, "is a web page", "/resolve/")],
)
def test_files_that_were_not_fetched(
    content: str, message: str, hint: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path, {})
    if name.startswith("model-"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.subject == str(tmp_path / name)
    assert hint in caught.value.hint


def test_a_companion_that_was_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "eva_vit_g.pth").write_text(POINTER)
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS"):
        open_checkpoint(tmp_path / "eva_vit_g.pth")


def test_damaged_bytes_are_not_called_dangerous(tmp_path: Path) -> None:
    write(tmp_path, {})
    for content in (b"", b"\0" * 100, b"garbage that is no pickle"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is not a file of torch\.save") as caught:
            open_checkpoint(tmp_path)
        assert "fetch it again" in caught.value.hint


# What lies in the place of weights


@pytest.mark.parametrize("config", [None, {}])
@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["llava-q4_k_m.gguf"], r"holds GGUF \(llava-q4_k_m\.gguf\)", "the checkpoint that it was made from"),
        (["checkpoint-900/config.json", "checkpoint-1000/config.json"],
         r"holds the checkpoints of a training \(checkpoint-900, checkpoint-1000\)", "checkpoint-1000"),
        (["zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt", "latest"], "pieces that DeepSpeed saved", "join them"),
        (["mm_projector.bin", "trainer_state.json"], r"a projector alone \(mm_projector\.bin\)", "the whole model"),
    ],
)  # fmt: skip
def test_what_is_there_instead_of_weights_is_named(
    files: list[str], message: str, hint: str, config: dict[str, Any] | None, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write(tmp_path, config))
    assert caught.value.subject == str(tmp_path)
    assert hint in caught.value.hint


def test_what_lies_beside_weights_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    for name in ("a.gguf", "mm_projector.bin", "zero_to_fp32.py"):
        (tmp_path / name).write_text("")
    assert set(open_checkpoint(write(tmp_path, {}, "a.weight")).weights) == {"a.weight"}


def test_the_adapter_of_llava_has_more_beside_it(tmp_path: Path) -> None:
    """Its projector is trained whole, and peft alone would leave it out."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapter") as caught:
        open_checkpoint(write(tmp_path, {}))
    assert "merge_lora_weights.py" in caught.value.hint
    assert "--model-base owner/base" in caught.value.hint
