"""The decode loop, driven by a session that only writes down what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.errors import InputError, SessionError
from gap_export.inputs.batch import PixelInputs, of_one_size
from gap_export.positions import Ids, Placement, PositionPolicy, place
from gap_export.runtime.generate import Generation, check_overflow, generate
from gap_export.runtime.session import Prefilled, Spliced, VisualTokens

EOS, VISUAL, VOCABULARY = 2, 20, 12
KEPT: Ids = np.array([[1, 7, 19], [0, 2, 3]])


@dataclass
class FakeSession:
    """Answers with a script of tokens; the array of logits is reused, as runtimes do.

    Attributes:
        script: per step, the token each row is to say.
        capacities: slots of every stage.
        stages: visual tokens of every later stage.
        steps: per decode call (tokens fed, position ids, slots).
        stage_slots: per decode call, the slots of every later stage.
    """

    script: Sequence[Sequence[int]]
    capacities: tuple[int, ...] = (1000,)
    policy: PositionPolicy = PositionPolicy.GAP
    stages: tuple[int, ...] = ()
    steps: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)
    stage_slots: list[list[list[int]]] = field(default_factory=list)
    prefilled: Placement | None = None
    backend: str = "fake"

    def __post_init__(self) -> None:
        self._logits = np.zeros((len(self.script[0]), VOCABULARY), np.float32)
        self._turn = 0

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        rows = len(pixels["pixel_values"])
        self.asked = (text_ids_BL, keep_count)
        return VisualTokens(embeds="visual", kept_indices=KEPT[:rows], scores=None)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        assert visual.embeds == "visual"
        before = np.array([2, 1])[: len(input_ids_BT)]
        after = (input_ids_BT >= 0).sum(axis=1) - 1 - before
        placement = place(
            visual.kept_indices,
            text_before=before,
            text_after=after,
            visual_tokens=VISUAL,
            policy=self.policy,
            stage_counts=np.tile(np.array(self.stages, np.int64), (len(before), 1, 1))
            if self.stages
            else None,
        )
        return Spliced(embeds="spliced", placement=placement)

    def prefill(self, embeds: Any, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        assert embeds == "spliced"
        self.prefilled = placement
        return Prefilled(self._say(), tuple(KEPT[:, :left] for left in self.stages))

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        assert placement.position_ids.shape == (len(token_ids_B), 1)
        self.steps.append(
            (token_ids_B.tolist(), placement.position_ids[:, 0].tolist(), placement.write_index.tolist())
        )
        self.stage_slots.append([slot.tolist() for slot in placement.stage_write_index])
        return self._say()

    def _say(self) -> NDArray[np.float32]:
        self._logits[:] = -1
        for row, token in enumerate(self.script[self._turn]):
            self._logits[row, token] = 10 + self._turn
        self._turn += 1
        return self._logits


IDS: Ids = np.array([[5, 5, 9, 5, 5, 5], [5, 9, 5, -1, -1, -1]])
"""T_pre 2 and 1, T_post 3 and 1."""


def answer(session: FakeSession, **options: Any) -> Generation:
    rows = len(session.script[0])
    options = {"max_new_tokens": 10, "eos_token_ids": (EOS,), **options}
    return generate(
        session, of_one_size(np.zeros((rows, 3, 2, 2), np.float32), VISUAL), IDS[:rows], **options
    )


def test_ids_and_slots_are_two_counters() -> None:
    session = FakeSession([[7], [8], [9], [EOS]])
    assert answer(session).tokens == [[7, 8, 9]]
    # T_pre + N + T_post + t against T_pre + K + T_post + t
    assert session.steps == [([7], [25], [8]), ([8], [26], [9]), ([9], [27], [10])]


def test_rows_of_a_ragged_batch_count_for_themselves() -> None:
    session = FakeSession([[7, 6], [8, 5], [EOS, EOS]])
    assert answer(session).tokens == [[7, 8], [6, 5]]
    assert session.steps == [([7, 6], [25, 22], [8, 5]), ([8, 5], [26, 23], [9, 6])]


def test_shifted_ids_go_on_at_the_kept_length() -> None:
    session = FakeSession([[7], [8], [EOS]], policy=PositionPolicy.SHIFTED)
    answer(session)
    assert [(ids, slots) for _, ids, slots in session.steps] == [([8], [8]), ([9], [9])]


# The end of an answer


def test_the_end_token_is_not_part_of_the_answer() -> None:
    assert answer(FakeSession([[EOS]])).tokens == [[]]
    assert answer(FakeSession([[7], [EOS], [8]])).tokens == [[7]]


def test_any_of_several_end_tokens_ends() -> None:
    assert answer(FakeSession([[7], [4], [8]]), eos_token_ids=(EOS, 4)).tokens == [[7]]


def test_a_row_that_ended_says_nothing_more() -> None:
    session = FakeSession([[EOS, 7], [9, 8], [9, EOS]])
    assert answer(session).tokens == [[], [7, 8]]
    assert len(session.steps) == 2


def test_no_step_after_all_rows_ended() -> None:
    session = FakeSession([[EOS, EOS], [9, 9]])
    answer(session)
    assert session.steps == []


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_answers_are_cut_at_their_longest(longest: int) -> None:
    session = FakeSession([[7]] * 5)
    assert answer(session, max_new_tokens=longest).tokens == [[7] * longest]
    assert len(session.steps) == longest - 1, "the last token is not fed back"


@given(data=st.data())
def test_tokens_are_the_script_up_to_the_end(data: st.DataObject) -> None:
    longest = data.draw(st.integers(1, 6))
    token = st.integers(2, VOCABULARY - 1)
    script = data.draw(st.lists(st.lists(token, min_size=2, max_size=2), min_size=longest, max_size=longest))
    generation = answer(FakeSession(script), max_new_tokens=longest)
    for row in range(2):
        said = [turn[row] for turn in script]
        expected = said[: said.index(EOS)] if EOS in said else said
        assert generation.tokens[row] == expected


# Capacity


def test_the_cache_must_hold_prompt_and_answer() -> None:
    """Row 0 has 2 + 3 + 3 slots of prompt; of five new tokens four are fed back."""
    fits = FakeSession([[7, 7]] * 5, capacities=(12,))
    assert answer(fits, max_new_tokens=5).tokens == [[7] * 5] * 2
    assert max(slot for _, _, slots in fits.steps for slot in slots) == 11
    too_small = FakeSession([[7, 7]] * 5, capacities=(11,))
    with pytest.raises(InputError, match="need 12 cache slots, the bundle has 11"):
        answer(too_small, max_new_tokens=5)
    assert too_small.prefilled is None, "refused before anything ran"


# Stages of a decoder that drops tokens: of three visual tokens it leaves two, then one


def test_every_stage_counts_its_own_slots() -> None:
    session = FakeSession([[7, 7], [8, 8], [9, 9], [EOS, EOS]], stages=(2, 1), capacities=(1000,) * 3)
    generation = answer(session)
    assert session.prefilled is not None
    assert [slot.tolist() for slot in session.prefilled.stage_write_index] == [[0, 0], [0, 0]]
    # T_pre + K_s + T_post + t, and one and the same position id in all of them
    assert [slots for _, _, slots in session.steps] == [[8, 5], [9, 6], [10, 7]]
    assert session.stage_slots == [[[7, 4], [6, 3]], [[8, 5], [7, 4]], [[9, 6], [8, 5]]]
    assert [ids for _, ids, _ in session.steps] == [[25, 22], [26, 23], [27, 24]]
    assert [kept.shape for kept in generation.every_kept_indices] == [(2, 3), (2, 2), (2, 1)]


@pytest.mark.parametrize(
    ("capacities", "needed"), [((11, 99, 99), 12), ((99, 10, 99), 11), ((99, 99, 9), 10)]
)
def test_the_cache_of_every_stage_must_hold_prompt_and_answer(
    capacities: tuple[int, ...], needed: int
) -> None:
    session = FakeSession([[7, 7]] * 5, stages=(2, 1), capacities=capacities)
    with pytest.raises(InputError, match=f"need {needed} cache slots, the bundle has {needed - 1}"):
        answer(session, max_new_tokens=5)
    enough = tuple(max(capacity, needed) for capacity in capacities)
    assert (
        answer(FakeSession([[7, 7]] * 5, stages=(2, 1), capacities=enough), max_new_tokens=5).tokens
        == [[7] * 5] * 2
    )


def test_the_first_stages_counter_for_all_does_not_fit() -> None:
    """A caller who takes one counter for all stages is told before anything runs."""
    session = FakeSession([[7, 7]] * 5, stages=(2, 1), capacities=(12, 11, 10))
    with pytest.raises(InputError, match="need 12 cache slots, the bundle has 11"):
        answer(
            session,
            max_new_tokens=5,
            adjust=lambda placement, visual: replace(placement, stage_next_slot=(placement.next_slot,) * 2),
        )
    assert session.prefilled is None


# Adjusted placements and logits


def test_an_adjusted_placement_is_used_and_reported() -> None:
    session = FakeSession([[7], [EOS]])
    generation = answer(
        session, adjust=lambda placement, visual: replace(placement, next_position=np.array([99]))
    )
    assert session.prefilled is generation.placement
    assert session.steps == [([7], [99], [8])]


def test_logits_of_every_step_are_copies() -> None:
    generation = answer(FakeSession([[7], [8], [EOS]]), keep_logits=True)
    assert [int(step.argmax()) for step in generation.logits] == [7, 8, EOS]
    assert [float(step.max()) for step in generation.logits] == [10, 11, 12]
    first = answer(FakeSession([[7], [8], [EOS]]))
    assert [int(step.argmax()) for step in first.logits] == [7]


def test_what_was_kept_is_reported() -> None:
    assert answer(FakeSession([[EOS, EOS]])).kept_indices.tolist() == KEPT.tolist()


@pytest.mark.parametrize("broken_at", [0, 1, 2])
def test_logits_that_are_not_numbers_are_no_answer(broken_at: int) -> None:
    class Overflowing(FakeSession):
        def _say(self) -> NDArray[np.float32]:
            logits = super()._say()
            return logits * np.float32("nan") if self._turn == broken_at + 1 else logits

    generation = answer(Overflowing([[7], [8], [9], [EOS]]))
    assert not generation.finite
    with pytest.raises(SessionError, match="not finite"):
        check_overflow(generation, "fake")


def test_finite_logits_are_accepted() -> None:
    generation = answer(FakeSession([[7], [EOS]]))
    assert generation.finite
    check_overflow(generation, "fake")


def test_an_answer_that_was_cut_off_says_so() -> None:
    cut = answer(FakeSession([[7, 7], [8, EOS], [9, 1]]), max_new_tokens=3)
    assert cut.ended == (False, True)
    assert cut.tokens == [[7, 8, 9], [7]]
