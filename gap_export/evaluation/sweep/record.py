"""The record of a sweep: what is stored, and what it says about GAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gap_export.boxes import metrics
from gap_export.positions import PositionPolicy
from gap_export.records import Change, Count, Flag, Record, Share

FULL: Literal["full"] = "full"
Positions = PositionPolicy | Literal["full"]
"""A policy, or `full`: nothing pruned, so that every policy gives the same ids."""


class Settings(Record):
    """All that the answers of a point depend on besides the point itself. A folder holds the points of one such.

    Attributes:
        schema_version: of the files in the folder.
        recipe: the recipe but for what is swept (pruner, keep, positions) and what follows from it (capacity).
        checkpoint_sha256: over all files of the checkpoint that a build reads.
        text_tower_sha256: hash of the text tower's files, where a pruner looks at the expression.
        backend: runtime.
        limit: scenes per point.
        scenes_seed: which scenes.
        batch: images per call.
        threads: of ONNX Runtime.
        versions: package -> version.
    """

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = 1
    recipe: dict[str, Any]
    checkpoint_sha256: str
    text_tower_sha256: str | None = None
    backend: str
    limit: Count
    scenes_seed: Count
    batch: Count
    threads: Count
    versions: dict[str, str]


class SweepPoint(Record):
    """One pruner, one count, one policy.

    Attributes:
        pruner: its name.
        keep: fraction of visual tokens kept.
        kept: the count.
        positions: numbering policy.
    """

    pruner: str
    keep: Share
    kept: Count
    positions: Positions

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.pruner}-{self.kept}-{self.positions}"

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"{self.pruner}, keep {self.kept}, {self.positions}"


class Answers(Record):
    """What came out of one point, scene by scene.

    Attributes:
        texts: as generated.
        ious: with the true box; 0 without a box.
        without_box: answers that hold no box, or one beside the image.
        cut_off: answers that did not end by themselves.
    """

    texts: tuple[str, ...]
    ious: tuple[Share, ...]
    without_box: Count
    cut_off: Count

    @model_validator(mode="after")
    def _of_the_same_scenes(self) -> Self:
        scenes = len(self.ious)
        if len(self.texts) != scenes:
            raise ValueError(f"texts are {len(self.texts)}, ious {scenes}")
        if max(self.cut_off, self.without_box) > scenes:
            raise ValueError(
                f"cut_off is {self.cut_off} and without_box {self.without_box}, of {scenes} scenes"
            )
        return self

    @property
    def hits(self) -> list[bool]:
        """Which scenes were hit."""
        return [overlap >= metrics.HIT_IOU for overlap in self.ious]


class Row(SweepPoint):
    """One point, measured.

    Attributes:
        visual_tokens: before pruning.
        accuracy: accuracy@0.5 of the exported graphs.
        standard_error: of the accuracy.
        low: lower end of its 95% interval (Wilson's).
        high: upper end.
        mean_iou: with the true boxes.
        without_box: answers without a box.
        cut_off: answers that reached the limit of tokens.
        cases: how many scenes.
    """

    visual_tokens: Count
    accuracy: Share
    standard_error: Share
    low: Share
    high: Share
    mean_iou: Share
    without_box: Count
    cut_off: Count
    cases: Count


class Skipped(SweepPoint):
    """A point that cannot be, and why."""

    reason: str


class Comparison(Record):
    """GAP against renumbered ids: same pruner, same tokens, same scenes.

    Attributes:
        pruner: its name.
        keep: fraction of visual tokens kept.
        kept: the count.
        difference: accuracy of GAP minus accuracy of shifted.
        low: lower end of the 95% interval of the paired difference.
        high: upper end.
        gained: scenes that only GAP hits.
        lost: scenes that only shifted hits.
        beats: whether the whole interval lies above 0.
    """

    pruner: str
    keep: Share
    kept: Count
    difference: Change
    low: Change
    high: Change
    gained: Count
    lost: Count
    beats: Flag


class SweepRecord(Record):
    """One sweep. It holds nothing that differs between two runs of the same command on the same machine.

    Attributes:
        model: name of the recipe.
        visual_tokens: before pruning.
        full: accuracy with nothing pruned.
        rows: measured points; the first is the unpruned one.
        gap_against_shifted: where both were measured.
        gap_does_not_beat_shifted: those of them whose interval does not lie above 0.
        skipped: points that cannot be.
        settings: what all points have in common.
    """

    model: str
    visual_tokens: Count
    full: Share
    rows: tuple[Row, ...]
    gap_against_shifted: tuple[Comparison, ...]
    gap_does_not_beat_shifted: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    settings: Settings


def record_from_answers(
    model: str,
    visual_tokens: int,
    measured: Sequence[tuple[SweepPoint, Answers]],
    skipped: Sequence[Skipped],
    settings: Settings,
) -> SweepRecord:
    """Put a record together.

    Args:
        model: name of the recipe.
        visual_tokens: before pruning.
        measured: points and their answers in the order of the table, the unpruned one first.
        skipped: points that cannot be.
        settings: of the sweep.
    """
    rows = tuple(_row(point, answers, visual_tokens) for point, answers in measured)
    gap, shifted = (
        {
            (point.pruner, point.kept): (point, answers)
            for point, answers in measured
            if point.positions == policy
        }
        for policy in (PositionPolicy.GAP, PositionPolicy.SHIFTED)
    )
    comparisons = tuple(_comparison(*gap[key], shifted[key][1]) for key in gap if key in shifted)
    return SweepRecord(
        model=model,
        visual_tokens=visual_tokens,
        full=rows[0].accuracy,
        rows=rows,
        gap_against_shifted=comparisons,
        gap_does_not_beat_shifted=tuple(each for each in comparisons if not each.beats),
        skipped=tuple(skipped),
        settings=settings,
    )


def _row(point: SweepPoint, answers: Answers, visual_tokens: int) -> Row:
    accuracy = metrics.accuracy(answers.ious, comparator=">=")
    low, high = accuracy.interval()
    return Row(
        **point.model_dump(),
        visual_tokens=visual_tokens,
        accuracy=accuracy.value,
        standard_error=accuracy.standard_error,
        low=low,
        high=high,
        mean_iou=metrics.mean_iou(answers.ious).value,
        without_box=answers.without_box,
        cut_off=answers.cut_off,
        cases=accuracy.count,
    )


def _comparison(point: SweepPoint, gap: Answers, shifted: Answers) -> Comparison:
    paired = metrics.paired_difference(gap.hits, shifted.hits)
    return Comparison(
        pruner=point.pruner,
        keep=point.keep,
        kept=point.kept,
        difference=paired.value,
        low=paired.low,
        high=paired.high,
        gained=paired.gained,
        lost=paired.lost,
        beats=paired.low > 0,
    )
