"""Grounding parity: does the exported bundle answer as PyTorch does, and would we notice if it did not?

A run is measured against the reference case by case. Measuring and judging are apart, so that the measurement that must
pass the gates for the bundle is the one that must fail them for every negative control.

Shape letters: B batch, V vocabulary, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
from PIL import Image

from gap_export.boxes import metrics
from gap_export.boxes.codecs import Box
from gap_export.boxes.scenes import Case
from gap_export.bundle.manifest import Manifest
from gap_export.evaluation.gates import Gate, at_least, at_most
from gap_export.positions import (
    Ids,
    Placement,
    continuing_at_kept_length,
    place,
    renumbered,
    with_image_ids_reversed,
    with_last_stage_off_by_one,
    with_one_slot_counter,
    with_two_ids_swapped,
    with_write_index_off_by_one,
)
from gap_export.precision import Thresholds, precision
from gap_export.records import Record
from gap_export.runtime.generate import Adjust, Generation
from gap_export.runtime.model import Grounded, Grounder
from gap_export.runtime.session import Session

SCORE_MARGIN = 1e-3
"""Relative difference to the score of the last token kept below which the choice between two tokens is a tie."""

Wrong = Callable[[Placement, Ids, Ids], Placement]
"""(placement, text tokens before the image [B], kept visual tokens [B]) -> a placement that is wrong on purpose."""

Tick = Callable[[int], None]
"""Called with the number of cases finished since the last call."""


class Measurement(Record):
    """How a run differs from the reference, over all cases.

    Attributes:
        cases: how many.
        kept_sets_equal: share of cases in which both kept the same visual tokens, or exchanged only tokens whose scores
            the reference itself cannot tell apart (relative margin `SCORE_MARGIN`).
        position_ids_equal: share of cases whose ids, slots and both decode counters are what `positions.place` derives
            from the tokens the run kept.
        max_logit_difference: largest absolute difference, over all steps up to the first diverging token, of the cases
            with identical kept sets.
        min_logit_cosine: smallest cosine similarity of logit rows, same steps.
        max_norm_deviation: largest |1 - ratio of norms| of logit rows, same steps.
        token_agreement: share of generated tokens that are equal, position by position.
        first_diverging_token: earliest step at which any case diverges; None when none does.
        mean_box_iou: between the boxes of both runs.
        identical_boxes: share of cases.
        reference_accuracy: accuracy@0.5 of the reference.
        accuracy: accuracy@0.5 of the run.
    """

    cases: int
    kept_sets_equal: float
    position_ids_equal: float
    max_logit_difference: float
    min_logit_cosine: float
    max_norm_deviation: float
    token_agreement: float
    first_diverging_token: int | None
    mean_box_iou: float
    identical_boxes: float
    reference_accuracy: float
    accuracy: float


class Control(Record):
    """One wrong placement and whether the gates noticed it.

    Attributes:
        name: what was made wrong.
        caught: at least one gate failed.
        by: the gates that failed.
    """

    name: str
    caught: bool
    by: tuple[str, ...]


def run_cases(
    grounder: Grounder,
    session: Session,
    cases: Sequence[Case],
    *,
    batch: int,
    tick: Tick = lambda count: None,
    keep: float | None = None,
    adjust: Wrong | None = None,
    keep_logits: bool = False,
) -> list[Grounded]:
    """Answer all cases in batches.

    Args:
        grounder: of the bundle.
        session: whose answers are wanted.
        cases: in order.
        batch: rows per call.
        tick: for progress.
        keep: fraction of the visual tokens to keep, where the bundle lets requests choose.
        adjust: for negative controls.
        keep_logits: needed to measure parity, not to measure accuracy.
    """
    results = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        images, expressions = _shown(part, grounder.images_per_prompt), [case.expression for case in part]
        change = None if adjust is None else _change(adjust, grounder.text_before(expressions))
        results.append(
            grounder.ground(session, images, expressions, keep=keep, adjust=change, keep_logits=keep_logits)
        )
        tick(len(part))
    return results


def _shown(cases: Sequence[Case], per_prompt: int) -> list[Image.Image]:
    """The images of every prompt: a case's own comes last, after those of the cases before it."""
    return [
        cases[(number - back) % len(cases)].image
        for number in range(len(cases))
        for back in range(per_prompt - 1, -1, -1)
    ]


def _change(adjust: Wrong, text_before: Ids) -> Adjust:
    return lambda placement, visual: adjust(placement, text_before, counts_of(visual.kept_indices))


def counts_of(kept_BK: Ids) -> Ids:
    """[B] int64: how many visual tokens each row keeps; the rest is padding."""
    return np.asarray((kept_BK >= 0).sum(axis=1), np.int64)


def boxes_of(runs: Sequence[Grounded]) -> list[Box | None]:
    """One box per case."""
    return [answer.box for run in runs for answer in run.answers]


def accuracy_of(runs: Sequence[Grounded], cases: Sequence[Case]) -> float:
    """Accuracy@0.5 (IoU >= 0.5) against the true boxes; an answer without a box is a miss."""
    overlaps = metrics.iou(metrics.as_rows(boxes_of(runs)), metrics.as_rows([case.box for case in cases]))
    return metrics.accuracy(overlaps, comparator=">=").value


def measure(
    runs: Sequence[Grounded], reference: Sequence[Grounded], cases: Sequence[Case], manifest: Manifest
) -> Measurement:
    """Compare two runs over the same cases in the same batches.

    Args:
        runs: of the bundle.
        reference: of PyTorch.
        cases: what both were asked.
        manifest: of the bundle.

    Raises:
        ValueError: the runs do not line up, or were made without their logits.
    """
    kept_equal, ids_equal, differences, cosines, deviations = [], [], [0.0], [1.0], [0.0]
    tokens_equal = tokens_seen = 0
    earliest: int | None = None
    margin = precision(manifest.precision).choice_margin
    for run, truth in zip(runs, reference, strict=True):
        mine, theirs = run.generation, truth.generation
        if any(len(side.logits) < max(map(len, side.tokens)) for side in (mine, theirs)):
            raise ValueError("a run was made without its logits")
        pruning = manifest.pruning
        expected = place(
            mine.kept_indices,
            text_before=run.prompts.text_before,
            text_after=run.prompts.text_after,
            visual_tokens=run.batch.by_prompt(run.batch.visual_tokens),
            policy=pruning.positions,
            merged=pruning.merged,
            stages=tuple(stage.kept for stage in pruning.stages[1:]),
            grids=run.batch.grids,
            between=run.prompts.between,
            kept_counts=mine.kept_counts,
        )
        for row in range(len(truth.answers)):
            identical = _kept_of(mine, row) == _kept_of(theirs, row)
            kept_equal.append(identical or _is_tie(mine, theirs, row, margin))
            ids_equal.append(_same_ids(mine.placement, expected, row))
            a, b = mine.tokens[row], theirs.tokens[row]
            longest = max(len(a), len(b))
            same = sum(x == y for x, y in zip(a, b, strict=False))
            diverging = next((i for i in range(longest) if a[i : i + 1] != b[i : i + 1]), None)
            # An empty answer of both counts as one equal token, so that it is not lost.
            tokens_equal, tokens_seen = tokens_equal + (same if longest else 1), tokens_seen + max(longest, 1)
            if diverging is not None:
                earliest = diverging if earliest is None else min(earliest, diverging)
            if not identical:
                continue
            # Logits can be compared as long as both were fed the same tokens: one step past the last equal one.
            steps = (diverging if diverging is not None else longest) + 1
            for mine_BV, theirs_BV in zip(mine.logits[:steps], theirs.logits[:steps], strict=False):
                x, y = mine_BV[row].astype(np.float64), theirs_BV[row].astype(np.float64)
                norms = np.linalg.norm(x), np.linalg.norm(y)
                differences.append(float(np.abs(x - y).max()))
                cosines.append(float(x @ y / (norms[0] * norms[1])))
                deviations.append(float(abs(1 - norms[0] / norms[1])))
    agreement = metrics.agreement(boxes_of(runs), boxes_of(reference))
    return Measurement(
        cases=len(kept_equal),
        kept_sets_equal=float(np.mean(kept_equal)),
        position_ids_equal=float(np.mean(ids_equal)),
        max_logit_difference=_worst(max(differences), np.inf, differences),
        min_logit_cosine=_worst(min(cosines), -1.0, cosines),
        max_norm_deviation=_worst(max(deviations), np.inf, deviations),
        token_agreement=tokens_equal / tokens_seen,
        first_diverging_token=earliest,
        mean_box_iou=agreement.mean_iou,
        identical_boxes=agreement.identical,
        reference_accuracy=accuracy_of(reference, cases),
        accuracy=accuracy_of(runs, cases),
    )


def judge(measured: Measurement, thresholds: Thresholds) -> list[Gate]:
    """Hold a measurement against its thresholds."""
    return [
        at_least("kept_sets", measured.kept_sets_equal, thresholds.min_kept_sets_equal),
        at_least("position_ids", measured.position_ids_equal, 1.0),
        at_most("logit_difference", measured.max_logit_difference, thresholds.max_logit_difference),
        at_least("logit_cosine", measured.min_logit_cosine, thresholds.min_logit_cosine),
        at_most("logit_norm", measured.max_norm_deviation, thresholds.max_norm_deviation),
        at_least("token_agreement", measured.token_agreement, thresholds.min_token_agreement),
        at_least("box_iou", measured.mean_box_iou, thresholds.min_box_iou),
        at_most(
            "accuracy_drop", measured.reference_accuracy - measured.accuracy, thresholds.max_accuracy_drop
        ),
    ]


def controls(*, staged: bool = False) -> dict[str, Wrong]:
    """Placements that are wrong on purpose, by name.

    Args:
        staged: also those of decoders that drop tokens.
    """
    of_stages: dict[str, Wrong] = {
        "last stage's write index off by one": lambda placement, *_: with_last_stage_off_by_one(placement),
        "one slot counter for all stages": lambda placement, *_: with_one_slot_counter(placement),
    }
    return {
        "ids shifted": lambda placement, *_: renumbered(placement),
        "ids permuted": with_image_ids_reversed,
        "two ids swapped": with_two_ids_swapped,
        "write index off by one": lambda placement, *_: with_write_index_off_by_one(placement),
        "decoding continues at kept length": lambda placement, *_: continuing_at_kept_length(placement),
        **(of_stages if staged else {}),
    }


def applies(adjust: Wrong, run: Grounded) -> bool:
    """Whether a control changes anything: with nothing pruned, renumbered ids are the right ones."""
    before = run.generation.placement
    after = adjust(before, run.prompts.text_before, counts_of(run.generation.kept_indices))
    return not all(
        np.array_equal(getattr(before, field.name), getattr(after, field.name)) for field in fields(Placement)
    )


def check_control(name: str, measured: Measurement, thresholds: Thresholds) -> Control:
    """A control is caught when what the model computed gives it away.

    The comparison of position ids themselves does not count: it would notice any change of the input by definition.
    """
    failed = tuple(
        gate.name for gate in judge(measured, thresholds) if not gate.passed and gate.name != "position_ids"
    )
    return Control(name=name, caught=bool(failed), by=failed)


def _same_ids(mine: Placement, expected: Placement, row: int) -> bool:
    length = int(expected.next_slot[row])
    return bool(
        mine.next_slot[row] == length
        and mine.last_index[row] == length - 1
        and mine.next_position[row] == expected.next_position[row]
        and np.array_equal(mine.position_ids[..., row, :length], expected.position_ids[..., row, :length])
        and [int(slot[row]) for slot in mine.stage_next_slot]
        == [int(slot[row]) for slot in expected.stage_next_slot]
    )


def _kept_of(generation: Generation, row: int) -> list[list[int]]:
    """What a row kept, choice by choice. Sorted rather than sets: merged tokens may share an index with another token."""
    return [sorted(int(i) for i in kept[row] if i >= 0) for kept in generation.every_kept_indices]


def _is_tie(mine: Generation, theirs: Generation, row: int, margin: float) -> bool:
    """Whether the tokens that only one side kept have scores that count as equal."""
    if theirs.margins is not None:
        return bool(theirs.margins[row] <= margin)
    if theirs.scores is None:
        return False
    scores_N = theirs.scores[row]
    ((mine_K,), (kept_K,)) = _kept_of(mine, row), _kept_of(theirs, row)
    last = scores_N[kept_K].min()
    disputed = list(set(mine_K) ^ set(kept_K))
    return bool((np.abs(scores_N[disputed] - last) <= SCORE_MARGIN * abs(last)).all())


def _worst(value: float, if_broken: float, values: list[float]) -> float:
    """NaN compares as fine with every limit; it is the worst there is."""
    return if_broken if np.isnan(values).any() else value


class Grounding(Record):
    """Accuracy@0.5 of the exported graphs under each position policy.

    Attributes:
        full: unpruned.
        shifted: pruned, ids renumbered.
        permuted: pruned, score order, ids renumbered.
        gap: pruned, ids kept.
        cases: how many expressions.
        kept: visual tokens after pruning, on average where images differ.
        visual_tokens: before.
    """

    full: float
    shifted: float
    permuted: float
    gap: float
    cases: int
    kept: float
    visual_tokens: int


class ParityReport(Record):
    """The record `validate` leaves in `reports/parity.json`."""

    ok: bool
    bundle: str
    backend: str
    precision: str
    measurement: Measurement
    gates: list[Gate]
    controls: list[Control]
    inapplicable_controls: list[str]
    grounding: Grounding
    versions: dict[str, str]
