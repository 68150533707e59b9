"""Grounding parity: does the exported bundle answer as PyTorch does, and would we notice if it did not?

A run is measured against the reference case by case. Measuring and judging are apart, so that the measurement that must
pass the gates for the bundle is the one that must fail them for every negative control.
What the controls are stands in `controls.py`.

Shape letters: B batch, V vocabulary, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import model_validator

from gap_export.boxes import metrics
from gap_export.boxes.scenes import Case
from gap_export.bundle.manifest import Manifest
from gap_export.errors import GateError
from gap_export.evaluation.gates import Gate, Measured, at_least, at_most, check_gates
from gap_export.evaluation.runner import accuracy_of, boxes_of
from gap_export.positions import Placement, place
from gap_export.precision import Thresholds, hinted_margin, precision
from gap_export.records import Amount, Count, Flag, Record, Share
from gap_export.runtime.generate import Generation
from gap_export.runtime.grounder import Grounded
from gap_export.runtime.keep import stage_counts_of

SCORE_MARGIN = 1e-3
"""Relative difference to the score of the last token kept below which the choice between two tokens is a tie."""
_LEAST_LOGIT = 1e-6
"""In the place of a largest logit that is zero."""


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
        max_relative_logit_difference: largest difference of logits, as a share of the largest magnitude in the reference's row.
        min_logit_cosine: smallest cosine similarity of logit rows, same steps.
        max_norm_deviation: largest |1 - ratio of norms| of logit rows, same steps.
        token_agreement: share of generated tokens that are equal, position by position.
        first_diverging_token: earliest step at which any case diverges; None when none does.
        mean_box_iou: between the boxes of both runs.
        identical_boxes: share of cases.
        reference_accuracy: accuracy@0.5 of the reference.
        accuracy: accuracy@0.5 of the run.
    """

    cases: Count
    kept_sets_equal: Share
    position_ids_equal: Share
    max_logit_difference: Measured
    max_relative_logit_difference: Measured
    min_logit_cosine: Measured
    max_norm_deviation: Measured
    token_agreement: Share
    first_diverging_token: Count | None
    mean_box_iou: Share
    identical_boxes: Share
    reference_accuracy: Share
    accuracy: Share


class Control(Record):
    """One wrong placement and whether the gates noticed it.

    Attributes:
        name: what was made wrong.
        caught: at least one gate failed.
        by: the gates that failed.
    """

    name: str
    caught: Flag
    by: tuple[str, ...]

    @model_validator(mode="after")
    def _caught_by_something(self) -> Self:
        if self.caught != bool(self.by):
            raise ValueError(f"{self.name}: caught is {self.caught}, by {len(self.by)} gates")
        return self


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

    full: Share
    shifted: Share
    permuted: Share
    gap: Share
    cases: Count
    kept: Amount
    visual_tokens: Count


class ParityReport(Record):
    """The record that `validate` leaves among the reports of the bundle.

    Attributes:
        ok: every gate was met and every control caught.
        manifest_sha256: of the build that was measured.
        bundle: name of its recipe.
        backend: runtime that it was put through.
        precision: of weights and activations.
        measurement: against PyTorch.
        gates: the measurement, checked.
        controls: wrong placements, and whether they were noticed.
        inapplicable_controls: those that change nothing in this bundle.
        grounding: accuracy under each position policy.
        versions: package -> version.
    """

    ok: Flag
    manifest_sha256: str
    bundle: str
    backend: str
    precision: str
    measurement: Measurement
    gates: list[Gate]
    controls: list[Control]
    inapplicable_controls: list[str]
    grounding: Grounding
    versions: dict[str, str]

    @model_validator(mode="after")
    def _ok_as_measured(self) -> Self:
        met = all(gate.passed for gate in self.gates) and all(control.caught for control in self.controls)
        if self.ok != met:
            raise ValueError(f"ok is {self.ok}, which its gates and controls contradict")
        return self

    def raise_for_gates(self) -> None:
        """Go on only where every gate was met and every control was caught.

        Raises:
            GateError: one was not.
        """
        check_gates(self.gates, subject=f"{self.bundle} in {self.backend}")
        missed = [control.name for control in self.controls if not control.caught]
        if missed:
            raise GateError(
                f"went unnoticed: {', '.join(missed)}",
                subject=f"negative control of {self.bundle} in {self.backend}",
                hint="the thresholds are too loose to tell right position ids from wrong ones",
            )


def measure(
    runs: Sequence[Grounded],
    reference: Sequence[Grounded],
    cases: Sequence[Case],
    manifest: Manifest,
    *,
    hint: str = "",
) -> Measurement:
    """Compare two runs over the same cases in the same batches.

    Args:
        runs: of the bundle.
        reference: of PyTorch.
        cases: what both were asked.
        manifest: of the bundle.
        hint: type of activations, where the runtime computed in another than the bundle says.

    Raises:
        ValueError: the runs do not line up, or were made without their logits.
    """
    rows: list[_Row] = []
    margin = hinted_margin(precision(manifest.precision), hint)
    for run, truth in zip(runs, reference, strict=True):
        mine, theirs = run.generation, truth.generation
        if any(len(side.logits) < max(map(len, side.tokens)) for side in (mine, theirs)):
            raise ValueError("a run was made without its logits")
        expected = _expected_placement(run, manifest)
        rows += [_compare_row(mine, theirs, expected, row, margin) for row in range(len(truth.answers))]
    differences = [value for row in rows for value in row.logit_differences] or [0.0]
    relative = [value for row in rows for value in row.relative_differences] or [0.0]
    cosines = [value for row in rows for value in row.logit_cosines] or [1.0]
    deviations = [value for row in rows for value in row.norm_deviations] or [0.0]
    diverging = [row.first_diverging_token for row in rows if row.first_diverging_token is not None]
    agreement = metrics.agreement(boxes_of(runs), boxes_of(reference))
    return Measurement(
        cases=len(rows),
        kept_sets_equal=float(np.mean([row.kept_equal for row in rows])),
        position_ids_equal=float(np.mean([row.ids_equal for row in rows])),
        max_logit_difference=_worst(max(differences), np.inf, differences),
        max_relative_logit_difference=_worst(max(relative), np.inf, relative),
        min_logit_cosine=_worst(min(cosines), -1.0, cosines),
        max_norm_deviation=_worst(max(deviations), np.inf, deviations),
        token_agreement=sum(row.tokens_equal for row in rows) / sum(row.tokens for row in rows),
        first_diverging_token=min(diverging, default=None),
        mean_box_iou=agreement.mean_iou,
        identical_boxes=agreement.identical,
        reference_accuracy=accuracy_of(reference, cases),
        accuracy=accuracy_of(runs, cases),
    )


def judge(measured: Measurement, thresholds: Thresholds) -> list[Gate]:
    """Hold a measurement against its thresholds."""
    of_logits = {
        "logit_difference": (measured.max_logit_difference, thresholds.max_logit_difference),
        "relative_logit_difference": (
            measured.max_relative_logit_difference,
            thresholds.max_relative_logit_difference,
        ),
    }
    return [
        at_least("kept_sets", measured.kept_sets_equal, thresholds.min_kept_sets_equal),
        at_least("position_ids", measured.position_ids_equal, 1.0),
        *(at_most(name, found, limit) for name, (found, limit) in of_logits.items() if limit is not None),
        at_least("logit_cosine", measured.min_logit_cosine, thresholds.min_logit_cosine),
        at_most("logit_norm", measured.max_norm_deviation, thresholds.max_norm_deviation),
        at_least("token_agreement", measured.token_agreement, thresholds.min_token_agreement),
        at_least("box_iou", measured.mean_box_iou, thresholds.min_box_iou),
        at_most(
            "accuracy_drop", measured.reference_accuracy - measured.accuracy, thresholds.max_accuracy_drop
        ),
    ]


@dataclass(frozen=True)
class _Row:
    """How one case differs from the reference; figures of logits are those of its comparable steps."""

    kept_equal: bool
    ids_equal: bool
    tokens_equal: int
    tokens: int
    first_diverging_token: int | None
    logit_differences: list[float]
    relative_differences: list[float]
    logit_cosines: list[float]
    norm_deviations: list[float]


def _expected_placement(run: Grounded, manifest: Manifest) -> Placement:
    """What `positions.place` derives from the tokens that a run kept."""
    pruning, generation = manifest.pruning, run.generation
    return place(
        generation.kept_indices,
        text_before=run.prompts.text_before,
        text_after=run.prompts.text_after,
        visual_tokens=run.batch.by_prompt(run.batch.visual_tokens),
        policy=pruning.positions,
        merged=pruning.merged,
        stage_counts=stage_counts_of(pruning, generation.placement.stage_counts, len(run.answers)),
        grids=run.batch.grids,
        between=run.prompts.between,
        kept_counts=generation.kept_counts,
    )


def _compare_row(mine: Generation, theirs: Generation, expected: Placement, row: int, margin: float) -> _Row:
    identical = _kept_of(mine, row) == _kept_of(theirs, row)
    a, b = mine.tokens[row], theirs.tokens[row]
    longest = max(len(a), len(b))
    same = sum(x == y for x, y in zip(a, b, strict=False))
    diverging = next((i for i in range(longest) if a[i : i + 1] != b[i : i + 1]), None)
    found = _Row(
        kept_equal=identical or _is_tie(mine, theirs, row, margin),
        ids_equal=_same_ids(mine.placement, expected, row),
        # An empty answer of both counts as one equal token, so that it is not lost.
        tokens_equal=same if longest else 1,
        tokens=max(longest, 1),
        first_diverging_token=diverging,
        logit_differences=[],
        relative_differences=[],
        logit_cosines=[],
        norm_deviations=[],
    )
    # Logits can be compared as long as both were fed the same tokens: one step past the last equal one.
    steps = (longest if diverging is None else diverging) + 1 if identical else 0
    for mine_BV, theirs_BV in zip(mine.logits[:steps], theirs.logits[:steps], strict=False):
        x, y = mine_BV[row].astype(np.float64), theirs_BV[row].astype(np.float64)
        norms = np.linalg.norm(x), np.linalg.norm(y)
        difference = float(np.abs(x - y).max())
        found.logit_differences.append(difference)
        found.relative_differences.append(difference / max(float(np.abs(y).max()), _LEAST_LOGIT))
        found.logit_cosines.append(float(x @ y / (norms[0] * norms[1])))
        found.norm_deviations.append(float(abs(1 - norms[0] / norms[1])))
    return found


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
