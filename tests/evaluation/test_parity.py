"""Measuring and judging with made-up runs: every gate can fail, not-a-number fails, ties of score do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gap_export.boxes.scenes import Case
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Manifest
from gap_export.errors import GateError
from gap_export.evaluation import parity, runner
from gap_export.evaluation.controls import applies, check_control, controls
from gap_export.evaluation.gates import Gate, check_gates
from gap_export.evaluation.parity import Measurement
from gap_export.inputs.batch import of_one_size
from gap_export.inputs.prompt import Prompts
from gap_export.positions import Ids, Placement, PositionPolicy, place
from gap_export.precision import PRECISIONS, Thresholds
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, Timings
from gap_export.runtime.grounder import Answer, Grounded, Grounder
from tests.recorded import Recorded

BOX = (1.0, 2.0, 11.0, 12.0)
FAR = (50.0, 50.0, 60.0, 60.0)
VISUAL, KEPT, VOCABULARY = 36, 9, 5
BEFORE, AFTER = np.array([2, 3]), np.array([4, 2])
KEPT_BK: Ids = np.stack([np.arange(KEPT) * 3, np.arange(KEPT) * 4])


def prompts() -> Prompts:
    ids = np.full((2, 7), -1, np.int64)
    for row in range(2):
        ids[row, : BEFORE[row] + 1 + AFTER[row]] = 7
    return Prompts(ids, BEFORE, AFTER, np.zeros((len(ids), 0), np.int64))


def grounded(
    *,
    tokens: tuple[list[int], list[int]] = ([1, 2, 3], [4]),
    logits: list[NDArray[np.float32]] | None = None,
    kept: Ids = KEPT_BK,
    boxes: tuple[Any, Any] = (BOX, BOX),
    scores: NDArray[np.float32] | None = None,
    placement: Placement | None = None,
) -> Grounded:
    """One batch of two rows; by default what is right."""
    rng = np.random.default_rng(0)
    if logits is None:
        logits = [rng.normal(size=(2, VOCABULARY)).astype(np.float32) for _ in range(4)]
    if placement is None:
        placement = place(
            kept, text_before=BEFORE, text_after=AFTER, visual_tokens=VISUAL, policy=PositionPolicy.GAP
        )
    answers = [
        Answer("", () if box is None else (box,), row, VISUAL, len(ids), "stop", Timings())
        for box, row, ids in zip(boxes, kept, tokens, strict=True)
    ]
    generation = Generation([list(row) for row in tokens], logits, kept, placement, scores)
    batch = of_one_size(np.zeros((2, 3, 36, 36), np.float32), VISUAL)
    return Grounded(answers=answers, boxes=list(boxes), generation=generation, prompts=prompts(), batch=batch)


CASES = [Case(str(i), Image.new("RGB", (96, 96)), "x", BOX) for i in range(2)]


@pytest.fixture
def manifest(tiny_bundle: Callable[..., Bundle]) -> Manifest:
    return tiny_bundle().manifest


def measure(mine: Grounded, theirs: Grounded, manifest: Manifest) -> Measurement:
    return parity.measure([mine], [theirs], CASES, manifest)


def nudged(step: int, row: int, by: float) -> list[NDArray[np.float32]]:
    logits = [array.copy() for array in grounded().generation.logits]
    logits[step][row, 1] += by
    return logits


FINE = Measurement(
    cases=10,
    kept_sets_equal=1.0,
    position_ids_equal=1.0,
    max_logit_difference=0.0,
    max_relative_logit_difference=0.0,
    min_logit_cosine=1.0,
    max_norm_deviation=0.0,
    token_agreement=1.0,
    first_diverging_token=None,
    mean_box_iou=1.0,
    identical_boxes=1.0,
    reference_accuracy=0.9,
    accuracy=0.9,
)


# Measuring


def test_equal_runs_measure_equal(manifest: Manifest) -> None:
    measured = measure(grounded(), grounded(), manifest)
    assert measured.min_logit_cosine == pytest.approx(1.0)
    assert measured.model_copy(update={"min_logit_cosine": 1.0}) == FINE.model_copy(
        update={"cases": 2, "reference_accuracy": 1.0, "accuracy": 1.0}
    )
    assert all(gate.passed for gate in parity.judge(measured, Thresholds()))


@pytest.mark.parametrize(("step", "row"), [(0, 0), (3, 0), (0, 1), (1, 1)])
def test_logits_differ_at_any_step_of_an_answer(step: int, row: int, manifest: Manifest) -> None:
    measured = measure(grounded(logits=nudged(step, row, 0.5)), grounded(), manifest)
    assert measured.max_logit_difference == pytest.approx(0.5, abs=1e-5)
    assert measured.min_logit_cosine < 0.99
    assert measured.max_norm_deviation > 0.001


RELATIVE = Thresholds(
    max_logit_difference=None,
    max_relative_logit_difference=0.02,
    min_logit_cosine=0.999,
    max_norm_deviation=0.02,
)
"""Logits are judged as those of half precision are."""


def scaled(by: float, noise: float = 0.0) -> list[NDArray[np.float32]]:
    """The usual logits and noise of that share of them, all times so much."""
    rng = np.random.default_rng(1)
    return [
        (by * (each + noise * rng.normal(size=each.shape))).astype(np.float32)
        for each in grounded().generation.logits
    ]


@pytest.mark.parametrize("by", [1e-3, 0.1, 10.0, 1e4])
def test_the_relative_difference_does_not_depend_on_how_large_logits_are(
    by: float, manifest: Manifest
) -> None:
    """Rounding in half precision is a part of what is rounded: models of large logits are off by more."""
    usual, other = (
        measure(grounded(logits=scaled(size, 0.01)), grounded(logits=scaled(size)), manifest)
        for size in (1.0, by)
    )
    assert usual.max_relative_logit_difference > 1e-3
    assert other.max_relative_logit_difference == pytest.approx(usual.max_relative_logit_difference, rel=1e-3)
    assert other.max_logit_difference == pytest.approx(by * usual.max_logit_difference, rel=1e-3)
    verdicts = [[gate.passed for gate in parity.judge(each, RELATIVE)] for each in (usual, other)]
    assert verdicts[0] == verdicts[1]


def test_the_relative_difference_is_that_of_the_worst_row(manifest: Manifest) -> None:
    """Relative to the largest logit of PyTorch's row, of either sign; steps with larger logits hide nothing."""
    theirs = [np.zeros((2, VOCABULARY), np.float32) for _ in range(4)]
    for step, array in enumerate(theirs):
        array[:, 0] = -8.0 * 10**step
    mine = [array.copy() for array in theirs]
    mine[0][1, 3] += 2.0
    mine[3][0, 3] += 100.0
    measured = measure(grounded(logits=mine), grounded(logits=theirs), manifest)
    assert measured.max_logit_difference == pytest.approx(100.0)
    assert measured.max_relative_logit_difference == pytest.approx(0.25)


def test_a_row_that_should_be_zero_and_is_not_is_no_small_difference(manifest: Manifest) -> None:
    zeros = [np.zeros((2, VOCABULARY), np.float32)] * 4
    with np.errstate(invalid="ignore", divide="ignore"):
        measured = measure(grounded(logits=scaled(1e-4)), grounded(logits=zeros), manifest)
    assert measured.max_relative_logit_difference > 1


@pytest.mark.parametrize(
    ("gates", "names"),
    [
        (Thresholds(), {"logit_difference"}),
        (RELATIVE, {"relative_logit_difference"}),
        (replace(RELATIVE, max_logit_difference=1.0), {"logit_difference", "relative_logit_difference"}),
        (replace(RELATIVE, max_relative_logit_difference=None), set()),
    ],
)
def test_logits_are_judged_by_what_has_a_threshold(gates: Thresholds, names: set[str]) -> None:
    assert {gate.name for gate in parity.judge(FINE, gates)} & {
        "logit_difference",
        "relative_logit_difference",
    } == names


def test_logits_after_the_end_of_a_row_do_not_count(manifest: Manifest) -> None:
    """Row 1 ended after one token; its batch went on with row 0."""
    assert measure(grounded(logits=nudged(2, 1, 9.0)), grounded(), manifest).max_logit_difference == 0.0


def test_logits_count_up_to_the_first_token_that_differs(manifest: Manifest) -> None:
    """After it the two were fed different tokens."""
    other = ([1, 9, 3], [4])
    seen = measure(grounded(tokens=other, logits=nudged(1, 0, 0.25)), grounded(), manifest)
    unseen = measure(grounded(tokens=other, logits=nudged(2, 0, 0.25)), grounded(), manifest)
    assert seen.max_logit_difference == pytest.approx(0.25, abs=1e-5)
    assert unseen.max_logit_difference == 0.0


@pytest.mark.parametrize(
    ("mine", "agreement", "earliest"),
    [
        (([1, 2, 3], [4]), 1.0, None),
        (([1, 9, 3], [4]), 3 / 4, 1),
        (([1, 2, 3], [5]), 3 / 4, 0),
        (([1, 2], [4]), 3 / 4, 2),
        (([1, 2, 3], [4, 4]), 4 / 5, 1),
        (([], [4]), 1 / 4, 0),
    ],
)
def test_tokens(
    mine: tuple[list[int], list[int]], agreement: float, earliest: int | None, manifest: Manifest
) -> None:
    measured = measure(grounded(tokens=mine), grounded(), manifest)
    assert measured.token_agreement == pytest.approx(agreement)
    assert measured.first_diverging_token == earliest


def test_empty_answers_agree(manifest: Manifest) -> None:
    measured = measure(grounded(tokens=([], [])), grounded(tokens=([], [])), manifest)
    assert measured.token_agreement == 1.0


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_the_worst_there_is(broken: float, manifest: Manifest) -> None:
    measured = measure(grounded(logits=nudged(1, 0, broken)), grounded(), manifest)
    for gates, logits in ((Thresholds(), "logit_difference"), (RELATIVE, "relative_logit_difference")):
        failed = {gate.name for gate in parity.judge(measured, gates) if not gate.passed}
        assert failed >= {logits, "logit_cosine", "logit_norm"}


def test_what_is_not_a_number_is_stored_and_read() -> None:
    """As null, which JSON has; not as a file that cannot be read again."""
    broken = FINE.model_copy(update={"max_logit_difference": np.inf, "max_norm_deviation": np.nan})
    again = Measurement.model_validate_json(broken.model_dump_json())
    assert np.isnan([again.max_logit_difference, again.max_norm_deviation]).all()
    gates = parity.judge(broken, Thresholds())
    read = [Gate.model_validate_json(gate.model_dump_json()) for gate in gates]
    assert [gate.passed for gate in read] == [gate.passed for gate in gates]


def test_logits_that_are_all_zero_are_not_fine(manifest: Manifest) -> None:
    zeros = [np.zeros((2, VOCABULARY), np.float32)] * 4
    with np.errstate(invalid="ignore"):
        measured = measure(grounded(logits=zeros), grounded(), manifest)
    assert "logit_cosine" in {gate.name for gate in parity.judge(measured, Thresholds()) if not gate.passed}


def test_boxes_and_accuracy(manifest: Manifest) -> None:
    measured = measure(grounded(boxes=(BOX, FAR)), grounded(), manifest)
    assert (measured.mean_box_iou, measured.identical_boxes) == (0.5, 0.5)
    assert (measured.reference_accuracy, measured.accuracy) == (1.0, 0.5)
    missing = measure(grounded(boxes=(BOX, None)), grounded(), manifest)
    assert (missing.mean_box_iou, missing.accuracy) == (0.5, 0.5)
    both = measure(grounded(boxes=(None, None)), grounded(boxes=(None, None)), manifest)
    assert (both.mean_box_iou, both.accuracy) == (1.0, 0.0)


@pytest.mark.parametrize("field", ["position_ids", "next_position", "next_slot", "last_index"])
def test_any_part_of_the_placement_is_compared(field: str, manifest: Manifest) -> None:
    right = grounded().generation.placement
    wrong = getattr(right, field).copy()
    wrong[0] += 1
    measured = measure(grounded(placement=replace(right, **{field: wrong})), grounded(), manifest)
    assert measured.position_ids_equal == 0.5


def test_ids_of_padding_do_not_count(manifest: Manifest) -> None:
    right = grounded().generation.placement
    ids = right.position_ids.copy()
    ids[1, -1] = 999
    assert right.next_slot[1] < ids.shape[1]
    assert (
        measure(grounded(placement=replace(right, position_ids=ids)), grounded(), manifest).position_ids_equal
        == 1
    )


def test_placement_is_judged_by_the_tokens_the_run_kept_itself(manifest: Manifest) -> None:
    """Another set of tokens is one mistake, not two."""
    kept = KEPT_BK + 1
    assert measure(grounded(kept=kept), grounded(), manifest).position_ids_equal == 1.0


# Kept sets and ties


def scores_with(last: float, challenger: float) -> NDArray[np.float32]:
    """[2, 36]: kept tokens score 1, the last one `last`, one that was not kept `challenger`."""
    scores = np.full((2, VISUAL), 0.01, np.float32)
    for row in range(2):
        scores[row, KEPT_BK[row]] = 1.0
        scores[row, KEPT_BK[row, -1]] = last
        scores[row, 1] = challenger
    return scores


def with_challenger() -> Ids:
    kept = KEPT_BK.copy()
    kept[0, -1] = 1
    return np.sort(kept, axis=1)


@pytest.mark.parametrize(
    ("challenger", "tie"), [(0.5, True), (0.5 * (1 - 5e-4), True), (0.5 * (1 - 5e-3), False), (0.2, False)]
)
def test_only_scores_that_cannot_be_told_apart_are_a_tie(
    challenger: float, tie: bool, manifest: Manifest
) -> None:
    theirs = grounded(scores=scores_with(0.5, challenger))
    measured = measure(grounded(kept=with_challenger()), theirs, manifest)
    assert measured.kept_sets_equal == (1.0 if tie else 0.5)


def test_without_scores_nothing_is_a_tie(manifest: Manifest) -> None:
    assert measure(grounded(kept=with_challenger()), grounded(), manifest).kept_sets_equal == 0.5


def test_order_is_no_difference_of_sets(manifest: Manifest) -> None:
    assert measure(grounded(kept=KEPT_BK[:, ::-1].copy()), grounded(), manifest).kept_sets_equal == 1.0


def test_logits_of_other_sets_are_not_compared(manifest: Manifest) -> None:
    theirs = grounded(scores=scores_with(0.5, 0.5))
    measured = measure(grounded(kept=with_challenger(), logits=nudged(0, 0, 9.0)), theirs, manifest)
    assert measured.max_logit_difference == 0.0


# What cannot be measured


def test_runs_without_their_logits_are_refused(manifest: Manifest) -> None:
    first_only = grounded(logits=grounded().generation.logits[:1])
    for mine, theirs in ((first_only, grounded()), (grounded(), first_only)):
        with pytest.raises(ValueError, match="without its logits"):
            measure(mine, theirs, manifest)


def test_runs_that_do_not_line_up_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="zip"):
        parity.measure([grounded()], [grounded(), grounded()], CASES, manifest)


# Judging


@pytest.mark.parametrize(
    ("field", "limit", "sign", "gate"),
    [
        ("kept_sets_equal", 1.0, -1, "kept_sets"),
        ("position_ids_equal", 1.0, -1, "position_ids"),
        ("max_logit_difference", 1e-3, 1, "logit_difference"),
        ("min_logit_cosine", 0.99999, -1, "logit_cosine"),
        ("max_norm_deviation", 1e-3, 1, "logit_norm"),
        ("token_agreement", 0.99, -1, "token_agreement"),
        ("mean_box_iou", 0.99, -1, "box_iou"),
        ("accuracy", 0.9 - 0.005, -1, "accuracy_drop"),
    ],
)
def test_every_gate_fails_beyond_its_limit_and_not_before(
    field: str, limit: float, sign: int, gate: str
) -> None:
    assert all(entry.passed for entry in parity.judge(FINE, Thresholds()))
    inside = FINE.model_copy(update={field: limit - sign * 1e-7})
    beyond = FINE.model_copy(update={field: limit + sign * 1e-5})
    assert all(entry.passed for entry in parity.judge(inside, Thresholds()))
    assert [entry.name for entry in parity.judge(beyond, Thresholds()) if not entry.passed] == [gate]
    unknown = FINE.model_copy(update={field: float("nan")})
    assert gate in [entry.name for entry in parity.judge(unknown, Thresholds()) if not entry.passed]


@pytest.mark.parametrize(("value", "passes"), [(0.0, True), (0.02, True), (0.0201, False), (np.nan, False)])
def test_the_relative_gate_fails_beyond_its_limit_and_not_before(value: float, passes: bool) -> None:
    measured = FINE.model_copy(update={"max_relative_logit_difference": value})
    failed = [entry.name for entry in parity.judge(measured, RELATIVE) if not entry.passed]
    assert failed == ([] if passes else ["relative_logit_difference"])


def test_gates_that_are_not_met_can_be_raised() -> None:
    gates = parity.judge(FINE.model_copy(update={"accuracy": 0.5, "mean_box_iou": 0.2}), Thresholds())
    with pytest.raises(GateError, match=r"does not meet box_iou 0\.2, not >= 0\.99; accuracy_drop 0\.4"):
        check_gates(gates, subject="tiny")
    check_gates(parity.judge(FINE, Thresholds()), subject="tiny")


def test_a_better_accuracy_than_the_reference_passes() -> None:
    assert all(gate.passed for gate in parity.judge(FINE.model_copy(update={"accuracy": 1.0}), Thresholds()))


def test_a_control_is_not_caught_by_the_ids_themselves() -> None:
    only_ids = FINE.model_copy(update={"position_ids_equal": 0.0})
    assert not check_control("x", only_ids, Thresholds()).caught
    also_logits = only_ids.model_copy(update={"max_logit_difference": 1.0})
    assert check_control("x", also_logits, Thresholds()).by == ("logit_difference",)


# Controls on a real bundle


@pytest.fixture(scope="module")
def tiny_runs(tiny_bundle: Callable[..., Bundle], tiny_reference: Callable[..., Any]) -> Any:
    from gap_export.boxes import scenes

    bundle = tiny_bundle()
    questions = list(scenes.cases(4))
    grounder, session = Grounder(bundle), open_session(bundle, "onnxruntime", threads=1)
    reference = runner.run_cases(
        grounder, tiny_reference(bundle.manifest.pruning), questions, batch=3, keep_logits=True
    )
    return bundle, questions, grounder, session, reference


@pytest.mark.parametrize("name", controls())
def test_every_control_is_caught_by_what_the_model_computes(name: str, tiny_runs: Any) -> None:
    bundle, questions, grounder, session, reference = tiny_runs
    adjust = controls()[name]
    wrong = runner.run_cases(grounder, session, questions, batch=3, adjust=adjust, keep_logits=True)
    measured = parity.measure(wrong, reference, questions, bundle.manifest)
    control = check_control(name, measured, Thresholds())
    assert control.caught
    assert "logit_difference" in control.by
    assert measured.position_ids_equal == 0.0
    assert applies(adjust, reference[0])


@pytest.mark.parametrize("name", controls())
def test_every_control_is_caught_in_half_precision(
    name: str, tiny_bundle: Callable[..., Bundle], tiny_runs: Any
) -> None:
    """By what half precisions are judged by; what is right passes those."""
    _, questions, _, _, reference = tiny_runs
    bundle = tiny_bundle(precision="fp16")
    grounder, session = Grounder(bundle), open_session(bundle, "onnxruntime", threads=1)
    adjust, gates = controls()[name], bundle.manifest.gates
    assert gates.max_logit_difference is None
    assert gates.max_relative_logit_difference == PRECISIONS["fp16"].gates.max_relative_logit_difference
    wrong, right = (
        parity.measure(
            runner.run_cases(grounder, session, questions, batch=3, keep_logits=True, **changes),
            reference,
            questions,
            bundle.manifest,
        )
        for changes in ({"adjust": adjust}, {})
    )
    assert "relative_logit_difference" in check_control(name, wrong, gates).by
    limit = gates.max_relative_logit_difference
    assert limit is not None
    assert right.max_relative_logit_difference < limit < wrong.max_relative_logit_difference


def test_the_right_placement_is_not_caught(tiny_runs: Any) -> None:
    bundle, questions, grounder, session, reference = tiny_runs
    told = Recorded()
    right = runner.run_cases(
        grounder,
        session,
        questions,
        batch=3,
        progress=told,
        adjust=lambda placement, before, kept: placement,
        keep_logits=True,
    )
    measured = parity.measure(right, reference, questions, bundle.manifest)
    assert not check_control("none", measured, Thresholds()).caught
    assert measured.position_ids_equal == 1.0
    assert told.counts == [3, 1]


def test_controls_apply_where_they_change_something() -> None:
    run = grounded()
    assert all(applies(adjust, run) for adjust in controls().values())
    assert not applies(lambda placement, before, kept: placement, run)
    shifted = place(
        KEPT_BK, text_before=BEFORE, text_after=AFTER, visual_tokens=VISUAL, policy=PositionPolicy.SHIFTED
    )
    idle = {name for name, adjust in controls().items() if not applies(adjust, grounded(placement=shifted))}
    assert idle == {"ids shifted", "decoding continues at kept length"}
