"""Position ids and cache slots against the table of the module's docstring, token by token, in plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.evaluation.controls import (
    continuing_at_kept_length,
    renumbered,
    with_image_ids_reversed,
    with_last_stage_off_by_one,
    with_one_slot_counter,
    with_two_ids_swapped,
    with_write_index_off_by_one,
)
from gap_export.positions import (
    Ids,
    Placement,
    PositionPolicy,
    advance,
    kept_position_ids,
    place,
    placement_from_splice,
    prompt_position_ids,
)
from tests.unpruned import gather_ids

GAP, SHIFTED, PERMUTED = PositionPolicy.GAP, PositionPolicy.SHIFTED, PositionPolicy.PERMUTED


@dataclass(frozen=True)
class Prompt:
    """A prompt before pruning, and what survives, in the order in which it enters the decoder."""

    before: int
    after: int
    visual: int
    kept: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.before + len(self.kept) + self.after


@st.composite
def prompts(draw: st.DrawFn, *, visual: int | None = None, kept: int | None = None) -> Prompt:
    visual = visual or draw(st.integers(1, 40))
    kept = kept or draw(st.integers(1, visual))
    order = draw(st.permutations(range(visual)))
    return Prompt(draw(st.integers(0, 12)), draw(st.integers(0, 12)), visual, tuple(order[:kept]))


@st.composite
def batches(draw: st.DrawFn) -> list[Prompt]:
    visual = draw(st.integers(1, 30))
    kept = draw(st.integers(1, visual))
    return draw(st.lists(prompts(visual=visual, kept=kept), min_size=1, max_size=4))


def ids_by_walking(prompt: Prompt, policy: PositionPolicy) -> tuple[list[int], int]:
    """Number the unpruned prompt, cross out what was pruned: the ids left, and the id of the first generated token.

    The baselines number what is left afresh.
    """
    unpruned = [("text", j) for j in range(prompt.before)]
    unpruned += [("visual", i) for i in range(prompt.visual)]
    unpruned += [("text", prompt.before + j) for j in range(prompt.after)]
    if policy is not GAP:
        return list(range(prompt.length)), prompt.length
    numbered = {token: position for position, token in enumerate(unpruned)}
    survivors: list[tuple[str, int]] = [("text", j) for j in range(prompt.before)]
    survivors += [("visual", i) for i in prompt.kept]
    survivors += [("text", prompt.before + j) for j in range(prompt.after)]
    return [numbered[token] for token in survivors], len(unpruned)


def placed(batch: list[Prompt], policy: PositionPolicy) -> Placement:
    return place(
        np.array([prompt.kept for prompt in batch], np.int64),
        text_before=np.array([prompt.before for prompt in batch], np.int64),
        text_after=np.array([prompt.after for prompt in batch], np.int64),
        visual_tokens=batch[0].visual,
        policy=policy,
    )


@pytest.mark.parametrize("policy", PositionPolicy)
@given(prompt=prompts())
def test_ids_of_one_prompt(policy: PositionPolicy, prompt: Prompt) -> None:
    ids, _ = prompt_position_ids(
        [np.array(prompt.kept, np.int64)],
        text=(prompt.before, prompt.after),
        visual_tokens=[prompt.visual],
        policy=policy,
    )
    assert ids.dtype == np.int64
    assert ids.tolist() == ids_by_walking(prompt, policy)[0]


@pytest.mark.parametrize("policy", PositionPolicy)
@given(batch=batches())
def test_placement_of_a_ragged_batch(policy: PositionPolicy, batch: list[Prompt]) -> None:
    placement = placed(batch, policy)
    assert placement.position_ids.shape == (len(batch), max(prompt.length for prompt in batch))
    assert placement.write_index.tolist() == [0] * len(batch)
    for row, prompt in enumerate(batch):
        ids, next_position = ids_by_walking(prompt, policy)
        assert placement.position_ids[row, : prompt.length].tolist() == ids
        assert placement.last_index[row] == prompt.length - 1
        assert placement.next_slot[row] == prompt.length
        assert placement.next_position[row] == next_position


def test_the_example_of_the_table() -> None:
    placement = placed([Prompt(before=2, after=2, visual=6, kept=(1, 4))], GAP)
    assert placement.position_ids.tolist() == [[0, 1, 3, 6, 8, 9]]
    assert (placement.next_position.tolist(), placement.next_slot.tolist()) == ([10], [6])


@given(batch=batches())
def test_ids_increase_strictly_under_gap_in_raster_order(batch: list[Prompt]) -> None:
    ordered = [Prompt(p.before, p.after, p.visual, tuple(sorted(p.kept))) for p in batch]
    placement = placed(ordered, GAP)
    assert (np.diff(placement.position_ids, axis=1) > 0).all()
    last = placement.position_ids[np.arange(len(batch)), placement.last_index]
    assert (last < placement.next_position).all()
    assert (placement.next_slot <= placement.next_position).all()


@given(prompt=prompts())
def test_all_policies_agree_when_nothing_is_pruned(prompt: Prompt) -> None:
    whole = Prompt(prompt.before, prompt.after, prompt.visual, tuple(range(prompt.visual)))
    gap, shifted, permuted = (placed([whole], policy) for policy in (GAP, SHIFTED, PERMUTED))
    for other in (shifted, permuted):
        assert np.array_equal(gap.position_ids, other.position_ids)
        assert np.array_equal(gap.next_position, other.next_position)
        assert np.array_equal(gap.next_slot, other.next_slot)


def test_slots_do_not_depend_on_the_policy() -> None:
    batch = [Prompt(3, 4, 20, (0, 7, 19)), Prompt(1, 2, 20, (5, 6, 8))]
    slots = {tuple(placed(batch, policy).next_slot.tolist()) for policy in PositionPolicy}
    assert slots == {(10, 6)}


@given(batch=batches(), policy=st.sampled_from(PositionPolicy), steps=st.integers(1, 6))
def test_advancing_moves_both_counters_by_one(
    batch: list[Prompt], policy: PositionPolicy, steps: int
) -> None:
    prompt_placement = placed(batch, policy)
    turn = prompt_placement
    for t in range(steps):
        turn = advance(turn)
        assert turn.position_ids.tolist() == [[p + t] for p in prompt_placement.next_position]
        assert turn.write_index.tolist() == [s + t for s in prompt_placement.next_slot]
        assert turn.last_index.tolist() == [0] * len(batch)
    assert (turn.next_position - prompt_placement.next_position == steps).all()
    assert (turn.next_slot - prompt_placement.next_slot == steps).all()


@pytest.mark.parametrize("kept", [(0, 0), (3, 1, 3), (-1, 2), (2, 6)])
def test_repeated_or_foreign_indices_are_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"distinct and within 0\.\.5"):
        prompt_position_ids([np.array(kept)], text=(1, 1), visual_tokens=[6], policy=PositionPolicy.GAP)


def test_which_policies_sort() -> None:
    assert [policy for policy in PositionPolicy if policy.keeps_raster_order] == [GAP, SHIFTED]


def test_kept_ids_follow_the_order_given() -> None:
    kept = np.array([7, 2, 5])
    assert kept_position_ids(kept, 10, GAP).tolist() == [17, 12, 15]
    assert kept_position_ids(kept, 10, SHIFTED).tolist() == [10, 11, 12]


# M-RoPE


@given(data=st.data())
def test_mrope_gathers_three_rows_and_goes_on_from_the_unpruned_maximum(data: st.DataObject) -> None:
    before, after = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    # Qwen2-VL: text counts in all rows alike; an image has one time, its rows and columns; text goes on above the largest.
    ids = [[j] * 3 for j in range(before)]
    ids += [[before, before + r, before + c] for r in range(rows) for c in range(columns)]
    ids += [[before + max(rows, columns) + j] * 3 for j in range(after)]
    visual = range(before, before + rows * columns)
    kept = sorted(data.draw(st.sets(st.sampled_from(list(visual)), min_size=1)))
    surviving = [*range(before), *kept, *range(before + rows * columns, len(ids))]

    gathered, next_position = gather_ids(np.array(ids, np.int64).T, np.array(surviving))

    assert gathered.T.tolist() == [ids[index] for index in surviving]
    assert next_position == before + max(rows, columns) + after


def test_mrope_maximum_may_belong_to_a_pruned_token() -> None:
    ids = np.array([[0, 1, 1, 1], [0, 1, 1, 2], [0, 1, 2, 5]])
    gathered, next_position = gather_ids(ids, np.array([0, 1]))
    assert gathered.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert next_position == 6


# Negative controls: each changes what it says, and nothing else.


@pytest.fixture
def right() -> Placement:
    return placed([Prompt(2, 3, 9, (1, 4, 8)), Prompt(1, 2, 9, (0, 3, 5))], GAP)


BEFORE: Ids = np.array([2, 1])
KEPT: Ids = np.array([3, 3])


def changed_fields(wrong: Placement, right: Placement) -> set[str]:
    return {
        name
        for name in Placement.__dataclass_fields__
        if not np.array_equal(getattr(wrong, name), getattr(right, name))
    }


def test_renumbering_counts_slots_and_decodes_on_from_there(right: Placement) -> None:
    wrong = renumbered(right)
    assert changed_fields(wrong, right) == {"position_ids", "next_position"}
    assert wrong.position_ids.tolist() == [list(range(8))] * 2
    assert wrong.next_position.tolist() == right.next_slot.tolist() == [8, 6]


def test_reversing_touches_the_image_alone(right: Placement) -> None:
    wrong = with_image_ids_reversed(right, BEFORE, KEPT)
    assert changed_fields(wrong, right) == {"position_ids"}
    assert wrong.position_ids[0].tolist() == [0, 1, 10, 6, 3, 11, 12, 13]
    assert wrong.position_ids[1, :6].tolist() == [0, 6, 4, 1, 10, 11]


def test_swapping_touches_two_ids_alone(right: Placement) -> None:
    wrong = with_two_ids_swapped(right, BEFORE, KEPT)
    assert changed_fields(wrong, right) == {"position_ids"}
    assert (wrong.position_ids != right.position_ids).sum(axis=1).tolist() == [2, 2]
    assert wrong.position_ids[0].tolist() == [0, 1, 10, 6, 3, 11, 12, 13]
    assert wrong.position_ids[1, 1] == right.position_ids[1, 3]


def test_swapping_differs_from_reversing_from_four_tokens_on() -> None:
    right = placed([Prompt(1, 1, 9, (1, 2, 4, 7))], GAP)
    swapped, turned = (
        f(right, np.array([1]), np.array([4])) for f in (with_two_ids_swapped, with_image_ids_reversed)
    )
    assert swapped.position_ids.tolist() == [[0, 8, 3, 5, 2, 10]]
    assert turned.position_ids.tolist() == [[0, 8, 5, 3, 2, 10]]


def test_write_index_off_by_one_leaves_a_hole(right: Placement) -> None:
    wrong = with_write_index_off_by_one(right)
    assert changed_fields(wrong, right) == {"next_slot"}
    assert (wrong.next_slot - right.next_slot).tolist() == [1, 1]
    assert advance(wrong).position_ids.tolist() == advance(right).position_ids.tolist()


def test_continuing_at_kept_length_spoils_decoding_alone(right: Placement) -> None:
    wrong = continuing_at_kept_length(right)
    assert changed_fields(wrong, right) == {"next_position"}
    assert wrong.next_position.tolist() == right.next_slot.tolist()


def test_controls_leave_the_right_placement_as_it_was(right: Placement) -> None:
    ids = right.position_ids.copy()
    renumbered(right)
    with_image_ids_reversed(right, BEFORE, KEPT)
    with_two_ids_swapped(right, BEFORE, KEPT)
    assert np.array_equal(right.position_ids, ids)


# Stages of a decoder that drops tokens


def staged(stages: tuple[int, ...]) -> Placement:
    """Two prompts with six visual tokens each, of which later stages have fewer."""
    return place(
        np.tile(np.arange(6), (2, 1)),
        text_before=np.array([2, 0]),
        text_after=np.array([3, 1]),
        visual_tokens=6,
        policy=GAP,
        stage_counts=np.tile(np.array(stages, np.int64), (2, 1, 1)),
    )


@given(left=st.lists(st.integers(1, 6), max_size=4), steps=st.integers(1, 5))
def test_stages_are_counted_by_walking_their_own_caches(left: list[int], steps: int) -> None:
    """One list of tokens per stage and row, appended to: a token's slot is where it lands; its id is the same in all of them."""
    turn = staged(tuple(left))
    caches = [[["token"] * (text + count) for text in (5, 1)] for count in (6, *left)]
    assert [slot.tolist() for slot in turn.stage_write_index] == [[0, 0]] * len(left)
    for step in range(steps):
        turn = advance(turn)
        assert turn.position_ids.tolist() == [[11 + step], [7 + step]]
        for cache, slots in zip(caches, (turn.write_index, *turn.stage_write_index), strict=True):
            assert slots.tolist() == [len(row) for row in cache]
            for row in cache:
                row.append("token")


def test_a_graph_is_given_what_it_names() -> None:
    prompt = staged((4, 1))
    common = ["position_ids", "write_index", "last_index", "image_slots"]
    told = ["stage_counts", "stage_slots.1", "stage_slots.2"]
    inputs = prompt.decoder_inputs()
    assert list(inputs) == [*common, *told, "write_index.1", "write_index.2"]
    assert [int(inputs[name]) for name in told[1:]] == [9, 6], "the longest row: 5 tokens of text"
    turn = advance(prompt)
    inputs = turn.decoder_inputs()
    assert list(inputs) == [*common, "write_index.1", "write_index.2"]
    assert (inputs["write_index.1"].tolist(), inputs["write_index.2"].tolist()) == ([9, 5], [6, 2])
    plain = Placement(*(np.zeros(1, np.int64) for _ in range(5)))
    assert list(plain.decoder_inputs()) == ["position_ids", "write_index", "last_index"]


def test_outputs_of_a_splice_are_read_by_number() -> None:
    """Ten stages and more: `next_slot.10` comes after `next_slot.9`, whatever order the graph gives them in."""
    later = {f"next_slot.{stage}": np.array([100 - stage]) for stage in (10, 2, 1, *range(3, 10))}
    outputs = {
        "position_ids": np.zeros((1, 3)),
        "next_position": np.array([9]),
        "next_slot": np.array([100]),
        **later,
    }
    placement = placement_from_splice(outputs)
    assert [int(slot[0]) for slot in placement.slots_of_stages] == list(range(100, 89, -1))
    assert placement.last_index.tolist() == [99]
    assert placement.image_slots is None
    assert placement.stage_counts is None


def test_controls_of_stages() -> None:
    right = staged((4, 1))
    off = with_last_stage_off_by_one(right)
    assert [slot.tolist() for slot in off.slots_of_stages] == [[11, 7], [9, 5], [7, 3]]
    one = with_one_slot_counter(right)
    assert [slot.tolist() for slot in one.slots_of_stages] == [[6, 2]] * 3
    assert continuing_at_kept_length(right).next_position.tolist() == [6, 2]
    for wrong in (off, one):
        assert np.array_equal(wrong.position_ids, right.position_ids)
        assert np.array_equal(wrong.next_position, right.next_position)
    whole = staged(())
    assert with_last_stage_off_by_one(whole) is whole
    assert with_one_slot_counter(whole).slots_of_stages[0].tolist() == whole.next_slot.tolist()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=2, max_size=2),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_stages_of_two_images_are_counted_image_by_image(
    rows: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    """Rows of text and of images with tokens that some stages drop, walked one by one: what remains is as long as it says."""
    entered = np.array([[tokens for tokens, _ in images] for _, images in rows])
    counts = np.stack([np.maximum(1, entered - drop) for drop in (1, 3)], axis=-1)
    kept = np.full((len(rows), int(entered.sum(axis=1).max())), -1)
    for row, (first, second) in enumerate(entered):
        kept[row, : first + second] = [*range(first), *range(second)]
    placement = place(
        kept,
        text_before=np.array([before for before, _ in rows]),
        between=np.array([[images[0][1]] for _, images in rows]),
        text_after=np.array([images[1][1] for _, images in rows]),
        visual_tokens=entered,
        kept_counts=entered,
        policy=GAP,
        stage_counts=counts,
    )
    for row, (before, images) in enumerate(rows):
        text = before + sum(words for _, words in images)
        lengths = [text + int(counts[row, :, stage].sum()) for stage in range(2)]
        assert placement.stage_lengths[row].tolist() == lengths
        assert [int(slot[row]) for slot in placement.stage_next_slot] == lengths
