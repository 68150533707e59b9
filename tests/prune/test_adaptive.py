"""Counts that an image finds by itself: the interquartile rule, padding, order, independence of the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.positions import PAD, MergedId, PositionPolicy
from gap_export.prune import Selected, VisionFeatures, order
from gap_export.prune.outliers import outlier_count

ADAPTIVE = [row.name for row in prune.PRUNERS.values() if row.adaptive]
GRID = (4, 5)


def outliers_by_percentile(scores: np.ndarray) -> int:
    lower, upper = np.percentile(scores.astype(np.float64), [25, 75])
    return int((scores > upper + 1.5 * (upper - lower)).sum())


@given(visual=st.integers(4, 600), seed=st.integers(0, 10_000), tail=st.floats(0.2, 4.0))
def test_counts_equal_those_of_numpy(visual: int, seed: int, tail: float) -> None:
    scores = np.exp(np.random.default_rng(seed).normal(0.0, tail, visual)).astype(np.float32)
    lower, upper = np.percentile(scores.astype(np.float64), [25, 75])
    fence = upper + 1.5 * (upper - lower)
    assume(np.abs(scores / fence - 1.0).min() > 1e-5)  # what is left to rounding is no test
    assert outlier_count(torch.from_numpy(scores)[None]).tolist() == [
        [max(1, outliers_by_percentile(scores))]
    ]


@pytest.mark.parametrize("spread", [1.0, 30.0, 90.0])
def test_large_products_do_not_hide_the_quartiles(spread: float) -> None:
    """The softmax of products as large as a tower's of width 768 is zero in float32 at both quartiles."""
    generator = np.random.default_rng(4)
    for _ in range(20):
        aligned, text = np.eye(144, dtype=np.float32), generator.normal(0.0, spread, 144).astype(np.float32)
        features = VisionFeatures(
            patches=torch.zeros(1, 144, 2),
            grid=(12, 12),
            aligned=torch.from_numpy(aligned)[None],
            text=torch.from_numpy(text)[None],
            aligned_inversely=False,
        )
        selected = prune.load_adaptive("trim").select_adaptive(features, 144, merged_id=MergedId.LAST_VISUAL)
        exact = np.exp(text.astype(np.float64) - text.max())
        assert selected.counts_B is not None
        assert selected.counts_B.tolist() == [max(1, outliers_by_percentile(exact)) + 1]


def test_without_outliers_one_token_is_kept() -> None:
    assert outlier_count(torch.linspace(0.4, 0.6, 40)[None]).tolist() == [[1]]
    assert outlier_count(torch.full((2, 40), 0.5)).tolist() == [[1], [1]]


def test_an_image_is_judged_by_its_own_scores() -> None:
    """Quartiles over the whole batch, as the original takes them, give other counts."""
    quiet = np.random.default_rng(0).uniform(0.0, 0.01, 100).astype(np.float32)
    quiet[:3] = 0.05
    loud = quiet + 1.0
    batch = np.stack([quiet, loud])
    assert outlier_count(torch.from_numpy(batch)).tolist() == [[3], [3]]
    assert outliers_by_percentile(batch) == 0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_exported_graph_equals_float64(exported: Callable[..., Any], sets: Any, name: str) -> None:
    """Under every bound, those that are too low among them."""
    graph, generator = exported(name, None, GRID, width=48, adaptive=True), np.random.default_rng(2)
    too_low = []
    for bound in range(2, 21):
        arrays = sets.random_features(generator, GRID, batch=4, width=48)
        assert set(sets.agrees(graph, arrays, bound)) == {"equal"}, bound
        too_low += (graph(arrays, bound)[2] > bound).tolist()
    assert {True, False} == set(too_low)


@pytest.mark.parametrize("bound", [None, 5])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_tensorrt_builds_the_selection(
    exported: Callable[..., Any],
    selection_builds_in_tensorrt: Callable[..., None],
    name: str,
    bound: int | None,
) -> None:
    selection_builds_in_tensorrt(exported(name, bound, GRID, width=48, adaptive=True))


@pytest.mark.parametrize("merged_id", list(MergedId))
@pytest.mark.parametrize("name", ADAPTIVE)
def test_padding_comes_last_in_every_order(sets: Any, name: str, merged_id: MergedId) -> None:
    arrays = sets.random_features(np.random.default_rng(4), GRID, batch=6, width=48)
    features = sets.features_of({key: torch.from_numpy(a.copy()) for key, a in arrays.items()}, GRID)
    for bound in (2, 9, 20):
        selected = prune.load_adaptive(name).select_adaptive(features, bound, merged_id=merged_id)
        assert selected.counts_B is not None
        for policy in (PositionPolicy.GAP, PositionPolicy.PERMUTED):
            ordered = order.in_decoder_order(selected, policy)
            assert ordered.counts_B is selected.counts_B
            assert ordered.patches_BKE is not None
            assert ordered.patches_BKE.shape == (6, bound, 48)
            assert ordered.patches_BKE.isfinite().all()
            for indices, count in zip(ordered.indices_BK.tolist(), selected.counts_B.tolist(), strict=True):
                filled = min(count, bound)
                assert min(indices[:filled]) >= 0
                assert max(indices[:filled]) < 20
                assert indices[filled:] == [PAD] * (bound - filled)
                assert len(set(indices[:filled])) >= filled - 1
                assert policy is PositionPolicy.PERMUTED or indices[:filled] == sorted(indices[:filled])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_count_found_equals_that_count_asked_for(sets: Any, name: str) -> None:
    """A strategy's two counts differ in how they split only where it says so: PruMerge+."""
    arrays = sets.random_features(np.random.default_rng(5), GRID, batch=1, width=48)
    features = sets.features_of({key: torch.from_numpy(a.copy()) for key, a in arrays.items()}, GRID)
    last = {"merged_id": MergedId.LAST_VISUAL}
    found = prune.load_adaptive(name).select_adaptive(features, 20, **last)  # type: ignore[arg-type]
    assert found.counts_B is not None
    count = int(found.counts_B[0])
    asked = prune.load(name).select(features, count, seed=0, **last)  # type: ignore[arg-type]
    assert (found.indices_BK[:, :count].tolist() == asked.indices_BK.tolist()) == (name != "prumerge_plus")


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_features_follow_and_padding_stays_behind(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(20, generator=generator)[:6] for _ in counts])
    indices[torch.arange(6) >= torch.tensor(counts)[:, None]] = PAD
    features = torch.arange(indices.numel()).reshape(*indices.shape, 1).float()
    selected = Selected(indices, features, torch.tensor(counts))
    ordered = order.in_decoder_order(selected, PositionPolicy.GAP)
    bare = order.in_decoder_order(Selected(indices, None, torch.tensor(counts)), PositionPolicy.GAP)
    assert bare.counts_B is not None
    assert bare.counts_B.tolist() == counts
    assert bare.indices_BK.tolist() == ordered.indices_BK.tolist()
    assert ordered.patches_BKE is not None
    for row, count in enumerate(counts):
        places = indices[row, :count].argsort()
        assert ordered.indices_BK[row].tolist() == indices[row, :count].sort().values.tolist() + [PAD] * (
            6 - count
        )
        assert ordered.patches_BKE[row, :count, 0].tolist() == features[row, places, 0].tolist()


def test_only_strategies_that_say_so_find_a_count() -> None:
    for row in prune.PRUNERS.values():
        if row.adaptive:
            assert callable(prune.load_adaptive(row.name).select_adaptive)
        else:
            with pytest.raises(RecipeError, match="no rule of its own"):
                prune.load_adaptive(row.name)
