"""Prompts that share their beginning: answers are those of whole prompts, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle.folder import Bundle
from gap_export.inputs.batch import of_one_size
from gap_export.positions import PAD, PositionPolicy, extended, place
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import generate
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.shared_prefix import common_length, continue_answers, prefill_shared

IMAGE, NEW = 4, 5
BEGINNING = [1, 5, IMAGE, 6, 7]
RESTS = [[8, 9], [10], [11, 12, 13, 14], [8, 20]]


def padded(rows: list[list[int]]) -> Any:
    ids = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "torch"])
def session(
    request: pytest.FixtureRequest, tiny_bundle: Callable[..., Bundle], tiny_reference: Callable[..., Any]
) -> Any:
    bundle = tiny_bundle()
    if request.param == "torch":
        return tiny_reference(bundle.manifest.pruning)
    return open_session(bundle, request.param, threads=1)


def test_answers_are_those_of_whole_prompts(session: Any, pixels: Any) -> None:
    batch = of_one_size(pixels[:1], 36)
    whole = [
        generate(
            session,
            batch,
            padded([BEGINNING + rest]),
            max_new_tokens=NEW,
            eos_token_ids=(),
            keep_logits=True,
        )
        for rest in RESTS
    ]
    prefix = prefill_shared(session, batch, np.array(BEGINNING))
    # One row and several in turn: what a fork wrote must not be left in the beginning.
    for rows in ([0], [0, 1, 2, 3], [2], [3, 1]):
        shared = continue_answers(
            session, prefix, padded([RESTS[row] for row in rows]), max_new_tokens=NEW, eos_token_ids=()
        )
        assert shared.tokens == [whole[row].tokens[0] for row in rows]
        for number, row in enumerate(rows):
            np.testing.assert_allclose(
                shared.logits[0][number], whole[row].logits[0][0], atol=1e-4, err_msg=str(row)
            )
    np.testing.assert_array_equal(prefix.kept_indices, whole[0].kept_indices[0])
    assert len({tuple(each.tokens[0]) for each in whole}) > 1, "all answers equal: nothing is tested"


def test_another_image_starts_afresh(session: Any, pixels: Any) -> None:
    answers = []
    for image in (0, 1, 0):
        prefix = prefill_shared(session, of_one_size(pixels[image : image + 1], 36), np.array(BEGINNING))
        shared = continue_answers(session, prefix, padded(RESTS[:2]), max_new_tokens=NEW, eos_token_ids=())
        answers.append(shared.logits[0].copy())
    np.testing.assert_array_equal(answers[0], answers[2])
    assert np.abs(answers[0] - answers[1]).max() > 1e-3


def test_a_rest_in_the_wrong_place_shows(session: Any, pixels: Any) -> None:
    prefix = prefill_shared(session, of_one_size(pixels[:1], 36), np.array(BEGINNING))
    right = continue_answers(session, prefix, padded(RESTS[:2]), max_new_tokens=1, eos_token_ids=()).logits[0]
    moved = replace(prefix.placement, next_position=prefix.placement.next_slot)
    wrong = continue_answers(
        session, replace(prefix, placement=moved), padded(RESTS[:2]), max_new_tokens=1, eos_token_ids=()
    ).logits[0]
    assert np.abs(right - wrong).max() > 1e-3


@given(
    beginning=st.lists(st.integers(5, 9), max_size=4),
    rests=st.lists(st.lists(st.integers(5, 9), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_common_length(beginning: list[int], rests: list[list[int]]) -> None:
    rows = [[IMAGE, *beginning, *rest] for rest in rests]
    length = common_length(padded(rows), IMAGE)
    assert 0 <= length < min(map(len, rows))
    assert all(row[:length] == rows[0][:length] for row in rows)
    longer = {tuple(row[: length + 1]) for row in rows}
    assert len(longer) > 1 or length + 1 == min(map(len, rows))


def test_an_image_after_the_first_difference_is_not_shared() -> None:
    assert common_length(padded([[1, 5, IMAGE, 7], [1, 6, IMAGE, 7]]), IMAGE) == 0
    assert common_length(padded([[1, IMAGE, 5], [1, IMAGE, 6, 7]]), IMAGE) == 2


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_placement_goes_on_from_the_prompt(lengths: list[int], mrope: bool) -> None:
    """As if each row had been placed whole."""
    kept, grids = np.array([[1, 4]]), np.array([[2, 3]]) if mrope else None

    def placed(after: int) -> Any:
        counts = {"text_before": np.array([2]), "text_after": np.array([after])}
        return place(kept, visual_tokens=6, policy=PositionPolicy.GAP, grids=grids, **counts)

    rest = extended(placed(3), np.array(lengths), max(lengths))
    for row, length in enumerate(lengths):
        whole = placed(3 + length)
        mine = rest.position_ids[..., row, :length]
        np.testing.assert_array_equal(mine, whole.position_ids[..., 0, -length:])
        assert rest.write_index[row] + rest.last_index[row] == whole.last_index[0]
        assert rest.next_position[row] == whole.next_position[0]
        assert rest.next_slot[row] == whole.next_slot[0]


def test_what_can_be_shared(tiny_bundle: Callable[..., Bundle]) -> None:
    assert Grounder(tiny_bundle()).unshared_because is None
    by_text = Grounder(tiny_bundle(pruner="text_similarity"))
    assert by_text.unshared_because == "text_similarity chooses tokens by the expression"


@pytest.mark.parametrize(
    ("prompt", "images", "shares"),
    [
        ("USER : <image> where is {expression} ? ASSISTANT :", 1, True),
        ("{expression} <image>", 1, False),
        ("USER : where is {expression} in <image> ? ASSISTANT :", 1, False),
        ("<image> {expression} <image>", 2, False),
        ("<image> <image> {expression}", 2, True),
    ],
)
def test_an_expression_before_an_image_is_not_shared(
    prompt: str, images: int, shares: bool, tiny_bundle: Callable[..., Bundle]
) -> None:
    bundle = tiny_bundle()
    asked = bundle.manifest.prompt.model_copy(update={"grounding": prompt, "images": images})
    manifest = bundle.manifest.model_copy(update={"prompt": asked})
    why = Grounder(Bundle(bundle.folder, manifest)).unshared_because
    assert why == (None if shares else "the prompt has the expression before the image")
