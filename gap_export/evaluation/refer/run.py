"""An evaluation: expressions grouped by image, answered, journalled; then scored under a protocol.

Answering knows nothing of protocols, and scoring nothing of models: the same answers can be scored under each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
from pydantic import model_validator

from gap_export.boxes import metrics
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.evaluator import Evaluator
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.refer.journal import AnswerRow, Journal
from gap_export.evaluation.refer.protocols import Protocol, Score, score
from gap_export.inputs.batch import ImageLayout
from gap_export.parallel import dispatch
from gap_export.parallel.ray import Cluster
from gap_export.progress import SILENT, Progress
from gap_export.records import Amount, Count, Flag, Record, Share, Text

Group = tuple[Expression, ...]
"""Expressions about one image."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        groups: name of an image -> expressions about it, in the order of the annotations.
        missing: names of images that are not there; their expressions are not asked and not scored.
        not_asked: expressions about those.
    """

    groups: dict[str, Group]
    missing: tuple[str, ...]
    not_asked: tuple[str, ...]

    @property
    def expressions(self) -> list[Expression]:
        """All that are asked."""
        return [expression for group in self.groups.values() for expression in group]


def work_of(expressions: Sequence[Expression], source: Source, *, limit: int | None = None) -> Work:
    """Group expressions by image.

    Args:
        expressions: of the data set.
        source: of its images.
        limit: only so many expressions, from the first on.

    Raises:
        InputError: not one image is there.
    """
    groups: dict[str, list[Expression]] = {}
    for expression in expressions[:limit]:
        groups.setdefault(expression.image, []).append(expression)
    missing = tuple(name for name in groups if not source.has(name))
    if groups and len(missing) == len(groups):
        raise InputError(
            f"none of the {len(groups)} images is there",
            subject=missing[0],
            hint="give the folder that holds them (--images)",
        )
    not_asked = tuple(expression.id for name in missing for expression in groups[name])
    there = {name: tuple(group) for name, group in groups.items() if name not in set(missing)}
    return Work(there, missing, not_asked)


def answer_all(
    make_evaluator: Callable[[], Evaluator],
    work: Work,
    source: Source,
    journal: Journal,
    *,
    cluster: Cluster | None = None,
    progress: Progress = SILENT,
) -> None:
    """Answer what the journal does not hold yet.

    Args:
        make_evaluator: called when there is something to answer, once in every worker; on a cluster the bundle must be there
            under the same path.
        work: to be done.
        source: of images; sent to every worker.
        journal: kept by the caller alone.
        cluster: of Ray, to dispatch images to; this process works when left out.
        progress: told of every expression, also of those that the journal holds already.

    Raises:
        GapExportError: an image cannot be read, or the runtime or the cluster failed. What was answered stays.
    """
    progress.stage("answering", total=len(work.expressions))
    groups = [_unanswered(group, journal) for group in work.groups.values()]
    progress.advance(len(work.expressions) - sum(map(len, groups)))
    dispatched = dispatch(
        partial(_GroupWorker, make_evaluator, source),
        [group for group in groups if group],
        cluster=cluster,
        name_of=lambda group: group[0].image,
        progress=progress,
    )
    with closing(dispatched) as results:
        for rows in results:
            journal.add(rows)


def _unanswered(group: Sequence[Expression], journal: Journal) -> Group:
    return tuple(expression for expression in group if expression.id not in journal.known)


class _GroupWorker:
    """A worker: answers the expressions about one image."""

    def __init__(self, make_evaluator: Callable[[], Evaluator], source: Source) -> None:
        self._evaluator, self._source = make_evaluator(), source

    def __call__(self, group: Group, progress: Progress) -> Iterator[list[AnswerRow]]:
        yield answer_rows(self._evaluator, self._source, group)
        progress.advance(len(group))


def answer_rows(evaluator: Evaluator, source: Source, group: Sequence[Expression]) -> list[AnswerRow]:
    """Answer expressions about one image.

    Raises:
        GapExportError: the image cannot be read, or the runtime failed.
    """
    image = source.open(group[0].image)
    answers = evaluator.answer_image(image, [expression.text for expression in group])
    return [
        AnswerRow(
            id=expression.id,
            image=expression.image,
            width=image.width,
            height=image.height,
            answer=answer.text,
            refused=answer.refused,
            tokens=answer.tokens,
            kept_indices=answer.kept_indices,
            seconds=round(answer.seconds, 6),
        )
        for expression, answer in zip(group, answers, strict=True)
    ]


@dataclass(frozen=True)
class Scored:
    """One expression with its answer and score."""

    expression: Expression
    row: AnswerRow
    score: Score


class EvalRecord(Record):
    """The outcome under one protocol.

    Attributes:
        protocol: name.
        description: of the protocol, for people.
        split: of the data set.
        expressions: scored.
        images: that they are about.
        accuracy: share that hits.
        low: lower end of its 95 % interval (Wilson).
        high: upper end.
        mean_iou: answers without a box count 0.
        unparsable: answers without a box among the expressions.
        refused: expressions among those that the model could not be asked.
        missing_images: images that were not there.
        not_scored: expressions about those.
        skipped_rows: annotations that could not be used and were left out.
        rescaled_images: images whose true boxes were scaled to their size.
        stretched_images: those of them whose shape is another one.
        boxes_are_read: whether the protocol reads boxes as the model's family writes them.
        mean_kept: visual tokens kept, on average.
        backend: that answered.
        box_format: in which answers were read, a key in `boxes.codecs.CODECS`; None in records of versions that did not say it.
    """

    protocol: Text
    description: str
    split: Text
    expressions: Count
    images: Count
    accuracy: Share
    low: Share
    high: Share
    mean_iou: Share
    unparsable: Count
    refused: Count
    missing_images: Count
    not_scored: Count
    mean_kept: Amount
    backend: Text
    skipped_rows: Count = 0
    rescaled_images: Count = 0
    stretched_images: Count = 0
    boxes_are_read: Flag = True
    box_format: Text | None = None

    @model_validator(mode="after")
    def _counts_within_each_other(self) -> Self:
        for part, whole in (
            ("images", "expressions"),
            ("unparsable", "expressions"),
            ("refused", "unparsable"),
            ("missing_images", "not_scored"),
            ("rescaled_images", "images"),
            ("stretched_images", "rescaled_images"),
        ):
            if getattr(self, part) > getattr(self, whole):
                raise ValueError(f"{part} {getattr(self, part)} is more than {whole} {getattr(self, whole)}")
        if not self.low - _ROUNDING <= self.accuracy <= self.high + _ROUNDING:
            raise ValueError(
                f"accuracy {self.accuracy:g} is not within low {self.low:g} to high {self.high:g}"
            )
        return self


def score_all(
    expressions: Iterable[Expression],
    rows: Sequence[AnswerRow],
    protocol: Protocol,
    layout: ImageLayout | None = None,
) -> list[Scored]:
    """Score answers.

    Args:
        expressions: that were asked.
        rows: one answer to each, in any order; answers to other expressions are not looked at.
        protocol: how.
        layout: of the model, for evaluators that read pixels of the image as it saw it.

    Raises:
        InputError: an expression without an answer, or a box that needs the layout and has none.
    """
    by_id = {row.id: row for row in rows}
    scored = []
    for expression in expressions:
        row = by_id.get(expression.id)
        if row is None:
            raise InputError(
                "has no answer",
                subject=f"expression {expression.id}",
                hint="every expression needs one, if an empty one: it then counts as a miss",
            )
        size = (row.width, row.height)
        seen = None if layout is None else layout.resized(size)
        if seen is None and protocol.metric.needs_seen:
            raise InputError(
                "writes pixels of the image as it saw it, and how large that was is not known",
                subject=f"boxes of {protocol.codec}",
                hint="score its answers with its bundle: gap-export eval BUNDLE",
            )
        scored.append(Scored(expression, row, score(row.answer, expression.box, size, protocol, seen=seen)))
    return scored


def record_of(
    scored: Sequence[Scored],
    protocol: Protocol,
    *,
    split: str,
    backend: str,
    work: Work | None = None,
    skipped_rows: int = 0,
    rescaled_images: int = 0,
    stretched_images: int = 0,
) -> EvalRecord:
    """Sum up.

    Args:
        scored: at least one.
        protocol: they were scored under.
        split: of the data set.
        backend: that answered.
        work: for what was left out.
        skipped_rows: annotations that were left out.
        rescaled_images: images whose true boxes were scaled.
        stretched_images: those of them whose shape is another one.

    Raises:
        InputError: nothing was scored.
    """
    if not scored:
        raise InputError(
            "holds no expression", subject=f"split {split}", hint="choose another split or a larger --limit"
        )
    hits = np.array([each.score.hit for each in scored])
    # The comparison was made one by one; what passes it is 1, what does not is 0.
    accuracy = metrics.accuracy(hits.astype(np.float64), comparator=">")
    low, high = accuracy.interval()
    return EvalRecord(
        protocol=protocol.name,
        description=protocol.description,
        split=split,
        expressions=len(scored),
        images=len({each.row.image for each in scored}),
        accuracy=accuracy.value,
        low=low,
        high=high,
        mean_iou=float(np.mean([each.score.iou for each in scored])),
        unparsable=sum(each.score.box is None for each in scored),
        refused=sum(each.row.refused is not None for each in scored),
        missing_images=len(work.missing) if work else 0,
        not_scored=len(work.not_asked) if work else 0,
        mean_kept=float(np.mean([each.row.kept for each in scored])),
        backend=backend,
        skipped_rows=skipped_rows,
        rescaled_images=rescaled_images,
        stretched_images=stretched_images,
        boxes_are_read=protocol.reads_the_codec,
        box_format=protocol.codec,
    )
