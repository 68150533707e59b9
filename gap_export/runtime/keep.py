"""How many visual tokens a request keeps: what the calls of the graphs are told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gap_export import prune
from gap_export.bundle.manifest import ModelSpec, Pruning
from gap_export.errors import BundleError, InputError, shown
from gap_export.inputs.batch import ImageBatch
from gap_export.positions import Ids
from gap_export.runtime.session import vision_inputs


@dataclass(frozen=True)
class KeepCounts:
    """What the graphs are told of a batch of images.

    Attributes:
        calls: of every call of the vision graph, how many tokens to keep; None where it is not told.
        stages: [B, I, J] int64, visual tokens of every image in every later stage of a decoder that drops them; None where it is not told.
    """

    calls: tuple[int | None, ...]
    stages: Ids | None = None

    @property
    def most(self) -> int | None:
        """Of the image that keeps most before the decoder, tokens that are never pruned not counted; None where no call is told."""
        return max((count for count in self.calls if count is not None), default=None)

    def entering(self, batch: ImageBatch, default: int) -> list[int]:
        """How many tokens of every image enter the decoder, or enter it at most.

        Args:
            batch: of the images.
            default: where calls are not told.
        """
        never = (batch.visual_tokens - batch.prunable).tolist()
        calls = self.calls if len(self.calls) == len(never) else self.calls * len(never)
        return [default if count is None else count + more for count, more in zip(calls, never, strict=True)]

    def gone(self, batch: ImageBatch) -> list[int] | None:
        """How many tokens of a prompt every later stage does not see, of the prompt that loses least; None where that is not told.

        Args:
            batch: of the images.
        """
        if self.stages is None:
            return None
        entering_BI = batch.visual_tokens.reshape(self.stages.shape[:2])
        gone_BJ = (entering_BI[:, :, None] - self.stages).sum(axis=1)
        return [int(gone) for gone in gone_BJ.min(axis=0)]


def keep_counts(pruning: Pruning, model: ModelSpec, batch: ImageBatch, keep: float | None) -> KeepCounts:
    """How many tokens a request keeps.

    Args:
        pruning: of the bundle.
        model: sizes of the bundle's model.
        batch: of images.
        keep: fraction that the request asks for, or None for the bundle's own.

    Raises:
        InputError: a fraction that the bundle was not built for.
        RecipeError: no fraction.
    """
    check_keep(pruning, model, keep)
    _check_stages(pruning)
    share = pruning.keep if keep is None else keep
    stages = _stage_counts(pruning, batch, share) if pruning.stage_counts_are_told else None
    # What is dropped inside the decoder enters it.
    entering = 1.0 if pruning.stages else share
    if not pruning.count_is_given:
        return KeepCounts((None,) * len(batch.calls), stages)
    if model.token_range is not None:
        at_least = pruning.pruner_min_tokens
        counts = tuple(prune.share_of(entering, int(tokens), at_least) for tokens in batch.prunable)
        return KeepCounts(counts, stages)
    count = None if keep is None else prune.kept_count(share, model.visual_tokens)
    return KeepCounts((count,) * len(batch.calls), stages)


def _check_stages(pruning: Pruning) -> None:
    """Refuse a bundle whose stages are not those of its pruner: a manifest can say anything.

    Raises:
        BundleError: they are not.
    """
    row = prune.row(pruning.pruner)
    expected: tuple[int, ...] = ()
    if row.in_decoder and pruning.stages:
        expected = (pruning.kept, *row.load_schedule().counts(pruning.keep, pruning.kept))
    if row.in_decoder != bool(pruning.stages) or expected != tuple(stage.kept for stage in pruning.stages):
        raise BundleError(
            f"has stages of {shown(tuple(stage.kept for stage in pruning.stages))} tokens, and {row.name} has {shown(expected)}",
            subject="manifest.json, pruning.stages",
            hint="the bundle is damaged: build it again",
        )


def _stage_counts(pruning: Pruning, batch: ImageBatch, share: float) -> Ids:
    """[B, I, J] int64."""
    schedule = prune.row(pruning.pruner).load_schedule()
    counts = [schedule.counts(share, int(tokens)) for tokens in batch.visual_tokens]
    return np.array(counts, np.int64).reshape(-1, batch.per_prompt, schedule.stages)


def check_keep(pruning: Pruning, model: ModelSpec, keep: float | None) -> None:
    """Refuse a fraction of visual tokens that requests to a bundle cannot choose.

    Args:
        pruning: of the bundle.
        model: sizes of the bundle's model.
        keep: fraction that the request asks for, or None for the bundle's own.

    Raises:
        InputError: a fraction that the bundle was not built for.
        RecipeError: no fraction.
    """
    if keep is None:
        return
    if model.token_range is None and not pruning.stage_counts_are_told:
        count = prune.kept_count(keep, model.visual_tokens)
        vision_inputs(pruning, reads_text=False, text_ids_BL=None, keep_count=count)
        return
    if pruning.keep_range is None and keep != pruning.keep:
        raise InputError(
            f"cannot be chosen: this bundle keeps {'at most ' if pruning.finds_count else ''}{pruning.keep:g} of every image",
            subject=f"keep {keep:g}",
            hint="build it with a range: --keep 0.1:1.0",
        )
    if pruning.keep_range is not None and not pruning.keep_range[0] <= keep <= pruning.keep_range[1]:
        raise InputError(
            f"is outside {pruning.keep_range[0]:g} to {pruning.keep_range[1]:g}, which this bundle was built for",
            subject=f"keep {keep:g}",
            hint="choose within the range, or build with a wider --keep",
        )


def stage_counts_of(pruning: Pruning, told: Ids | None, rows: int) -> Ids | None:
    """[B, I, J] int64: visual tokens of every image in every later stage; None where no tokens are dropped inside the decoder.

    Args:
        pruning: of the bundle.
        told: what the graphs were told, where they were.
        rows: B.
    """
    if not pruning.stages or told is not None:
        return told
    kept_J = np.array([stage.kept for stage in pruning.stages[1:]], np.int64)
    return np.broadcast_to(kept_J, (rows, 1, len(kept_J)))
