"""The PyTorch model that a bundle was built from: as a session with the bundle's pruning, or by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from gap_export import families
from gap_export.bundle.folder import Bundle
from gap_export.checkpoint.hub import resolve
from gap_export.errors import BundleError
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
        BundleError: its manifest says that something else reads the expression than does in its family.
        CheckpointError: the weights are not there any more, or cannot be loaded.
    """
    if threads:
        torch.set_num_threads(threads)
    manifest = bundle.manifest
    return open_reference(
        manifest.family,
        checkpoint or resolve(manifest.checkpoint),
        manifest.pruning,
        parts=_part_folders(bundle),
        text_tower=_text_reader(bundle, text_tower),
    )


def _text_reader(bundle: Bundle, text_tower: Path | None) -> TextReader | None:
    """What reads the expression; None where the pruner does not look at it."""
    tower, family = bundle.manifest.text_tower, families.row(bundle.manifest.family)
    if tower is None:
        return None
    if tower.kind != family.text_by:
        raise BundleError(
            f"reads the expression by {tower.kind}, and models of family {family.name!r} read it by {family.text_by}",
            subject=str(bundle.folder),
            hint="the bundle is damaged: build it again",
        )
    if tower.checkpoint is None:
        return EmbeddingReference()
    return TextReference(text_tower or resolve(tower.checkpoint), tower)


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
