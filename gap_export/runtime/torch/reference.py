"""The PyTorch model that a bundle was built from: as a session with the bundle's pruning, or by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from gap_export.bundle.folder import Bundle
from gap_export.checkpoint.hub import resolve
from gap_export.families import COMPANIONS
from gap_export.families.reference import ReferenceModel, open_model
from gap_export.runtime.torch.session import TorchSession
from gap_export.runtime.torch.staged import open_reference
from gap_export.runtime.torch.text_reference import EmbeddingReference, TextReader, TextReference


def open_torch(
    bundle: Bundle, *, checkpoint: Path | None = None, text_tower: Path | None = None, threads: int = 0
) -> TorchSession:
    """The PyTorch model that a bundle was built from, with its pruning, in fp32.

    Args:
        bundle: opened.
        checkpoint: where the weights lie; by default where the bundle was built from.
        text_tower: where those of the text tower lie, where there is one; by default where the bundle was built from.
        threads: of this process from now on; 0 leaves them as they are.

    Raises:
        CheckpointError: the weights are not there any more, or cannot be loaded.
    """
    if threads:
        torch.set_num_threads(threads)
    manifest, tower = bundle.manifest, bundle.manifest.text_tower
    reads: TextReader | None = None
    if tower is not None and tower.checkpoint is None:
        reads = EmbeddingReference()
    elif tower is not None:
        reads = TextReference(text_tower or resolve(str(tower.checkpoint)), tower)
    return open_reference(
        manifest.family,
        checkpoint or resolve(manifest.checkpoint),
        manifest.pruning,
        parts=_part_folders(bundle),
        text_tower=reads,
    )


def open_model_of(bundle: Bundle, *, checkpoint: Path | None = None) -> ReferenceModel:
    """The PyTorch model that a bundle was built from, by itself, in fp32.

    Args:
        bundle: opened.
        checkpoint: where the weights lie; by default where the bundle was built from.

    Raises:
        CheckpointError: the weights are not there any more, or cannot be loaded.
    """
    manifest = bundle.manifest
    return open_model(manifest.family, checkpoint or resolve(manifest.checkpoint), _part_folders(bundle))


def _part_folders(bundle: Bundle) -> dict[str, Path]:
    """Where the checkpoints beside the main one lie."""
    named = {name: getattr(bundle.manifest.recipe, name) for name in COMPANIONS}
    return {name: resolve(given) for name, given in named.items() if given is not None}
