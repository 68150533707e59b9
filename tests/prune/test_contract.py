"""One contract for every strategy, and each strategy's own arithmetic against an independent one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from gap_export import prune
from gap_export.errors import RecipeError
from gap_export.positions import MergedId, PositionPolicy
from gap_export.prune import Selected, VisionFeatures, cls_attention, order
from gap_export.prune.random import drawn_indices
from gap_export.prune.reference.scores import grid_indices

GRID, HEADS, WIDTH = (4, 5), 3, 8
VISUAL = GRID[0] * GRID[1]


def select(name: str, whole: VisionFeatures[torch.Tensor], kept: int, seed: int = 0) -> torch.Tensor:
    return prune.load(name).select(whole, kept, seed=seed, merged_id=MergedId.LAST_VISUAL).indices_BK


def tensors(batch: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual, width = grid[0] * grid[1], HEADS * WIDTH

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "patches_BNE": normal(visual, width),
        "class_query_BAD": normal(HEADS, WIDTH),
        "keys_BATD": normal(HEADS, visual + 1, WIDTH),
        "class_token_BE": normal(width),
        "full_width_query_BE": normal(width),
        "full_width_keys_BTE": normal(visual + 1, width),
        "projected_BNH": normal(visual, 2 * width),
        "aligned_BNP": normal(visual, width),
        "text_BP": normal(width),
    }


def features_of(given: dict[str, torch.Tensor], grid: tuple[int, int] = GRID) -> VisionFeatures[torch.Tensor]:
    return VisionFeatures(
        patches=given["patches_BNE"],
        grid=grid,
        attention=prune.class_attention(given["class_query_BAD"], given["keys_BATD"]),
        class_token=given["class_token_BE"],
        mean_keys=prune.mean_keys(given["keys_BATD"]),
        full_width_attention=prune.class_attention(
            given["full_width_query_BE"][:, None], given["full_width_keys_BTE"][:, None]
        ),
        full_width_keys=given["full_width_keys_BTE"][:, 1:],
        projected=given["projected_BNH"],
        aligned=given["aligned_BNP"],
        text=given["text_BP"],
    )


def features(batch: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> VisionFeatures[torch.Tensor]:
    return features_of(tensors(batch, grid, seed), grid)


def counts_of(name: str) -> list[int]:
    return [VISUAL] if name == "none" else list(range(prune.row(name).min_tokens, VISUAL + 1))


# The contract


@pytest.mark.parametrize("name", prune.names(in_decoder=False))
def test_survivors_are_distinct_and_in_range_at_every_count(name: str) -> None:
    merged = prune.row(name).merged
    for kept in counts_of(name):
        selected = select(name, features(), kept)
        assert selected.dtype == torch.int64
        assert selected.shape == (4, kept)
        for row in selected.tolist():
            assert len(set(row)) >= kept - merged
            assert set(row) <= set(range(VISUAL))


@pytest.mark.parametrize("name", prune.names(in_decoder=False))
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    kept = counts_of(name)[len(counts_of(name)) // 2]
    whole = tensors()
    alone = [features_of({name: tensor[row : row + 1] for name, tensor in whole.items()}) for row in range(4)]
    expected = [select(name, image, kept, 3)[0].tolist() for image in alone]
    assert select(name, features(), kept, 3).tolist() == expected


@pytest.mark.parametrize("name", prune.names(in_decoder=False))
def test_decoder_order_is_ascending_unless_permuted(name: str) -> None:
    selected = select(name, features(), VISUAL if name == "none" else 7)
    for policy in PositionPolicy:
        ordered = order.in_decoder_order(Selected(selected), policy).indices_BK
        if policy is PositionPolicy.PERMUTED:
            assert torch.equal(ordered, selected)
        else:
            assert ordered.tolist() == [sorted(row) for row in selected.tolist()]


@pytest.mark.parametrize("name", prune.names(in_decoder=False))
def test_only_strategies_that_say_so_depend_on_the_seed(name: str) -> None:
    kept = VISUAL if name == "none" else 7
    first, second = (select(name, features(), kept, seed).tolist() for seed in (0, 1))
    assert (first != second) == prune.row(name).needs_seed
    assert first == select(name, features(), kept, 0).tolist()


@pytest.mark.parametrize("name", prune.names(in_decoder=False))
def test_strategies_that_need_no_attention_work_without(name: str) -> None:
    bare = replace(
        features(),
        **dict.fromkeys(("attention", "class_token", "mean_keys", "full_width_attention", "full_width_keys")),
    )
    kept = counts_of(name)[-1]
    if "attention" in prune.row(name).needs:
        with pytest.raises(ValueError, match="shows its"):
            select(name, bare, kept)
    else:
        assert select(name, bare, kept).shape == (4, kept)


@pytest.mark.parametrize("name", ["cls_attention", "text_similarity", "random", "divprune", "cdpruner"])
def test_more_tokens_by_score_keep_the_fewer(name: str) -> None:
    for kept in range(1, VISUAL):
        assert torch.equal(select(name, features(), kept + 1)[:, :kept], select(name, features(), kept))


# Names and counts


@pytest.mark.parametrize(("typed", "meant"), [("cls_atention", "cls_attention"), ("spacial", "spatial"), ("rand", "random")])  # fmt: skip
def test_did_you_mean(typed: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
        prune.load(typed)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(RecipeError) as caught:
        prune.load("xyzzy")
    assert "did you mean" not in caught.value.message
    assert all(name in caught.value.hint for name in prune.names())


@pytest.mark.parametrize(
    ("keep", "visual", "kept"),
    [
        (0.25, 576, 144),
        (1.0, 576, 576),
        (0.001, 576, 1),
        (0.5, 5, 3),
        (0.1, 5, 1),
        (0.3, 5, 2),
        (0.999, 5, 5),
    ],
)
def test_kept_count(keep: float, visual: int, kept: int) -> None:
    assert prune.kept_count(keep, visual) == kept


@given(keep=st.floats(0, 1, exclude_min=True), visual=st.integers(1, 5000))
def test_kept_count_is_the_nearest_and_never_zero(keep: float, visual: int) -> None:
    if keep * visual < 0.5:
        with pytest.raises(RecipeError, match=f"keeps none of {visual} tokens"):
            prune.kept_count(keep, visual)
        return
    kept = prune.kept_count(keep, visual)
    assert 1 <= kept <= visual
    assert abs(kept - keep * visual) <= 0.5 + 1e-9


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_kept_count_refuses_what_is_no_fraction(keep: float) -> None:
    with pytest.raises(RecipeError, match="above 0 and at most 1"):
        prune.kept_count(keep, 10)


# Class-token attention


def scores_in_float64(query_AD: NDArray[Any], keys_ATD: NDArray[Any]) -> NDArray[np.float64]:
    """[N]: softmax of one query over class token and patches, per head, mean over heads, class column dropped."""
    query, keys = query_AD.astype(np.float64), keys_ATD.astype(np.float64)
    rows = []
    for head in range(len(query)):
        logits = np.array([query[head] @ key for key in keys[head]]) / np.sqrt(query.shape[1])
        weights = np.exp(logits - logits.max())
        rows.append(weights / weights.sum())
    return np.mean(rows, axis=0)[1:]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30)
def test_class_attention_equals_float64(seed: int) -> None:
    given_by_layers = tensors(batch=2, seed=seed)
    whole = features_of(given_by_layers)
    scores = cls_attention.scores(whole).numpy()
    for row in range(2):
        query, keys = (given_by_layers[name][row].numpy() for name in ("class_query_BAD", "keys_BATD"))
        expected = scores_in_float64(query, keys)
        assert np.abs(scores[row] - expected).max() < 1e-6
        kept = select("cls_attention", whole, 6)[row].tolist()
        assert kept == np.argsort(-expected)[:6].tolist()


def test_class_attention_equals_the_eager_attention_map_of_transformers(tiny_checkpoint: Path) -> None:
    """Query and key as the vision component takes them, against the map that transformers returns for the same layer."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    tower: CLIPVisionModel = model.model.vision_tower
    pixels = torch.randn(2, 3, 36, 36, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        seen = tower(pixels, output_hidden_states=True, output_attentions=True)
        layer = len(tower.encoder.layers) - 2
        attention = tower.encoder.layers[layer].self_attn
        normed = tower.encoder.layers[layer].layer_norm1(seen.hidden_states[layer])
        heads = (attention.num_heads, attention.head_dim)
        own = VisionFeatures(
            patches=seen.hidden_states[-2][:, 1:],
            grid=(6, 6),
            attention=prune.class_attention(
                attention.q_proj(normed[:, 0]).unflatten(-1, heads),
                attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2),
            ),
        )
        expected = seen.attentions[-2].mean(dim=1)[:, 0, 1:]
    assert seen.attentions[-2] is seen.attentions[layer]
    scores = cls_attention.scores(own)
    assert (scores - expected).abs().max() < 1e-6
    assert (scores.sum(dim=1) < 1).all(), "what the class token gives itself is dropped, not shared out"


# Spatial


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), data=st.data())
def test_grid_points_are_distinct_and_ascending(rows: int, columns: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, rows * columns))
    indices = grid_indices((rows, columns), kept)
    assert indices == sorted(set(indices))
    assert len(indices) == kept
    assert 0 <= indices[0] <= indices[-1] < rows * columns


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), data=st.data())
def test_grid_points_cover_the_image(rows: int, columns: int, data: st.DataObject) -> None:
    """No patch is farther from a survivor than about the side of the square that each survivor stands for."""
    kept = data.draw(st.integers(1, rows * columns))
    points = np.array([divmod(index, columns) for index in grid_indices((rows, columns), kept)])
    patches = np.array([(r, c) for r in range(rows) for c in range(columns)])
    nearest = np.abs(patches[:, None] - points[None]).max(axis=2).min(axis=1).max()
    side = max(np.sqrt(rows * columns / kept), rows / kept, columns / kept)
    assert nearest <= side + 0.5


def test_a_quarter_of_24_by_24_is_every_other_patch() -> None:
    rows = {index // 24 for index in grid_indices((24, 24), 144)}
    columns = {index % 24 for index in grid_indices((24, 24), 144)}
    assert rows == columns == set(range(1, 24, 2))


def test_all_of_a_grid_is_the_grid() -> None:
    assert grid_indices((5, 7), 35) == list(range(35))


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), data=st.data())
def test_the_tensor_arithmetic_gives_the_same_grid(rows: int, columns: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, rows * columns))
    bare = VisionFeatures(torch.empty(2, rows * columns, 1), (rows, columns))
    assert select("spatial", bare, kept).tolist() == [grid_indices((rows, columns), kept)] * 2


# Random


def test_draws_are_the_same_on_every_machine() -> None:
    assert drawn_indices(10, 0)[:4] == [9, 2, 1, 5]
    assert drawn_indices(10, 1) != drawn_indices(10, 2)


def test_a_draw_does_not_need_to_know_the_size_beforehand() -> None:
    """Where images differ in size, the draw of each is that of its size."""
    for visual in (5, 20):
        loose = VisionFeatures(torch.empty(2, visual, 1), grid=None)
        assert select("random", loose, 5, seed=3).tolist() == [drawn_indices(visual, 3)[:5]] * 2


def test_a_grid_is_not_made_up() -> None:
    loose = replace(features(), grid=None)
    with pytest.raises(ValueError, match="lie on grids"):
        select("spatial", loose, 5)
    with pytest.raises(ValueError, match="lie on grids"):
        prune.load("trim").select(loose, 5, seed=0, merged_id=MergedId.CENTROID)


def test_none_is_not_asked_to_prune() -> None:
    with pytest.raises(ValueError, match="keeps all 20"):
        select("none", features(), 5)
