"""Where a checkpoint lies: bundled, in a folder, or on the hub, from which it is fetched.

The hub's own cache is used, downloads that were broken off go on, `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean
everywhere. Messages never quote the library's: theirs may hold addresses and headers.
"""

from __future__ import annotations

import io
import os
from importlib import resources
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError, MissingRequirementError
from gap_export.files import is_file, is_folder
from gap_export.progress import SILENT, Progress

_DESCRIPTION = ["*.json", "*.model", "*.jinja"]
_LOOKED = "beside the recipe's file, then in the working folder"
_SAFE, _ARCHIVES = ["*.safetensors"], ["*.bin", "*.pth"]


def bundled(name: str) -> Path:
    """Folder of a checkpoint shipped inside the package."""
    return Path(str(resources.files("gap_export"))) / "checkpoint" / "assets" / name


def resolve(reference: str, progress: Progress = SILENT) -> Path:
    """Folder (or file) of a checkpoint, fetched from the hub when it is neither bundled nor local.

    Args:
        reference: `bundled:NAME`, a folder, a weight file, or a hub id `owner/name`, with `@revision` if wanted.
        progress: told how far a download is.

    Raises:
        CheckpointError: not there, and not to be had.
        MissingRequirementError: huggingface_hub is not installed.
    """
    if reference.startswith("bundled:"):
        return bundled(reference.removeprefix("bundled:"))
    path = Path(reference)
    if is_file(path) or is_folder(path):
        return path
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        return Path(os.path.expanduser(reference))  # (pathlib's raises where there is no such user)
    return _fetched(reference, progress)


def _fetched(reference: str, progress: Progress) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingRequirementError(
            "is needed to fetch checkpoints",
            subject="huggingface_hub",
            hint="pip install 'gap-export[build]'",
        ) from error
    repository, _, revision = reference.partition("@")

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=patterns,
                tqdm_class=_bars(repository, progress),
            )
        )

    try:
        folder = download([*_DESCRIPTION, *_SAFE])
        # Formats that are not safetensors only where there is no other: repositories often hold both.
        return folder if any(folder.glob("*.safetensors")) else download([*_DESCRIPTION, *_ARCHIVES])
    except errors.GatedRepoError as error:
        raise CheckpointError(
            "is gated: its owners want their licence to be accepted first",
            subject=reference,
            hint="accept it on the checkpoint's page, and log in: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"has no revision {revision or 'main'!r}",
            subject=repository,
            hint="name a branch, a tag or a commit of the repository",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            "is no folder, and is not on the hub, or is private",
            subject=reference,
            hint=f"check the name; folders are looked for {_LOOKED}; private ones need a token: hf auth login",
        ) from error
    except Exception as error:  # no network shows as errors of several libraries
        raise CheckpointError(
            "is no folder, is not in the local cache, and could not be fetched from the hub",
            subject=reference,
            hint=f"folders are looked for {_LOOKED}; download its *.json, *.jinja, *.safetensors and tokenizer.model files elsewhere and pass the folder: --checkpoint FOLDER; "
            "for latency work alone: --weights random",
        ) from error


def _bars(repository: str, progress: Progress) -> type[Any]:
    """A class of progress bars that write nothing and tell `progress` instead."""
    from tqdm.auto import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_args: Any, **_options: Any) -> bool:
            if self.total and self.unit == "B":
                progress.stage(f"fetching {repository}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB")
            return True

    return Told
