"""Choices of the strategies inside the decoder as torch code, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export import prune
from gap_export.prune.in_decoder import reference, sparsevlm, stages
from gap_export.prune.in_decoder.schedules import Cut, cluster_count, cuts_for
from gap_export.prune.in_decoder.stages import Image, Kept, Prompt, attention_paid

INSIDE = prune.names(in_decoder=True)


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
    within = torch.arange(longest) - starts[:, None]
    is_image = (within >= 0) & (within < visual)
    tokens = torch.from_numpy(embeds).float()
    return Prompt(tokens, is_image, starts + visual, last, longest - visual + 1), embeds


@pytest.mark.parametrize("name", INSIDE)
def test_scoring_queries_of_ragged_prompts(name: str) -> None:
    visual, texts = 9, [(3, 7), (0, 1), (5, 4), (2, 2), (4, 0)]
    for seed in range(20):
        prompt, embeds = prompt_of(np.random.default_rng(seed), visual, texts)
        found = stages.load(name).scoring_queries(prompt)
        assert found.weights_BR.dtype == torch.float32
        torch.testing.assert_close(found.weights_BR.sum(dim=1), torch.ones(5))
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


@pytest.mark.parametrize("name", INSIDE)
def test_scoring_queries_of_two_images(name: str) -> None:
    """What is rated is the text behind the last image, by all images together; text between them rates nothing."""
    draw = np.random.default_rng(3)
    embeds = draw.normal(size=(1, 20, 8))
    is_image = torch.zeros(1, 20, dtype=torch.bool)
    is_image[0, 2:6] = is_image[0, 9:14] = True
    prompt = Prompt(torch.from_numpy(embeds).float(), is_image, torch.tensor([14]), torch.tensor([18]), 12)
    found = stages.load(name).scoring_queries(prompt)
    expected, _ = reference.scoring_queries(name, embeds[0][is_image[0].numpy()], embeds[0, 14:19])
    weights = found.weights_BR[0].numpy()
    assert [int(row) - 19 for row in found.rows_BR[0].numpy()[weights > 0]] == expected


def test_words_that_are_all_alike_all_rate() -> None:
    """Relevances equal to their mean, which rounding may put above them."""
    for after in range(1, 12):
        embeds = torch.ones(1, 4 + after, 6) * 0.1
        is_image = (torch.arange(4 + after) < 4)[None]
        found = sparsevlm.scoring_queries(
            Prompt(embeds, is_image, torch.tensor([4]), torch.tensor([3 + after]), after + 1)
        )
        assert int((found.weights_BR > 0).sum()) == after


# Choices


def image_of(visual: list[int], kept: list[int], *, before: int = 1, after: int = 3) -> Image:
    """An image in every row, behind `before` tokens of text, with as many tokens as that row's number says; the longest row has `after` behind."""
    within = torch.arange(before + max(visual) + after) - before
    mine = torch.stack([(within >= 0) & (within < count) for count in visual])
    return Image(mine, torch.tensor(visual), torch.tensor(kept), max(kept), max(visual))


def in_order(kept: Kept, row: int, count: int, before: int = 1) -> list[int]:
    """Places within the image of a row, best first."""
    ranks = kept.ranks_BS[row]
    return [int((ranks == rank).nonzero().item()) - before for rank in range(count)]


def check_choice(name: str, visual: list[int], cuts: list[Cut], seed: int) -> None:
    """Torch code against the reference, which is given a map of one head and one scoring query; rows differ in what they have and keep."""
    draw = np.random.default_rng(seed)
    image = image_of(visual, [cut.kept for cut in cuts])
    shape = image.is_mine_BS.shape
    hidden, beside = draw.normal(size=(2, *shape, 24)) * 3
    paid = draw.dirichlet(np.ones(shape[1]), size=shape[0])
    tokens = torch.from_numpy(hidden).float()
    selected = stages.load(name).select(torch.from_numpy(paid).float(), tokens, image)
    merged = None
    if selected.merging is not None:
        merged = [selected.merging.of(torch.from_numpy(x).float()) for x in (hidden, beside)]
    for row, (count, cut) in enumerate(zip(visual, cuts, strict=True)):
        attention = np.zeros((1, shape[1], shape[1]))
        attention[0, -1] = paid[row]
        own = slice(1, 1 + count)
        choice = reference.choose(
            name, attention, hidden[row, own], image_start=1, rows=[-1], kept=cut.kept, merged=cut.merged,
            carried_NX=np.concatenate([hidden[row, own], beside[row, own]], axis=1),
        )  # fmt: skip
        if choice.margin < 1e-5:
            continue  # float32 may decide otherwise
        assert int((selected.ranks_BS[row] < cut.kept).sum()) == cut.kept
        found = in_order(selected, row, cut.kept)
        assert found == choice.indices_K.tolist()
        assert len(set(found)) == cut.kept
        if merged is None:
            assert choice.patches_KE is None
        elif choice.merge_margin > 1e-5:
            expected = np.concatenate([hidden[row], beside[row]], axis=1)
            if choice.patches_KE is not None:
                expected[[1 + place for place in found]] = choice.patches_KE
            mine = torch.cat([each[row] for each in merged], dim=1).numpy()
            np.testing.assert_allclose(mine, expected, atol=1e-4, err_msg="others are left as they are")


def cuts_of(name: str, keep: float, visual: int) -> tuple[Cut, ...]:
    return cuts_for(name, keep, visual_tokens=visual, layers=32)


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("visual", [6, 36, 144, 300])
def test_choices_equal_float64(name: str, visual: int) -> None:
    before = visual
    for cut in cuts_of(name, 0.3, visual):
        for seed in range(4):
            check_choice(name, [before] * 3, [cut] * 3, seed)
        before = cut.kept


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    keep=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", INSIDE)
def test_rows_with_images_of_any_size_equal_float64(
    name: str, sizes: list[int], keep: float, seed: int
) -> None:
    """Every row keeps its own count; nothing of a longer one reaches it."""
    schedule = prune.row(name).load_schedule()
    before = sizes
    for stage in range(schedule.stages):
        kept = [schedule.counts(keep, size)[stage] for size in sizes]
        cuts = [Cut(1, k, schedule.merged(b, k) or 0) for b, k in zip(before, kept, strict=True)]
        check_choice(name, before, cuts, seed + stage)
        before = kept


@given(dropped=st.integers(1, 150), chosen=st.integers(1, 8), seed=st.integers(0, 99))
def test_recycling_of_any_size_equals_float64(dropped: int, chosen: int, seed: int) -> None:
    before, kept = chosen + dropped, chosen + cluster_count(dropped)
    merged = prune.row("sparsevlm").load_schedule().merged(before, kept)
    assert merged is not None
    check_choice("sparsevlm", [before], [Cut(1, kept, merged)], seed)


@given(before=st.integers(1, 20_000), share=st.floats(0.0, 1.0))
def test_how_many_are_merged_follows_from_what_is_kept(before: int, share: float) -> None:
    """The arithmetic of the graph finds what the schedule finds by looking at every count."""
    least = 1 + cluster_count(before - 1)
    kept = least + int(share * (before - least))
    mine = sparsevlm.merged_counts(torch.tensor([before]), torch.tensor([kept]))
    assert int(mine) == prune.row("sparsevlm").load_schedule().merged(before, kept)


def test_tokens_that_are_all_the_same_still_make_clusters() -> None:
    """No distances, no densities to tell apart: every centre keeps itself, and nothing is lost or not a number."""
    centres, nearest = sparsevlm.clusters(torch.ones(1, 24, 4), torch.tensor([24]), torch.tensor([3]), 3)
    assert len(set(centres[0].tolist())) == 3
    assert {int(nearest[0, centre]) for centre in centres[0]} == {0, 1, 2}
    kept = 7 + cluster_count(80 - 7)
    selected = sparsevlm.select(torch.rand(1, 84), torch.ones(1, 84, 4), image_of([80], [kept]))
    assert selected.merging is not None
    torch.testing.assert_close(selected.merging.of(torch.ones(1, 84, 4)), torch.ones(1, 84, 4))
    assert sorted(in_order(selected, 0, kept)) == sorted(set(in_order(selected, 0, kept)))


def test_clusters_are_found_where_they_are() -> None:
    """Three groups far apart: a centre in each, every token goes to its own group's; tokens that do not count are no part of one."""
    draw = np.random.default_rng(0)
    group = np.arange(24) % 3
    tokens = torch.from_numpy(np.eye(3)[group] * 50 + draw.normal(size=(24, 3)) * 0.1).float()[None]
    beyond = torch.cat([tokens, torch.full((1, 6, 3), 1e3)], dim=1)
    for points in (tokens, beyond):
        centres, nearest = sparsevlm.clusters(points, torch.tensor([24]), torch.tensor([3]), 3)
        assert sorted(int(group[centre]) for centre in centres[0]) == [0, 1, 2]
        assert [int(group[centres[0, cluster]]) for cluster in nearest[0, :24]] == group.tolist()


def test_a_row_is_chosen_as_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, hidden = torch.rand(4, 104, generator=draw), torch.randn(4, 104, 16, generator=draw)
    for name in INSIDE:
        cut, pruner = cuts_of(name, 0.3, 100)[0], stages.load(name)
        together = pruner.select(scores, hidden, image_of([100] * 4, [cut.kept] * 4))
        for row in range(4):
            alone = pruner.select(scores[[row]], hidden[[row]], image_of([100], [cut.kept]))
            assert in_order(alone, 0, cut.kept) == in_order(together, row, cut.kept)
