"""Attention that patches receive from each other in the place of a class token's, tokens that are several patches, and text that the decoder's
token embedding reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gap_export import families, prune
from gap_export.errors import RecipeError
from gap_export.positions import MergedId
from gap_export.prune import reference

NAMES = tuple(row.name for row in prune.PRUNERS.values() if "attention" in row.needs)
READERS = tuple(row.name for row in prune.PRUNERS.values() if row.needs_text)
BY_FULL_WIDTH = ("prumerge", "prumerge_plus")
QUICK = [
    ("cls_attention", "patches"),
    ("visionzip", "groups"),
    ("prumerge", "groups"),
    ("vispruner", "patches"),
    ("text_similarity", "patches"),
    ("trim", "groups"),
    ("cdpruner", "groups"),
]
ALL = [(name, tower) for name in (*NAMES, *READERS) for tower in ("patches", "groups")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tower"), QUICK)
def test_exported_graph_equals_float64(check: SimpleNamespace, name: str, tower: str) -> None:
    check.agrees_with_float64(name, (8, 12), 24, cases=10, tower=tower, width=16)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("name", "tower"), ALL)
def test_exported_graph_equals_float64_on_many_sets(check: SimpleNamespace, name: str, tower: str) -> None:
    most = 100 if name == "vispruner" else 20  # it sorts its list in every round, where near-ties are common
    check.agrees_with_float64(name, (16, 16), 64, cases=200, tower=tower, most_ties=most)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("name", "tower"), ALL)
def test_every_count_as_an_input_of_one_graph(check: SimpleNamespace, name: str, tower: str) -> None:
    check.one_graph_for_every_count(name, tower=tower)


def test_received_attention_is_the_column_mean_of_the_map(sets: Any) -> None:
    """Head by head and patch by patch, from the formula."""
    generator = torch.Generator().manual_seed(2)
    query, keys = (torch.randn(2, 3, 10, 8, generator=generator) for _ in range(2))
    scores = prune.received_attention(query, keys)
    assert scores.dtype == torch.float32
    for row in range(2):
        expected = torch.zeros(10, dtype=torch.float64)
        for head in range(3):
            for looks in query[row, head].double():
                expected += torch.softmax(keys[row, head].double() @ looks / 8**0.5, dim=0) / 30
        assert (scores[row] - expected).abs().max() < 1e-6
        exact = reference.received_attention(query[row].double().numpy(), keys[row].double().numpy())
        assert abs(exact - expected.numpy()).max() < 1e-12
    assert torch.allclose(scores.sum(dim=1), torch.ones(2))


def test_visionzip_keeps_patches_alone() -> None:
    """One token is then enough, and none of them has an index that is not its own."""
    whole = prune.row("visionzip")
    bare = whole.on_tower(("projected_class_token", "grid"))
    assert (whole.merged, whole.min_tokens) == (1, 2)
    assert (bare.merged, bare.min_tokens, bare.merges) == (0, 1, True)
    assert whole.on_tower(("grid",)) is whole
    prune.check_count(bare, 1, 20)
    with pytest.raises(RecipeError, match="keeps at least 2 tokens"):
        prune.check_count(whole, 1, 20)
    for name in BY_FULL_WIDTH:  # the token for the rest needs no class token
        assert prune.row(name).on_tower(("projected_class_token",)) is prune.row(name)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tower", ["patches", "groups"])
def test_counts_that_follow_from_embeddings_equal_float64(exported: Any, sets: Any, tower: str) -> None:
    graph, generator = exported("trim", 256, (16, 16), adaptive=True, tower=tower), np.random.default_rng(3)
    features = (sets.random_features(generator, (16, 16), tower=tower) for _ in range(200))
    verdicts = [sets.agrees(graph, each)[0] for each in features]
    assert set(verdicts) <= {"equal", "tie"}, verdicts
    assert verdicts.count("tie") <= 20, verdicts


@pytest.mark.parametrize("tower", ["patches", "groups"])
def test_another_table_gives_another_choice(sets: Any, tower: str) -> None:
    """The control: what is read of the expression decides."""
    arrays = sets.random_features(np.random.default_rng(0), (8, 12), width=16, tower=tower)
    for name in READERS:
        first, other = (
            reference.choose(
                name,
                sets.features_in_float64({**arrays, **changes}, 0, (8, 12), tower=tower),
                24,
                seed=0,
                merged_id=MergedId.LAST_VISUAL,
            )
            for changes in ({}, {"table_BVH": -arrays["table_BVH"]})
        )
        assert first.indices_K.tolist() != other.indices_K.tolist()


@pytest.mark.parametrize("name", families.names())
def test_every_published_tower_shows_attention_and_reads_text(name: str) -> None:
    assert {*NAMES, *READERS} <= set(families.row(name).pruners)
