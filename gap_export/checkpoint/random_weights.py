"""Stand-ins for checkpoints: published configuration, key names and sizes, random weights. For latency work without a download.

What an export and a request cost depends on shapes, names and bytes, not on values. Weights are streamed to disk from one block of
random numbers, the same in every run; the whole checkpoint is never in memory. A stand-in is written once, into the user's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import CheckpointError, MissingRequirementError
from gap_export.files import atomic_folder, is_folder, readable_size
from gap_export.progress import SILENT, Progress

Shapes = dict[str, tuple[int, ...]]

CONFIGS = Path(str(resources.files("gap_export"))) / "checkpoint" / "configs"
SHARD_BYTES = 5 * 10**9
_BLOCK_ELEMENTS = 2**24 - 3  # odd, so that the block falls differently on every row and every matrix
_WEIGHT_STD = 0.02
_ELEMENT_BYTES = 2

Numbers = NDArray[np.float32]
Elements = NDArray[np.float16] | NDArray[np.uint16]


def _bfloat16(numbers: Numbers) -> NDArray[np.uint16]:
    """The upper half of every float32; its sign, exponent and the first bits of its fraction."""
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)


_ELEMENTS: dict[str, tuple[str, Callable[[Numbers], Elements]]] = {
    "float16": ("F16", lambda numbers: numbers.astype(np.float16)),
    "bfloat16": ("BF16", _bfloat16),
}
"""Element type of a configuration -> (what safetensors calls it, how numbers are stored)."""


@dataclass(frozen=True)
class Published:
    """What a checkpoint says of itself.

    Attributes:
        config: `config.json`, as published.
        preprocessor_config: `preprocessor_config.json`; empty where there is none.
        generation_config: `generation_config.json`; empty where there is none.
        special_tokens: name -> id, of the stand-in tokenizer; words it does not know are `<unk>`.
        stand_in: whether random weights can be written for it: not for models whose pieces lie in several checkpoints.
    """

    config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    special_tokens: dict[str, int]
    generation_config: dict[str, Any] = field(default_factory=dict)
    stand_in: bool = True

    @property
    def dtype(self) -> str:
        """Element type of the weights; configs of newer versions call it `dtype`, some in that of the decoder alone."""
        for stored in (self.config, self.config.get("text_config", {})):
            for name in ("torch_dtype", "dtype"):
                if name in stored:
                    return str(stored[name])
        return "float32"


def published(repository: str) -> Published:
    """The description of a checkpoint on the hub, from a file of this package.

    Raises:
        CheckpointError: there is none of that name.
    """
    file = CONFIGS / f"{repository.replace('/', '--')}.json"
    if not file.is_file():
        raise CheckpointError(
            "cannot be made of random weights: its sizes are not known here",
            subject=repository,
            hint=f"known: {', '.join(stand_ins())}",
        )
    return Published(**json.loads(file.read_text(encoding="utf-8")))


def stand_ins() -> tuple[str, ...]:
    """Hub ids of the checkpoints that random weights can be written for."""
    known = sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json"))
    return tuple(name for name in known if published(name).stand_in)


def random_checkpoint(repository: str, progress: Progress = SILENT) -> Path:
    """A folder with a stand-in for a published checkpoint, written by the first call.

    Args:
        repository: hub id.
        progress: told which file is being written.

    Raises:
        CheckpointError: its sizes are not known.
        MissingRequirementError: no space on the disk.
    """
    content = published(repository)
    if not content.stand_in:
        raise CheckpointError(
            "cannot be made of random weights: its pieces lie in several checkpoints",
            subject=repository,
            hint=f"known: {', '.join(stand_ins())}",
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gap-export" / "random"
    folder = cache / repository.replace("/", "--")
    if not is_folder(folder):
        write_checkpoint(folder, content, progress)
    return folder


def write_checkpoint(folder: Path, content: Published, progress: Progress = SILENT) -> None:
    """Write a stand-in. Everything lands under another name first: a folder of the right name is always complete.

    Raises:
        MissingRequirementError: no space on the disk.
        BundleError: it cannot be written.
    """
    with atomic_folder(folder) as fresh:
        _write(fresh, content, progress)


def _write(folder: Path, content: Published, progress: Progress) -> None:
    (folder / "config.json").write_text(json.dumps(content.config, indent=2) + "\n")
    for file, stored in (
        ("preprocessor_config.json", content.preprocessor_config),
        ("generation_config.json", content.generation_config),
    ):
        if stored:
            (folder / file).write_text(json.dumps(stored, indent=2) + "\n")
    _write_tokenizer(folder / "tokenizer.json", content.special_tokens)
    shards = _shards(_shapes(folder))
    needed, free = sum(map(_bytes_of, shards)), shutil.disk_usage(folder).free
    if needed > free:
        raise MissingRequirementError(
            f"has {readable_size(free)} free, and random weights take {readable_size(needed)}",
            subject=str(folder.parent),
            hint="free some, or set XDG_CACHE_HOME to a folder on another disk",
        )
    numbers = np.random.default_rng(0).standard_normal(_BLOCK_ELEMENTS, np.float32) * _WEIGHT_STD
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        progress.stage(f"writing random weights, {name}")
        with (folder / name).open("wb") as out:
            _write_shard(out, shapes, numbers, content.dtype)
    index = {
        "metadata": {"total_size": needed},
        "weight_map": {key: name for name, shapes in zip(names, shards, strict=True) for key in shapes},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shapes(folder: Path) -> Shapes:
    """Keys and shapes, from transformers' own modules on the meta device: its newer layout, which families read too."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    for key, shape in shapes.items():
        if shards[-1] and _bytes_of({**shards[-1], key: shape}) > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = shape
    return shards


def _bytes_of(shapes: Shapes) -> int:
    return sum(_ELEMENT_BYTES * int(np.prod(shape)) for shape in shapes.values())


def _write_shard(out: BinaryIO, shapes: Shapes, numbers: Numbers, dtype: str) -> None:
    stored, elements = _ELEMENTS[dtype]
    block = elements(numbers)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + _bytes_of({key: shape})
        header[key] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    position = 0
    for key, shape in shapes.items():
        left = int(np.prod(shape))
        if len(shape) == 1:  # norms around one and biases around zero, as trained models have them
            out.write(elements(numbers[:left] + np.float32(key.endswith(".weight"))).tobytes())
            continue
        while left:
            piece = block[position : position + left]
            out.write(piece.data)
            left -= len(piece)
            position = (position + len(piece)) % len(block)


def _write_tokenizer(path: Path, special: dict[str, int]) -> None:
    """Words that it does not know become `<unk>`; special tokens have the published ids. Not all models have one to begin with."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(vocab=special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special["<s>"])]
        )
    tokenizer.save(str(path))
