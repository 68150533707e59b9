"""From recipe and model sizes to the numbers that shape the graphs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export import prune
from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.spec import Dim
from gap_export.errors import RecipeError
from gap_export.inputs.layouts import TokenRange
from gap_export.inputs.prompt import TextTower
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe

FACTS = ModelSpec(
    hidden_size=8,
    layers=1,
    attention_heads=1,
    kv_heads=1,
    head_dim=8,
    vocabulary=10,
    visual_tokens=576,
    grid=(24, 24),
    max_positions=2048,
)


def recipe_with(**changes: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "checkpoint": "x", **changes})


@given(keep=st.floats(0.001, 1.0), text=st.integers(2, 300), new=st.integers(1, 300))
def test_capacity_holds_the_longest_prompt_its_answer_and_one_more(keep: float, text: int, new: int) -> None:
    plan = plan_for(recipe_with(keep=keep, max_text=text, max_new_tokens=new), FACTS)
    needed = (text - 1) + plan.pruning.kept + new + 1
    assert needed <= plan.capacity < needed + 16
    assert plan.capacity % 16 == 0
    exact = plan_for(recipe_with(keep=keep, max_text=text, max_new_tokens=new, capacity=needed), FACTS)
    assert exact.capacity == needed
    with pytest.raises(RecipeError, match=f"need {needed}"):
        plan_for(recipe_with(keep=keep, max_text=text, max_new_tokens=new, capacity=needed - 1), FACTS)


def test_a_cache_is_static_for_engines_and_where_it_is_said() -> None:
    varying = plan_for(recipe_with(keep=0.25), FACTS)
    (slots,) = set(varying.cache_layout(3).layer_extents)
    assert isinstance(slots, Dim)
    assert slots.maximum == varying.capacity
    said = plan_for(recipe_with(keep=0.25, capacity=640), FACTS)
    assert said.cache_layout(3).layer_extents == (640,) * 3
    engines = plan_for(recipe_with(keep=0.25, targets=("onnx", "tensorrt-rtx")), FACTS)
    assert engines.cache_layout(3).layer_extents == (engines.capacity,) * 3


def test_positions_are_those_of_the_unpruned_prompt() -> None:
    """Pruning saves slots, not positions: what the model was trained for limits the prompt before pruning."""
    fits = recipe_with(keep=0.01, max_text=1473, max_new_tokens=1)
    with pytest.raises(RecipeError, match="positions up to 2049") as caught:
        plan_for(fits, FACTS)
    assert caught.value.hint == "lower --max-text or --max-new-tokens"
    assert plan_for(recipe_with(keep=0.01, max_text=1472, max_new_tokens=1), FACTS).pruning.kept == 6


def test_plan_refuses_what_contradicts_itself() -> None:
    with pytest.raises(RecipeError, match="keeps all 576"):
        plan_for(recipe_with(pruner="none", keep=0.5), FACTS)
    with pytest.raises(RecipeError, match="is not a pruner"):
        plan_for(recipe_with(pruner="clss"), FACTS)
    assert plan_for(recipe_with(pruner="none", keep=1.0), FACTS).pruning.kept == 576


def test_a_fixed_count_is_its_own_smallest_and_largest() -> None:
    plan = plan_for(recipe_with(keep=0.25), FACTS)
    assert (plan.pruning.keep_mode, plan.pruning.min_tokens, plan.pruning.kept, plan.pruning.max_tokens) == (
        "fixed",
        144,
        144,
        144,
    )


def test_a_range_has_room_for_its_largest() -> None:
    plan = plan_for(recipe_with(keep="0.1:1.0", max_text=40, max_new_tokens=8), FACTS)
    assert (plan.pruning.keep_mode, plan.pruning.min_tokens, plan.pruning.kept, plan.pruning.max_tokens) == (
        "dynamic",
        58,
        144,
        576,
    )
    assert plan.capacity >= 39 + 576 + 8
    assert plan.graph_specs(FACTS).kept_dim == Dim(name="kept", minimum=58, optimum=144, maximum=576)


def test_adaptive_has_room_for_its_bound() -> None:
    plan = plan_for(recipe_with(keep="adaptive", pruner="prumerge", keep_bound=0.3), FACTS)
    assert (plan.pruning.keep_mode, plan.pruning.kept, plan.pruning.max_tokens) == ("adaptive", 173, 173)
    with pytest.raises(RecipeError, match="no rule of its own") as caught:
        plan_for(recipe_with(keep="adaptive", pruner="spatial"), FACTS)
    assert "prumerge" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "0.1:1.0", "pruner": "none"}, "keeps all 576"),
        ({"keep": "0.001:1.0", "pruner": "visionzip"}, "keeps at least 2 tokens"),
        ({"keep": "0.1:0.1001"}, "is 58 of 576 tokens at both ends"),
        ({"keep": "0.1:1.0", "capacity": 300}, "is too small"),
    ],
)
def test_ranges_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_for(recipe_with(**changes), FACTS)


def test_a_strategy_that_looks_at_the_expression_names_what_to_add() -> None:
    published = FACTS.model_copy(update={"published_tower": "openai/clip-vit-large-patch14-336"})
    with pytest.raises(RecipeError, match="no text tower") as caught:
        plan_for(recipe_with(pruner="text_similarity"), published)
    assert "--text-tower openai/clip-vit-large-patch14-336" in caught.value.hint
    assert "spatial" in caught.value.hint
    tower = TextTower(checkpoint="x", context=77, width=768, vocabulary=64, aligned_inversely=True)
    assert plan_for(recipe_with(pruner="text_similarity"), FACTS, tower).text_tower == tower


# Inside the decoder

DEEP = FACTS.model_copy(update={"layers": 32})


@pytest.mark.parametrize("capacity", [None, 700])
def test_stages_of_a_decoder_that_drops_tokens(capacity: int | None) -> None:
    plan = plan_for(
        recipe_with(pruner="pyramiddrop", keep=0.125, max_text=40, max_new_tokens=8, capacity=capacity), DEEP
    )
    assert (
        plan.pruning.keep_mode,
        plan.pruning.keep,
        plan.pruning.min_tokens,
        plan.pruning.kept,
        plan.pruning.max_tokens,
    ) == (
        "fixed",
        0.125,
        576,
        576,
        576,
    )
    assert [(stage.run, stage.kept) for stage in plan.pruning.stages] == [
        (range(8), 576), (range(8, 16), 288), (range(16, 24), 144), (range(24, 32), 72)
    ]  # fmt: skip
    needed = [39 + stage.kept + 8 + 1 for stage in plan.pruning.stages]
    spare = [stage.capacity - least for stage, least in zip(plan.pruning.stages, needed, strict=True)]
    assert min(spare) == spare[0] >= 0
    assert plan.pruning.stages[0].capacity == plan.capacity == (capacity or 624)
    slots = [dim if isinstance(dim, int) else dim.maximum for dim in plan.cache_layout(32).layer_extents]
    assert slots == [stage.capacity for stage in plan.pruning.stages for _ in range(8)]
    names = {dim.name for dim in plan.cache_layout(32).layer_extents if isinstance(dim, Dim)}
    assert names == (
        set() if capacity else {f"capacity_{number}" for number in range(len(plan.pruning.stages))}
    )


def test_strategies_before_the_decoder_have_no_stages() -> None:
    plan = plan_for(recipe_with(), DEEP)
    assert plan.pruning.stages == ()
    assert len(set(plan.cache_layout(32).layer_extents)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruner": "fastv", "keep": "0.0001:1.0"}, "keeps none of 576 tokens"),
        ({"pruner": "sparsevlm", "keep": "0.003:1.0"}, "no token of the image"),
        ({"pruner": "sparsevlm", "keep": "adaptive"}, "no rule of its own"),
        ({"pruner": "fastv", "prune_layers": (32,)}, "from 1 to 31"),
        ({"pruner": "spatial", "prune_layers": (2,)}, "drops no tokens inside the decoder"),
        ({"pruner": "sparsevlm", "keep": 0.003}, "no token of the image"),
        ({"pruner": "fastv", "capacity": 300}, "576 visual tokens"),
    ],
)
def test_stages_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_for(recipe_with(**changes), DEEP)


def test_requests_choose_a_share_inside_the_decoder() -> None:
    """All tokens enter; what later stages have is told with every prompt, and their caches hold the largest share."""
    plan = plan_for(recipe_with(pruner="pyramiddrop", keep="0.125:0.25:0.5"), DEEP)
    pruning = plan.pruning
    assert (pruning.keep_mode, pruning.keep_range) == ("dynamic", (0.125, 0.5))
    assert (pruning.min_tokens, pruning.kept, pruning.max_tokens) == (576, 576, 576)
    assert pruning.stage_counts_are_told
    assert not pruning.count_is_given
    assert pruning.stages[-1].kept == 144
    assert [stage.max_kept for stage in pruning.stages] == [576, 457, 363, 288]
    specs = plan.graph_specs(DEEP)
    assert [tensor.name for tensor in specs.prefill.inputs if tensor.extent_of is not None] == [
        f"stage_slots.{stage}" for stage in (1, 2, 3)
    ]
    assert specs.splice.inputs[-1].name == "stage_counts"
    assert specs.splice.inputs[-1].shape[1:] == (1, 3)


def test_caches_hold_the_largest_count_of_a_range() -> None:
    """SparseVLM's first stage has more at keep 0.07 than at 0.2."""
    pruning = plan_for(recipe_with(pruner="sparsevlm", keep="0.05:0.07:0.2"), DEEP).pruning
    assert (pruning.stages[1].kept, pruning.stages[1].max_kept) == (312, 312)
    assert all(stage.kept <= stage.max_kept for stage in pruning.stages)


def test_a_shallow_decoder_is_told_what_it_lacks() -> None:
    with pytest.raises(RecipeError, match="more than 3 layers, this one has 1"):
        plan_for(recipe_with(pruner="pyramiddrop"), FACTS)


# Images that differ in size

MANY = FACTS.model_copy(
    update={
        "visual_tokens": 600,
        "grid": None,
        "token_range": TokenRange(min_tokens=4, typical_tokens=200, max_tokens=560, never_pruned=40),
    }
)


@given(keep=st.floats(0.001, 1.0))
def test_every_image_keeps_the_same_share(keep: float) -> None:
    plan = plan_for(recipe_with(keep=keep, pruner="random"), MANY)
    assert plan.pruning.keep_mode == "ratio"
    assert plan.pruning.max_tokens == max(1, int(keep * 560 + 0.5)) + 40
    assert plan.pruning.min_tokens == max(1, int(keep * 4 + 0.5))
    specs = plan.graph_specs(MANY)
    assert specs.count_dim.maximum + 40 == specs.kept_dim.maximum
    assert plan.capacity >= 127 + plan.pruning.max_tokens + 32 + 1


@pytest.mark.parametrize("images", [1, 2])
@given(keep=st.floats(0.001, 1.0))
def test_stages_follow_the_size_of_the_image(keep: float, images: int) -> None:
    """Every later stage has as many slots to spare as the first, or a few more, for the largest images."""
    facts = MANY.model_copy(update={"layers": 32})
    prompt = "<image>" * images + " {expression}"
    plan = plan_for(recipe_with(keep=keep, pruner="sparsevlm", images=images, prompt=prompt), facts)
    pruning = plan.pruning
    assert pruning.keep_mode == "ratio"
    assert (pruning.min_tokens, pruning.kept, pruning.max_tokens) == (4, 240, 600), "all of them enter"
    first, *later = pruning.stages
    assert (first.kept, first.max_kept, first.capacity) == (240, 600, plan.capacity)
    schedule = prune.row("sparsevlm").load_schedule()
    assert tuple(stage.kept for stage in later) == schedule.counts(keep, 240)
    assert tuple(stage.max_kept for stage in later) == schedule.counts(keep, 600)
    for stage in later:
        assert stage.capacity - images * stage.max_kept >= plan.capacity - images * 600
    assert plan.cache_layout(32).lengths_of(100) == [100] * 4, "of a prompt of which nothing is known"
    assert plan.cache_layout(32).lengths_of(100, [10, 20, 30]) == [100, 90, 80, 70]


@given(bound=st.floats(0.01, 1.0))
def test_an_image_finds_its_count_up_to_a_share(bound: float) -> None:
    """Every call is told the most, which follows from its image."""
    plan = plan_for(recipe_with(keep="adaptive", keep_bound=bound, pruner="prumerge"), MANY)
    fixed = plan_for(recipe_with(keep=bound, pruner="prumerge"), MANY)
    assert plan.pruning.keep_mode == "bounded"
    assert plan.pruning.finds_count
    assert plan.pruning.count_is_given
    assert (plan.pruning.min_tokens, plan.pruning.keep) == (2, bound)
    assert plan.pruning.max_tokens == fixed.pruning.max_tokens
    vision = plan.graph_specs(MANY).vision(())
    assert [tensor.name for tensor in vision.inputs] == ["keep_count"]
    assert [tensor.name for tensor in vision.outputs] == ["visual_embeds", "kept_indices", "kept_counts"]
    with pytest.raises(RecipeError, match="no rule of its own"):
        plan_for(recipe_with(keep="adaptive", pruner="divprune"), MANY)
    with pytest.raises(RecipeError, match="ends of lines would stand behind"):
        plan_for(recipe_with(keep="adaptive", pruner="prumerge", positions="permuted"), MANY)


def test_requests_may_choose_the_share() -> None:
    plan = plan_for(recipe_with(keep="0.1:1.0", pruner="random"), MANY)
    assert (plan.pruning.keep_mode, plan.pruning.keep_range) == ("dynamic", (0.1, 1.0))
    assert (plan.pruning.min_tokens, plan.pruning.max_tokens) == (1, 600)
    assert plan_for(recipe_with(keep="0.1:1.0"), FACTS).pruning.keep_range == (0.1, 1.0)


def test_ranges_go_with_precisions_that_have_use_for_them() -> None:
    for precision in ("fp8", "nvfp4"):
        with pytest.raises(RecipeError, match="needs activation ranges") as caught:
            plan_for(recipe_with(precision=precision), FACTS)
        assert "gap-export calibrate" in caught.value.hint
        plan_for(recipe_with(precision=precision, ranges="ranges.json"), FACTS)
    with pytest.raises(RecipeError, match="has no use for ranges"):
        plan_for(recipe_with(precision="int8", ranges="ranges.json"), FACTS)
