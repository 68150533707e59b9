"""Schedules of the strategies inside the decoder, and their choices as torch code against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.prune.in_decoder import reference, sparsevlm, stages
from gap_export.prune.in_decoder.stages import Cut, Prompt, attention_paid, cuts_for

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
    wanted = stages.load(name).STAGES
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
    assert str(stages.load(name).first_layers(32)[0]) in caught.value.hint


def test_layers_are_refused_for_strategies_before_the_decoder() -> None:
    with pytest.raises(RecipeError, match="drops no tokens inside the decoder") as caught:
        cuts("cls_attention", at=(2,))
    assert "fastv, pyramiddrop, sparsevlm" in caught.value.hint


def test_a_share_that_leaves_cluster_means_alone_is_refused() -> None:
    with pytest.raises(RecipeError, match="no token of the image") as caught:
        cuts("sparsevlm", 0.003)
    assert caught.value.hint == "use a larger --keep"


# Attention of a few rows


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_rows_pay_attention_as_the_whole_map_says(heads: int, key_heads: int) -> None:
    """Every head apart, keys repeated for grouped queries, in float64; slots behind a row count for nothing."""
    draw = np.random.default_rng(heads)
    query, key = draw.normal(size=(2, heads, 3, 8)), draw.normal(size=(2, key_heads, 7, 8))
    rows = np.array([[0, 3, 6], [2, 2, 5]])
    paid = attention_paid(*(torch.from_numpy(x).float() for x in (query, key)), torch.from_numpy(rows), 0.3)
    for batch in range(2):
        for place, row in enumerate(rows[batch]):
            shares = np.zeros((heads, 7))
            for head in range(heads):
                logits = key[batch, head * key_heads // heads, : row + 1] @ query[batch, head, place] * 0.3
                shares[head, : row + 1] = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(paid[batch, place].numpy(), shares.mean(axis=0), atol=1e-6)


# Scoring queries


def prompt_of(
    draw: np.random.Generator, visual: int, texts: list[tuple[int, int]], width: int = 12
) -> tuple[Prompt, NDArray[np.float64]]:
    longest = max(before + after for before, after in texts) + visual
    embeds = draw.normal(size=(len(texts), longest, width))
    starts = torch.tensor([before for before, _ in texts])
    last = torch.tensor([before + visual + after - 1 for before, after in texts])
    return Prompt(torch.from_numpy(embeds).float(), starts, last, visual), embeds


@pytest.mark.parametrize("name", INSIDE)
def test_scoring_queries_of_ragged_prompts(name: str) -> None:
    visual, texts = 9, [(3, 7), (0, 1), (5, 4), (2, 2)]
    for seed in range(20):
        prompt, embeds = prompt_of(np.random.default_rng(seed), visual, texts)
        found = stages.load(name).scoring_queries(prompt)
        assert found.weights_BR.dtype == torch.float32
        torch.testing.assert_close(found.weights_BR.sum(dim=1), torch.ones(4))
        for row, (before, after) in enumerate(texts):
            image, text = (
                embeds[row, before : before + visual],
                embeds[row, before + visual : before + visual + after],
            )
            expected, _ = reference.scoring_queries(name, image, text)
            weights = found.weights_BR[row].numpy()
            rows = [int(r) - (before + visual + after) for r in found.rows_BR[row].numpy()[weights > 0]]
            assert rows == expected
            assert np.allclose(weights[weights > 0], 1 / len(expected))


def test_words_that_are_all_alike_all_rate() -> None:
    """Relevances equal to their mean, which rounding may put above them."""
    for after in range(1, 12):
        embeds = torch.ones(1, 4 + after, 6) * 0.1
        found = sparsevlm.scoring_queries(Prompt(embeds, torch.tensor([0]), torch.tensor([3 + after]), 4))
        assert int((found.weights_BR > 0).sum()) == after


# Choices


def check_choice(name: str, visual: int, cut: Cut, seed: int) -> None:
    """Torch code against the reference, which is given a map of one head and one scoring query."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(3, visual, 24)) * 3
    paid = draw.dirichlet(np.ones(visual), size=3)
    selected = stages.load(name).select(
        torch.from_numpy(paid).float(), torch.from_numpy(hidden).float(), kept=cut.kept, merged=cut.merged
    )
    for row in range(3):
        attention = np.zeros((1, visual + 2, visual + 2))
        attention[0, -1, 1 : visual + 1] = paid[row]
        choice = reference.choose(
            name, attention, hidden[row], image_start=1, rows=[-1], kept=cut.kept, merged=cut.merged
        )
        if choice.margin < 1e-5:
            continue  # float32 may decide otherwise
        assert selected.indices_BK[row].tolist() == choice.indices_K.tolist()
        assert len(set(choice.indices_K)) == cut.kept
        if cut.merged:
            assert selected.patches_BKE is not None
            assert choice.patches_KE is not None
            if choice.merge_margin > 1e-5:
                np.testing.assert_allclose(selected.patches_BKE[row].numpy(), choice.patches_KE, atol=1e-4)
        else:
            assert selected.patches_BKE is None


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("visual", [6, 36, 144, 300])
def test_choices_equal_float64(name: str, visual: int) -> None:
    before = visual
    for cut in cuts(name, 0.3, visual=visual):
        for seed in range(4):
            check_choice(name, before, cut, seed)
        before = cut.kept


@given(dropped=st.integers(1, 150), chosen=st.integers(1, 8), seed=st.integers(0, 99))
def test_recycling_of_any_size_equals_float64(dropped: int, chosen: int, seed: int) -> None:
    merged = sparsevlm.cluster_count(dropped)
    check_choice("sparsevlm", chosen + dropped, Cut(1, chosen + merged, merged), seed)


def test_tokens_that_are_all_the_same_still_make_clusters() -> None:
    """No distances, no densities to tell apart: every centre keeps itself, and nothing is lost or not a number."""
    tokens = torch.ones(1, 24, 4)
    centres, nearest = sparsevlm.clusters(tokens, 3)
    assert len(set(centres[0].tolist())) == 3
    assert {int(nearest[0, centre]) for centre in centres[0]} == {0, 1, 2}
    selected = sparsevlm.select(torch.rand(1, 80), torch.ones(1, 80, 4), kept=10, merged=3)
    assert selected.patches_BKE is not None
    torch.testing.assert_close(selected.patches_BKE, torch.ones(1, 10, 4))


def test_clusters_are_found_where_they_are() -> None:
    """Three groups far apart: a centre in each, every token goes to its own group's."""
    draw = np.random.default_rng(0)
    group = np.arange(24) % 3
    tokens = torch.from_numpy(np.eye(3)[group] * 50 + draw.normal(size=(24, 3)) * 0.1).float()[None]
    centres, nearest = sparsevlm.clusters(tokens, 3)
    assert sorted(int(group[centre]) for centre in centres[0]) == [0, 1, 2]
    assert [int(group[centres[0, cluster]]) for cluster in nearest[0]] == group.tolist()


def test_a_row_is_chosen_as_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, hidden = torch.rand(4, 100, generator=draw), torch.randn(4, 100, 16, generator=draw)
    for name in INSIDE:
        cut = cuts(name, 0.3, visual=100)[0]
        pruner = stages.load(name)
        together = pruner.select(scores, hidden, kept=cut.kept, merged=cut.merged)
        for row in range(4):
            alone = pruner.select(scores[[row]], hidden[[row]], kept=cut.kept, merged=cut.merged)
            assert alone.indices_BK[0].tolist() == together.indices_BK[row].tolist()


@pytest.mark.parametrize(("keep", "mean"), [(0.1962, 192), (0.0677, 128), (0.0469, 96), (0.03125, 64)])
def test_the_shares_that_the_page_names(keep: float, mean: int) -> None:
    assert tuple(cut.kept - cut.merged for cut in cuts("sparsevlm", keep)) == PUBLISHED[mean]
