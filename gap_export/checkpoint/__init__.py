"""A checkpoint on disk: its config, and where in which file every weight lies. No weight is loaded here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gap_export.checkpoint.forms import (
    check_fetched,
    check_not_adapter,
    check_not_quantized,
    in_folder,
    in_place_of_weights,
)
from gap_export.checkpoint.safetensors import Derived, WeightLocation, read_header
from gap_export.errors import CheckpointError, MissingRequirementError, named, shown
from gap_export.files import FileKind, is_file, is_folder, kinds, read_json, sha256_of

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights are looked for, in transformers' order (`modeling_utils._get_resolved_checkpoint_files`): the first that is there counts.
`save_pretrained` twice into a folder leaves a single file beside an index of shards that are no longer meant."""
_NAMED_IN_CONFIG = "transformers_weights"
"""Field of config.json that names the weight file in the place of these."""
_LONGEST_NAME = 256
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_ARCHIVES = (".bin", ".pth", ".pt")
"""Files of torch.save; see `torch_archive.py`."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was looked through, not loaded.

    Attributes:
        folder: where it lies.
        name: what the user called it.
        config: the parsed `config.json`; empty where there is none.
        weights: key -> location, or how it is computed, over all shards; those of a companion are called `companion/key`.
        companions: name -> other checkpoints that pieces of the model come from.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    weights: dict[str, WeightLocation | Derived]
    companions: Mapping[str, Checkpoint] = field(default_factory=dict)

    def with_weights(self, changed: Mapping[str, WeightLocation | Derived]) -> Checkpoint:
        """This checkpoint with some weights added or replaced."""
        return replace(self, weights={**self.weights, **changed})

    def stored(self, key: str) -> WeightLocation:
        """Where a weight lies that others are computed from.

        Raises:
            CheckpointError: it is not there.
        """
        location = self.weights.get(key)
        if not isinstance(location, WeightLocation):
            companion, _, own = key.rpartition("/")
            raise CheckpointError(
                f"has no {own}",
                subject=str((self.companions.get(companion) or self).folder),
                hint="a shard is missing, or the checkpoint is of another model",
            )
        return location

    def with_companion(self, name: str, companion: Checkpoint) -> Checkpoint:
        """This checkpoint with another one as a companion: a piece of the model comes from it."""
        added = {f"{name}/{key}": location for key, location in companion.weights.items()}
        return replace(
            self,
            weights={**self.weights, **added},
            companions={**self.companions, name: companion},
        )

    def fingerprint(self, *, without: Collection[str] = ()) -> str:
        """What tells this checkpoint's graphs from those of others.

        Args:
            without: companions that the graphs have nothing of.

        Returns:
            SHA-256 in hexadecimal of every JSON file of the folder, of the names, shapes and element types of the weights, and
            of the same of the companions. Where the checkpoint lies and what its weights are makes no difference.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in filter(is_file, in_folder(self.folder, ".json")):
            digest.update(os.fsencode(path.name) + f" {sha256_of(path)}\n".encode())
        for key, weight in sorted(self.weights.items()):
            if key.partition("/")[0] not in self.companions:
                dtype = weight.dtype if isinstance(weight, WeightLocation) else "derived"
                digest.update(f"{key} {weight.shape} {dtype}\n".encode())
        for name, companion in sorted(self.companions.items()):
            if name not in without:
                digest.update(f"{name} {companion.fingerprint()}\n".encode())
        return digest.hexdigest()

    def files_sha256(self) -> str:
        """What tells this checkpoint from others with the same graphs: SHA-256 over its JSON and safetensors files, those of companions left out."""
        files = {
            path.name: sha256_of(path)
            for path in sorted(self.folder.iterdir())
            if path.suffix in (".json", ".safetensors")
        }
        return hashlib.sha256(repr(files).encode()).hexdigest()

    @property
    def model_type(self) -> str:
        """`model_type` of `config.json`."""
        stated = self.config.get("model_type", "")
        return named(stated) if isinstance(stated, str) else shown(stated)

    def json(self, file: str) -> dict[str, Any]:
        """Parse one of the checkpoint's JSON files; an absent file is an empty dict.

        Raises:
            CheckpointError: what lies there is no JSON object.
        """
        path = self.folder / file
        return _json_object(path) if os.path.lexists(path) else {}


def open_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read a checkpoint's config and weight headers.

    Args:
        folder: Hugging Face layout: `config.json`, one or several weight files, tokenizer files; or a folder with one `.pth`
            file and no config; or such a file itself.
        name: what to call it in messages; defaults to the folder.

    Raises:
        CheckpointError: something is missing, truncated, quantised, an adapter without its base, or stored in a form that could
            execute code.
    """
    if is_file(folder) and folder.suffix in _ARCHIVES:
        return Checkpoint(folder.parent, name or str(folder), {}, dict(read_weights(folder)))
    if not is_folder(folder):
        raise CheckpointError(
            "is not a folder",
            subject=str(folder),
            hint="name a checkpoint folder, a recipe or a hub id; relative names are looked for beside the recipe's file, then in "
            f"the working folder ({Path.cwd()})",
        )
    check_not_adapter(folder)
    for path in (folder / name for name in _TOKENIZERS):
        if os.path.lexists(path):
            check_fetched(path)
    config_file = folder / "config.json"
    bare = in_folder(folder, ".pth")
    if not os.path.lexists(config_file) and len(bare) == 1:
        return Checkpoint(folder, name or str(folder), {}, dict(read_weights(bare[0])))
    if not os.path.lexists(config_file) and bare:
        raise CheckpointError(
            f"has no config.json, and several weight files ({', '.join(path.name for path in bare[:3])})",
            subject=str(folder),
            hint=f"name the one that is meant: {bare[0]}",
        )
    if not os.path.lexists(config_file):
        raise _without(
            "config.json", folder, "has no config.json", "point at a checkpoint in Hugging Face layout"
        )
    config = _json_object(config_file)
    weights: dict[str, WeightLocation | Derived] = {}
    check_not_quantized(folder, config)
    for shard in _shards(folder, config):
        found = read_weights(shard)
        _check_once(weights, found, shard)
        weights.update(found)
    check_not_quantized(folder, config, weights)
    return Checkpoint(folder=folder, name=name or str(folder), config=config, weights=weights)


def read_weights(file: Path) -> dict[str, WeightLocation]:
    """Where the tensors of one file lie.

    Raises:
        CheckpointError: damaged, cut short, or a pickle that is more than tensors.
        MissingRequirementError: torch is needed to read it and not installed.
    """
    check_fetched(file)
    if file.suffix not in _ARCHIVES:
        return read_header(file)
    try:
        from gap_export.checkpoint.torch_archive import read_torch_archive
    except ImportError as error:
        raise MissingRequirementError(
            f"is needed to read {file.name}", subject="torch", hint="pip install 'gap-export[build]'"
        ) from error
    return read_torch_archive(file)


def _check_once(before: Mapping[str, object], found: Collection[str], shard: Path) -> None:
    twice = next((key for key in found if key in before), None)
    if twice is not None:
        raise CheckpointError(
            f"has {shown(twice)}, which another file of weights has too: which of them is meant cannot be told",
            subject=str(shard),
            hint="fetch the checkpoint again, or take one of them out",
        )


def _shards(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that hold the weights."""
    stated = config.get(_NAMED_IN_CONFIG)
    for name in (stated,) if stated else _WEIGHT_FILES:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(
                f"{_NAMED_IN_CONFIG} points outside the checkpoint folder: {shown(name)}",
                subject=str(folder / "config.json"),
                hint="use a clean download",
            )
        if os.path.lexists(folder / name):
            return _listed(folder / name) if name.endswith(".json") else [folder / name]
    others = [path.name for path in in_folder(folder, ".safetensors", *_ARCHIVES)]
    wanted = str(stated or _WEIGHT_FILES[0])
    raise _without(
        wanted,
        folder,
        f"has no {named(wanted)}" + (f" (only {', '.join(others[:3])})" if others else ""),
        "download the weight files of the checkpoint, and their index where there are several",
    )


def _without(file: str, folder: Path, message: str, hint: str) -> CheckpointError:
    """The error of a folder without a file that every checkpoint has; it says what is there in its place, where that is known."""
    instead = in_place_of_weights(folder)
    if instead is not None:
        message, hint = f"{instead[0]}, and no {file}", instead[1]
    return CheckpointError(message, subject=str(folder), hint=hint)


def _listed(index: Path) -> list[Path]:
    """The shards that an index lists, beside it or in folders below."""
    listed = _json_object(index, kinds.WEIGHT_INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(
            "does not say which file holds which weight (weight_map)",
            subject=str(index),
            hint="use a clean download",
        )
    names = sorted(set(listed.values()))
    for name in names:
        inside = Path(name)
        if inside.is_absolute() or ".." in inside.parts or not inside.parts:
            raise CheckpointError(
                f"names a file outside its folder: {shown(name)}",
                subject=str(index),
                hint="use a clean download, or put all files of weights beside the index and correct their names in it",
            )
        if not is_file(index.parent / name):
            raise CheckpointError(
                f"lists {name}, which is not there"
                if len(name) < _LONGEST_NAME
                else f"lists {shown(name)}, which is no name",
                subject=str(index),
                hint="download it again: the checkpoint is incomplete",
            )
    return [index.parent / name for name in names]


def _json_object(path: Path, kind: FileKind = kinds.CONFIG) -> dict[str, Any]:
    value = read_json(path, kind)
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", subject=str(path), hint=kind.hint)
    return value
