"""When the strategies inside the decoder drop tokens, and how many."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.prune.in_decoder.schedules import Cut, cuts_for

INSIDE = prune.names(in_decoder=True)


def cuts(
    name: str, keep: float = 0.25, *, visual: int = 576, layers: int = 32, at: tuple[int, ...] = ()
) -> tuple[Cut, ...]:
    return cuts_for(name, keep, visual_tokens=visual, layers=layers, prune_layers=at)


# Schedules


def test_the_table_knows_three() -> None:
    assert INSIDE == ("fastv", "pyramiddrop", "sparsevlm")
    assert cuts("cls_attention") == ()


def test_published_schedules() -> None:
    assert cuts("fastv", 0.5) == (Cut(2, 288),)
    assert cuts("pyramiddrop", 0.125) == (Cut(8, 288), Cut(16, 144), Cut(24, 72))


PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Mean over the layers -> tokens chosen of 576 in SparseVLM's three stages, as its `score.py` lists them."""
WITH_MERGED = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}


@pytest.mark.parametrize("mean", PUBLISHED)
def test_published_schedules_of_sparsevlm(mean: int) -> None:
    found = cuts("sparsevlm", WITH_MERGED[mean][-1] / 576)
    assert tuple(cut.kept for cut in found) == WITH_MERGED[mean]
    assert tuple(cut.kept - cut.merged for cut in found) == PUBLISHED[mean]
    before = 576
    for chosen, kept in zip(PUBLISHED[mean], WITH_MERGED[mean], strict=True):
        recycled = int(0.3 * (before - chosen)) + 1
        assert kept == chosen + int(recycled / 10) + 1
        before = kept


@given(along=st.floats(0, 1), gap=st.integers(0, 4))
def test_between_published_schedules_each_stage_lies_between_theirs(along: float, gap: int) -> None:
    ends = [(576, 576, 576), *WITH_MERGED.values(), (1, 1, 1)]
    above, below = ends[gap], ends[gap + 1]
    kept = round(above[-1] ** (1 - along) * below[-1] ** along)
    try:
        found = cuts("sparsevlm", kept / 576)
    except RecipeError:
        return  # cluster means alone
    for cut, one, other in zip(found, above, below, strict=True):
        assert min(one, other) <= cut.kept <= max(one, other)


@given(
    name=st.sampled_from(INSIDE),
    keep=st.floats(0.01, 1.0),
    visual=st.integers(4, 700),
    layers=st.integers(1, 80),
)
def test_every_schedule_is_one(name: str, keep: float, visual: int, layers: int) -> None:
    wanted = prune.row(name).load_schedule().stages
    if layers <= wanted:
        with pytest.raises(RecipeError, match=f"more than {wanted} layers, this one has {layers}"):
            cuts(name, keep, visual=visual, layers=layers)
        return
    if keep * visual < 0.5:
        with pytest.raises(RecipeError, match=f"keeps none of {visual} tokens|and no token of the image"):
            cuts(name, keep, visual=visual, layers=layers)
        return
    try:
        found = cuts(name, keep, visual=visual, layers=layers)
    except RecipeError:
        if name == "sparsevlm":  # which has cluster means to make room for
            return
        raise
    firsts = [cut.first_layer for cut in found]
    assert len(found) == wanted
    assert firsts == sorted(set(firsts))
    assert firsts[0] > 0
    assert firsts[-1] < layers
    counts = [visual, *(cut.kept for cut in found)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == prune.kept_count(keep, visual)
    for before, cut in zip(counts, found, strict=False):
        assert 0 <= cut.merged < cut.kept
        if name == "sparsevlm":
            dropped = before - (cut.kept - cut.merged)
            assert cut.merged == (int((int(0.3 * dropped) + 1) / 10) + 1 if dropped else 0)
        else:
            assert not cut.merged


def test_keeping_everything_drops_nothing() -> None:
    for name in INSIDE:
        assert {(cut.kept, cut.merged) for cut in cuts(name, 1.0)} == {(576, 0)}


def test_chosen_layers_are_taken() -> None:
    assert cuts("fastv", at=(7,)) == (Cut(7, 144),)
    assert [cut.first_layer for cut in cuts("pyramiddrop", at=(1, 2, 31))] == [1, 2, 31]


@pytest.mark.parametrize(
    ("name", "at"),
    [("fastv", (0,)), ("fastv", (32,)), ("fastv", (2, 3)), ("pyramiddrop", (8,)), ("pyramiddrop", (8, 8, 9)),
     ("sparsevlm", (9, 7, 16)), ("sparsevlm", (1, 2, 33))],
)  # fmt: skip
def test_layers_that_cannot_be_are_refused(name: str, at: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="from 1 to 31") as caught:
        cuts(name, at=at)
    assert str(prune.row(name).load_schedule().first_layers(32)[0]) in caught.value.hint


def test_layers_are_refused_for_strategies_before_the_decoder() -> None:
    with pytest.raises(RecipeError, match="drops no tokens inside the decoder") as caught:
        cuts("cls_attention", at=(2,))
    assert "fastv, pyramiddrop, sparsevlm" in caught.value.hint


def test_a_share_that_leaves_cluster_means_alone_is_refused() -> None:
    with pytest.raises(RecipeError, match="no token of the image") as caught:
        cuts("sparsevlm", 0.003)
    assert caught.value.hint == "use a larger --keep"


# Images of any size


@given(name=st.sampled_from(INSIDE), keep=st.floats(0.001, 1.0), visual=st.integers(1, 20_000))
def test_every_image_keeps_a_token_of_its_own(name: str, keep: float, visual: int) -> None:
    """Whatever the share: an image with few tokens must not fail where others do not."""
    schedule = prune.row(name).load_schedule()
    counts = (visual, *schedule.counts(keep, visual))
    assert len(counts) == 1 + schedule.stages
    for before, kept in pairwise(counts):
        assert 1 <= kept <= before
        merged = schedule.merged(before, kept)
        assert merged is not None, "cluster means alone"
        assert kept - merged >= 1
        assert merged == schedule.clusters(before - (kept - merged))


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("visual", [576, 1280, 2880])
def test_counts_are_those_of_the_schedule(name: str, keep: float, visual: int) -> None:
    """Where a share leaves enough, an image of any size keeps what one of that size would."""
    schedule = prune.row(name).load_schedule()
    found = cuts(name, keep, visual=visual)
    assert schedule.counts(keep, visual) == tuple(cut.kept for cut in found)
    assert schedule.counts(keep, visual)[-1] == prune.kept_count(keep, visual)


@given(
    name=st.sampled_from(INSIDE),
    keeps=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(sorted),
    visual=st.integers(1, 3000),
)
def test_no_keep_of_a_range_has_more_than_the_most(name: str, keeps: list[float], visual: int) -> None:
    """SparseVLM's first stage has more tokens at a smaller keep, between some of its schedules."""
    smallest, chosen, largest = keeps
    schedule = prune.row(name).load_schedule()
    most = schedule.most(smallest, largest, visual)
    assert all(kept <= bound for kept, bound in zip(schedule.counts(chosen, visual), most, strict=True))


def test_the_first_stage_of_sparsevlm_turns() -> None:
    schedule = prune.row("sparsevlm").load_schedule()
    assert schedule.counts(113 / 576, 576)[0] < schedule.counts(39 / 576, 576)[0]
    assert schedule.most(0.05, 0.2, 576)[0] == 312


def test_keeping_all_keeps_all_of_any_image() -> None:
    for name in INSIDE:
        schedule = prune.row(name).load_schedule()
        assert {schedule.counts(1.0, visual) for visual in (1, 2, 7)} == {
            (visual,) * schedule.stages for visual in (1, 2, 7)
        }


@pytest.mark.parametrize(("keep", "mean"), [(0.1962, 192), (0.0677, 128), (0.0469, 96), (0.03125, 64)])
def test_the_shares_that_the_page_names(keep: float, mean: int) -> None:
    assert tuple(cut.kept - cut.merged for cut in cuts("sparsevlm", keep)) == PUBLISHED[mean]
