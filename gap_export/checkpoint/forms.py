"""Forms of checkpoints that are not a model's own weights, told from file names, config and headers: adapters, quantised weights, files of
other programs, and files that stand for others.

They would otherwise end in a missing or a foreign weight, long after the build began, or in words that do not name the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError, named
from gap_export.files import is_file, is_folder, kinds, opened, read_json

_ADAPTER = "adapter_config.json"
"""What peft writes beside `adapter_model.safetensors`."""

_CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
"""The last one is MLX's."""
_CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where older AutoGPTQ and AutoAWQ, and ModelOpt, say it in the place of config.json."""
_STORED_PIECES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|weight_scales|weight_zero_point|SCB|W_q"
    r"|codebooks|weight\.(absmax|quant_map|nested_absmax|quant_state\..+|_data|_scale))$"
)
"""Keys of what a quantised weight is stored as: GPTQ, AWQ and MLX, compressed-tensors and fp8, EETQ, bitsandbytes, HQQ, AQLM, quanto."""

_PROJECTOR = "mm_projector.bin"
_BESIDE_ADAPTER = "non_lora_trainables.bin"
_SAVED_STEPS = "checkpoint-*"
_ZERO = "zero_to_fp32.py"
"""What LLaVA's training, transformers' and DeepSpeed's leave in their output folders."""


_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")


def check_fetched(file: Path) -> None:
    """Refuse what lies in a file's place where the file itself was not fetched: a pointer of Git LFS, or the page of an error.

    Raises:
        CheckpointError: names which, and how to fetch the file.
    """
    with opened(file, kinds.WEIGHTS) as stream:
        beginning = stream.read(64).lstrip().lower()
    if beginning.startswith(_POINTER):
        raise CheckpointError(
            "is a pointer of Git LFS and not the file it stands for: the repository was cloned without its large files",
            subject=str(file),
            hint="run `git lfs pull` in the folder, or fetch it with `hf download`",
        )
    if beginning.startswith(_PAGES):
        raise CheckpointError(
            "is a web page and not the file that was asked for",
            subject=str(file),
            hint="fetch it with `hf download`, or from an address with /resolve/ in it, not /blob/; gated ones need `hf auth login`",
        )


def check_not_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter: without its base it is no model, and beside other weights it would be left out silently.

    Raises:
        CheckpointError: names the base, and how to merge.
    """
    file = folder / _ADAPTER
    if not is_file(file):
        return
    try:
        described = read_json(file, kinds.CONFIG)
    except CheckpointError:  # an adapter it is all the same
        described = {}
    kind = _plain(described, "peft_type", "LoRA").replace("LORA", "LoRA")
    base = _plain(described, "base_model_name_or_path", "its base model")
    beside = "beside other weights" if is_file(folder / "config.json") else "and not a model"
    hint = (
        f"merge it into {base} and save both as one: peft's PeftModel.from_pretrained(...).merge_and_unload()"
        ".save_pretrained(FOLDER); where that was done already, move adapter_* out of the folder"
    )
    if is_file(folder / _BESIDE_ADAPTER):
        hint = (
            f"merge it into {base} together with {_BESIDE_ADAPTER}, which peft does not read: LLaVA's scripts/merge_lora_weights.py "
            f"--model-path {folder} --model-base {base} --save-model-path FOLDER"
        )
    raise CheckpointError(
        f"holds an adapter ({_ADAPTER}: {kind} over {base}) {beside}", subject=str(folder), hint=hint
    )


def in_place_of_weights(folder: Path) -> tuple[str, str] | None:
    """What a folder without weights holds in their place: (what it is, what to do), where it is known."""
    files = in_folder(folder, ".gguf")
    if files:
        return f"holds GGUF ({files[0].name}), the format of llama.cpp", (
            "use the checkpoint that it was made from, in safetensors, and choose a --precision"
        )
    if is_file(folder / _ZERO):
        return f"holds the pieces that DeepSpeed saved ({_ZERO} lies beside them)", (
            f"join them: python {folder / _ZERO} {folder} {folder} --safe_serialization"
        )
    steps = sorted(
        (path.name for path in folder.glob(_SAVED_STEPS) if is_folder(path)),
        key=lambda name: (len(name), name),
    )
    if steps:
        return (
            f"holds the checkpoints of a training ({', '.join(steps[-3:])})",
            f"name one of them: {folder / steps[-1]}",
        )
    if is_file(folder / _PROJECTOR):
        return f"holds a projector alone ({_PROJECTOR}), which LLaVA's first stage of training leaves", (
            "name the checkpoint of the whole model"
        )
    return None


def check_not_quantized(folder: Path, config: Mapping[str, Any], keys: Iterable[str] = ()) -> None:
    """Refuse quantised weights: their values are packed by rules of many libraries, and rounding them again would lose more.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        keys: of its weights, once they are known.

    Raises:
        CheckpointError: names what says so, and what to use instead.
    """
    where, method = _quantization(folder, config)
    if where is None:
        where = next((named(key) for key in keys if _STORED_PIECES.search(key)), None)
    if where is None:
        return
    raise CheckpointError(
        f"is quantised{method} ({where})",
        subject=str(folder),
        hint="use the checkpoint that it was made from, in fp32, fp16 or bf16, and choose a --precision; where the weights are "
        "plain floats, delete what says otherwise",
    )


def _quantization(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """(Where it is said that weights are quantised, and by which method), from config and files alone."""
    parts = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    for prefix, part in parts.items():
        for field in _CONFIG_FIELDS:
            said = part.get(field)
            if said:
                method = _plain(said, "quant_method", "")
                return f"{named(prefix)}{field} in config.json", f" by {method}" if method else ""
    return next((name for name in _CONFIG_FILES if is_file(folder / name)), None), ""


def _plain(described: Any, field: str, otherwise: str) -> str:
    """A name that a file gives, for a message; something else where it gives none."""
    name = described.get(field) if isinstance(described, dict) else None
    return name if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() else otherwise


def in_folder(folder: Path, *suffixes: str) -> list[Path]:
    """What lies in a checkpoint's folder under names that end so, in their order.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", subject=str(folder), hint="see who may read the folder"
        ) from error
