"""A checkpoint on disk: its config, and where in which file every weight lies. No weight is loaded here.

The safetensors format starts with an eight-byte little-endian header length and a JSON header of
`name -> {dtype, shape, data_offsets}`; that is all an exporter that refers to weights in place needs to read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError, EnvironmentLacks

BYTES_PER_ELEMENT = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_LARGEST_HEADER = 100 * 2**20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class WeightLocation:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: safetensors' name of the element type (`F32`, `F16`, `BF16`, ...).
        shape: extents.
        offset: first byte, counted from the start of the file.
        length: in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was looked through, not loaded.

    Attributes:
        folder: where it lies.
        name: what the user called it.
        config: the parsed `config.json`.
        weights: key -> location, over all shards; those of a part are called `part/key`.
        parts: name -> other checkpoints that pieces of the model come from.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    weights: dict[str, WeightLocation]
    parts: Mapping[str, Checkpoint] = field(default_factory=dict)

    def with_part(self, name: str, part: Checkpoint) -> Checkpoint:
        """The same checkpoint, joined by another one that a piece of the model comes from."""
        joined = {f"{name}/{key}": location for key, location in part.weights.items()}
        return replace(self, weights={**self.weights, **joined}, parts={**self.parts, name: part})

    @property
    def model_type(self) -> str:
        """`model_type` of `config.json`."""
        return str(self.config.get("model_type", ""))

    def json(self, file: str) -> dict[str, Any]:
        """Parse one of the checkpoint's JSON files; an absent file is an empty dict."""
        path = self.folder / file
        return _read_json(path) if path.is_file() else {}


def bundled(name: str) -> Path:
    """Folder of a checkpoint shipped inside the package."""
    return Path(str(resources.files("gap_export"))) / "assets" / name


def resolve(reference: str) -> Path:
    """Folder of a checkpoint, fetched from the hub when it is neither bundled nor local.

    Args:
        reference: `bundled:NAME`, a folder, or a hub id `owner/name`. `HF_HUB_OFFLINE` and the hub's cache are honoured.

    Raises:
        CheckpointError: not there, and not to be had.
    """
    if reference.startswith("bundled:"):
        return bundled(reference.removeprefix("bundled:"))
    folder = Path(reference)
    if folder.is_dir() or reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        return folder.expanduser()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise EnvironmentLacks(
            "is needed to fetch checkpoints",
            subject="huggingface_hub",
            hint="pip install 'gap-export[build]'",
        ) from error
    try:
        return Path(snapshot_download(reference, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "is not in the local cache and could not be fetched from the hub",
            subject=reference,
            hint="download its *.json and *.safetensors files elsewhere and pass the folder: --checkpoint FOLDER",
        ) from error


def open_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read a checkpoint's config and weight headers.

    Args:
        folder: Hugging Face layout: `config.json`, one or several `.safetensors` files, tokenizer files.
        name: what to call it in messages; defaults to the folder.

    Raises:
        CheckpointError: something is missing, truncated, or stored in a form that could execute code.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "is not a folder", subject=str(folder), hint="name a checkpoint folder, a recipe or a hub id"
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            "has no config.json", subject=str(folder), hint="point at a checkpoint in Hugging Face layout"
        )
    config = _read_json(config_file)
    weights: dict[str, WeightLocation] = {}
    for shard in _shards(folder):
        weights.update(read_header(shard))
    return Checkpoint(folder=folder, name=name or str(folder), config=config, weights=weights)


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(
                "does not say which file holds which weight (weight_map)",
                subject=str(index),
                hint="use a clean download",
            )
        names = sorted(set(listed.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"points outside the checkpoint folder: {name!r}",
                    subject=str(index),
                    hint="use a clean download",
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"lists {name}, which is not there",
                    subject=str(index),
                    hint=f"download {name} again: the checkpoint is incomplete",
                )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise CheckpointError(
        f"has no {_SINGLE}"
        + (f" (only {', '.join(pickles[:3])}, which can execute code)" if pickles else ""),
        subject=str(folder),
        hint="convert or download the safetensors files of the checkpoint",
    )


def read_header(file: Path) -> dict[str, WeightLocation]:
    """Parse the header of one safetensors file and check it against the file's size.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """

    def broken(message: str) -> CheckpointError:
        return CheckpointError(
            message, subject=str(file), hint="the download is incomplete or damaged: fetch it again"
        )

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise broken(f"is not a safetensors file ({size} bytes)")
        (header_length,) = struct.unpack("<Q", prefix)
        if header_length > min(size - 8, _LARGEST_HEADER):
            raise broken("is truncated or not a safetensors file (its header is longer than the file)")
        try:
            header = json.loads(stream.read(header_length))
        except ValueError as error:
            raise broken("is not a safetensors file (its header is not JSON)") from error
    base = 8 + header_length
    locations: dict[str, WeightLocation] = {}
    try:
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(int(extent) for extent in entry["shape"])
            expected = BYTES_PER_ELEMENT.get(entry["dtype"], 0)
            for extent in shape:
                expected *= extent
            if not 0 <= start <= end:
                raise broken(f"is damaged: {key} lies from byte {start} to byte {end} of its data")
            if end > size - base:
                raise broken(f"is truncated: {key} ends at byte {base + end} of {size}")
            if expected and end - start != expected:
                raise broken(f"is damaged: {key} has {end - start} bytes where its shape needs {expected}")
            locations[key] = WeightLocation(file, entry["dtype"], shape, base + start, end - start)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise broken("is damaged (its header does not describe tensors)") from error
    return locations


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "cannot be read as JSON", subject=str(path), hint="fetch the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", subject=str(path), hint="fetch the checkpoint again")
    return value
