"""Where tokens of a conversation stand, read turn by turn and cut off anywhere, against the whole numbered at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.errors import SessionError
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.positions import Ids, Placement, PositionPolicy, place, prompt_position_ids
from gap_export.runtime.conversation.context import Context, Mark, moved, text_placement

GAP, SHIFTED, PERMUTED = PositionPolicy.GAP, PositionPolicy.SHIFTED, PositionPolicy.PERMUTED
some, many = settings(max_examples=25), settings(max_examples=4000)


@dataclass(frozen=True)
class Seen:
    """An image: what was kept of it, in the order in which it enters the decoder, and its grid."""

    kept: tuple[int, ...]
    rows: int
    columns: int

    @property
    def visual(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Talk:
    """Token ids, `IMAGE` among them, and the images in their order."""

    ids: tuple[int, ...]
    images: tuple[Seen, ...]
    policy: PositionPolicy
    mrope: bool

    def beginning(self, length: int) -> Talk:
        """Its first tokens."""
        ids = self.ids[:length]
        return replace(self, ids=ids, images=self.images[: ids.count(IMAGE)])

    def numbered(self) -> tuple[Ids, int, int]:
        """Position ids [R, S] of the whole, counted at once; the next one; how many slots are taken."""
        texts = [0]
        for id_ in self.ids:
            texts[-1] += id_ != IMAGE
            texts += [0] * (id_ == IMAGE)
        ids, following = prompt_position_ids(
            [np.array(image.kept, np.int64) for image in self.images],
            text=texts,
            visual_tokens=[image.visual for image in self.images],
            policy=self.policy,
            grids=[np.array([image.rows, image.columns]) for image in self.images] if self.mrope else None,
        )
        taken = sum(texts) + sum(len(image.kept) for image in self.images)
        return np.atleast_2d(ids), following, taken

    def extent(self, image: Seen) -> int:
        if self.policy is not GAP:
            return len(image.kept)
        return max(image.rows, image.columns) if self.mrope else image.visual


@st.composite
def seen_images(draw: st.DrawFn, policy: PositionPolicy) -> Seen:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    order = draw(st.permutations(range(rows * columns)))
    kept = order[: draw(st.integers(1, len(order)))]
    return Seen(tuple(kept if policy is PERMUTED else sorted(kept)), rows, columns)


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    policy = draw(st.sampled_from(PositionPolicy))
    ids = draw(st.lists(st.integers(0, 9) | st.just(IMAGE), min_size=1, max_size=14))
    images = tuple(draw(seen_images(policy)) for _ in range(ids.count(IMAGE)))
    return Talk(tuple(ids), images, policy, draw(st.booleans()))


def read(context: Context, talk: Talk, calls: Sequence[int]) -> tuple[Context, NDArray[np.int64], list[int]]:
    """Read what is not there yet in calls that end at some tokens, each with all its images.

    Returns:
        context, position ids [R, S] of what was read, and the slots.
    """
    rows, pieces, slots = 3 if talk.mrope else 1, [], list[int]()
    first = len(context.ids)
    for end in [*sorted({call for call in calls if first < call < len(talk.ids)}), len(talk.ids)]:
        ids = talk.ids[first:end]
        images = talk.images[talk.ids[:first].count(IMAGE) : talk.ids[:end].count(IMAGE)]
        at = context.end
        if images:
            placement = moved(spliced(ids, images, talk), at)
            context = context.with_images(
                ids,
                placement,
                [len(image.kept) for image in images],
                [talk.extent(image) for image in images],
            )
        else:
            placement = text_placement(at, len(ids), rows)
            context = context.with_text(ids)
        length = placement.position_ids.shape[-1]
        assert placement.position_ids.shape == ((1, length) if rows == 1 else (rows, 1, length))
        assert placement.last_index.tolist() == [length - 1]
        slots += range(int(placement.write_index[0]), int(placement.write_index[0]) + length)
        assert placement.next_slot.tolist() == [slots[-1] + 1]
        assert placement.next_position.tolist() == [context.end.position]
        pieces.append(placement.position_ids.reshape(rows, -1))
        first = end
    return context, np.concatenate(pieces, axis=1), slots


def spliced(ids: Sequence[int], images: Sequence[Seen], talk: Talk) -> Placement:
    """What a splice graph would say of one call by itself."""
    places = [place for place, id_ in enumerate(ids) if id_ == IMAGE]
    between = [after - before - 1 for before, after in pairwise(places)]
    return place(
        np.concatenate([np.array(image.kept, np.int64) for image in images])[None],
        text_before=np.array([places[0]]),
        text_after=np.array([len(ids) - places[-1] - 1]),
        between=np.array([between], np.int64).reshape(1, -1),
        visual_tokens=np.array([[image.visual for image in images]]),
        kept_counts=np.array([[len(image.kept) for image in images]]),
        policy=talk.policy,
        grids=np.array([[[image.rows, image.columns] for image in images]]) if talk.mrope else None,
    )


def check_read_in_parts(talk: Talk, calls: Sequence[int]) -> Context:
    context, ids, slots = read(Context.empty(), talk, calls)
    whole, following, taken = talk.numbered()
    assert ids.tolist() == whole.tolist()
    assert slots == list(range(taken))
    assert context.end == Mark(following, (taken,))
    assert context.ids == talk.ids
    return context


def check_cut_anywhere(talk: Talk, calls: Sequence[int], length: int) -> None:
    context = check_read_in_parts(talk, calls)
    length = min(length, len(talk.ids) - 1)
    _, following, taken = talk.beginning(length).numbered()
    cut = context.cut(length)
    assert cut.end == Mark(following, (taken,))
    again, ids, slots = read(cut, talk, calls[::2])
    whole, _, _ = talk.numbered()
    assert again == context
    assert ids.tolist() == whole[:, taken:].tolist()
    assert slots == list(range(taken, whole.shape[1]))


parts = st.lists(st.integers(1, 13), max_size=5)


@some
@given(talk=talks(), calls=parts)
def test_turns_read_one_after_the_other_stand_where_the_whole_does(talk: Talk, calls: list[int]) -> None:
    check_read_in_parts(talk, calls)


@some
@given(talk=talks(), calls=parts, length=st.integers(0, 13))
def test_a_conversation_may_be_cut_between_any_two_tokens(talk: Talk, calls: list[int], length: int) -> None:
    check_cut_anywhere(talk, calls, length)


@pytest.mark.long
@many
@given(talk=talks(), calls=parts, length=st.integers(0, 13))
def test_so_may_many(talk: Talk, calls: list[int], length: int) -> None:
    check_cut_anywhere(talk, calls, length)


@given(ids=st.lists(st.integers(-2, 2), max_size=6), other=st.lists(st.integers(-2, 2), max_size=6))
@some
def test_what_two_have_in_common_is_counted_from_the_first_token(ids: list[int], other: list[int]) -> None:
    context = Context.empty().with_text(ids)
    common = context.common(other)
    assert ids[:common] == other[:common]
    assert common == min(len(ids), len(other)) or ids[common] != other[common]


@some
@given(
    before=st.integers(0, 4),
    after=st.integers(1, 5),
    left=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    more=st.integers(0, 4),
    length=st.integers(1, 12),
)
def test_every_stage_has_slots_of_its_own(
    before: int, after: int, left: list[int], more: int, length: int
) -> None:
    """Caches of all stages as lists that are appended to; the image is one token among the ids."""
    placement = place(
        np.arange(6)[None],
        text_before=np.array([before]),
        text_after=np.array([after]),
        visual_tokens=9,
        policy=GAP,
        stage_counts=np.array(left, np.int64).reshape(1, 1, -1),
    )
    ids = [1] * before + [IMAGE] + [2] * after
    context = Context.empty(1 + len(left)).with_images(ids, placement, [6], [9]).with_text([3] * more)
    caches: list[list[int]] = [[] for _ in (6, *left)]
    marks = [Mark(0, (0,) * len(caches))]
    position = 0
    for number, id_ in enumerate((*ids, *[3] * more)):
        position += 9 if id_ == IMAGE else 1
        for cache, count in zip(caches, (6, *left), strict=True):
            cache += [number] * (count if id_ == IMAGE else 1)
        marks.append(Mark(position, tuple(map(len, caches))))
    assert context.marks == tuple(marks)
    cut = context.cut(length)
    assert cut.marks == tuple(marks[: length + 1])
    following = text_placement(cut.end, 1, 1)
    written = (following.write_index, *following.stage_write_index)
    assert [int(slot[0]) for slot in written] == list(cut.end.slots)
    assert [int(slot[0]) for slot in following.slots_of_stages] == [slot + 1 for slot in cut.end.slots]


def test_text_has_one_id_in_all_rows() -> None:
    placement = text_placement(Mark(7, (4, 2)), 3, 3)
    assert placement.position_ids.tolist() == [[[7, 8, 9]]] * 3
    assert text_placement(Mark(7, (4,)), 3, 1).position_ids.tolist() == [[7, 8, 9]]
    assert (placement.next_position.tolist(), placement.next_slot.tolist()) == ([10], [7])
    assert [slot.tolist() for slot in placement.stage_next_slot] == [[5]]


def test_where_images_lie_moves_with_the_prompt() -> None:
    alone = place(
        np.array([[0, 2]]), text_before=np.array([1]), text_after=np.array([2]), visual_tokens=4, policy=GAP
    )
    assert alone.image_slots is not None
    placement = moved(alone, Mark(10, (6,)))
    assert placement.image_slots is not None
    assert placement.image_slots.tolist() == (alone.image_slots + 6).tolist()
    assert placement.position_ids.tolist() == [[10, 11, 13, 15, 16]]


@pytest.mark.parametrize(("kept", "extent"), [(2, 4), (3, 5)])
def test_a_runtime_that_places_otherwise_is_found_out(kept: int, extent: int) -> None:
    placement = place(
        np.array([[0, 1, 2]]),
        text_before=np.array([1]),
        text_after=np.array([1]),
        visual_tokens=4,
        policy=GAP,
    )
    assert Context.empty().with_images([1, IMAGE, 2], placement, [3], [4]).end == Mark(6, (5,))
    with pytest.raises(SessionError, match="ends at position 6 and slot 5"):
        Context.empty().with_images([1, IMAGE, 2], placement, [kept], [extent])
