"""The models that exported graphs are held against, one per family: eager, loaded by transformers, nothing of the export path.

What they have in common is this contract; pruning in float64, numbering and the decode loop around it are in
`torch_reference.py`.

Shape letters: N visual tokens that may be pruned, K kept, E tower width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from gap_export import families
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError, GapExportError, first_line
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import VisionFeatures
from gap_export.prune.reference import Choice


@dataclass(frozen=True)
class ImageFeatures:
    """What a tower gives of one image.

    Attributes:
        shown: what pruners read, of this image alone.
        beside: what else the model wants back in `ReferenceModel.tokens`, or a text tower, by name.
    """

    shown: VisionFeatures[Tensor]
    beside: Mapping[str, Tensor] = field(default_factory=dict)


class ReferenceModel(Protocol):
    """A family's model.

    Attributes:
        dtype: of weights and activations.
        image_token_id: id of the placeholder.
        grid: (rows, columns) of the visual tokens; None where images differ.
        embedding: of tokens.
        language_model: the decoder without embedding and head, called as transformers calls it.
        lm_head: hidden states to logits.
    """

    dtype: torch.dtype
    image_token_id: int
    grid: tuple[int, int] | None
    embedding: nn.Module
    language_model: Any
    lm_head: nn.Module

    def extract_features(self, pixels: PixelInputs) -> list[ImageFeatures]:
        """What the tower gives of every image of a call."""
        ...

    def tokens(self, image: ImageFeatures, choice: Choice) -> tuple[Tensor, Ids]:
        """What enters the decoder of one image.

        Args:
            image: as `extract_features` gave it.
            choice: what is kept, in the order in which it enters the decoder.

        Returns:
            embeddings [K, H] and their places [K] int64 among the visual tokens of the unpruned prompt; tokens that are never
            pruned are among them.
        """
        ...


def open_model(family: str, checkpoint: Path, companions: Mapping[str, Path]) -> ReferenceModel:
    """Load a reference, in fp32.

    Args:
        family: name in the table of families.
        checkpoint: folder.
        companions: name -> folder of checkpoints that pieces of the model come from.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    row = families.row(family)
    _check(row, checkpoint, companions)
    try:
        with quiet_loading():
            model: ReferenceModel = row.load_reference()(checkpoint, torch.float32, companions)
    except GapExportError:
        raise
    except Exception as error:  # transformers raises what it meets
        raise CheckpointError(
            f"could not be loaded by transformers: {first_line(error)}",
            subject=str(checkpoint),
            hint="the reference needs the checkpoint the bundle was built from",
        ) from error
    return model


def _check(row: families.FamilyRow, folder: Path, companions: Mapping[str, Path]) -> None:
    """Refuse what a build would refuse, before transformers reads it: files that are none, fields and weights that lie.

    Raises:
        CheckpointError: something is missing, damaged, or of another model.
    """
    kind, checkpoint = row.load(), open_checkpoint(folder)
    found = families.row_of(checkpoint)
    if found != row:
        raise CheckpointError(
            f"is of the family {found.name}, and the bundle was built from one of {row.name}",
            subject=str(folder),
            hint="the reference needs the checkpoint the bundle was built from",
        )
    used = [companion.name for companion in kind.companions(checkpoint) if companion.used]
    for name in used:
        if name in companions:
            checkpoint = checkpoint.with_companion(name, open_checkpoint(companions[name]))
    kind(row, checkpoint)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back what transformers writes while it loads: progress, which would spoil the caller's own display, and reports."""
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
