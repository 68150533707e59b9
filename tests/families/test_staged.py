"""Decoders that drop tokens between layers: exported, in ONNX Runtime, against transformers' layers run one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export import prune
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Pruning
from gap_export.bundle.spec import GraphName
from gap_export.errors import InputError
from gap_export.evaluation import runner
from gap_export.evaluation.controls import controls
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids, Placement, PositionPolicy, advance
from gap_export.precision import precision
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.session import VisualTokens
from tests.exported import SLOWLY_TRACED, GraphExporter

pytestmark = pytest.mark.slow

DeepBundle = Callable[..., Bundle]
DeepReference = Callable[[Pruning], Any]
Pixels = NDArray[np.float32]

INSIDE = prune.names(in_decoder=True)
GAP = PositionPolicy.GAP
VISUAL, NEW = 36, 5


def answer(session: Any, pixels: Pixels, ids: Ids, **options: Any) -> Generation:
    options = {"max_new_tokens": NEW, "eos_token_ids": (), "keep_logits": True, **options}
    return generate(session, of_one_size(pixels, VISUAL), ids, **options)


def difference(one: Generation, other: Generation) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one.logits, other.logits, strict=True))


def opened(bundle: Bundle) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle, threads=1)


# Against transformers


@pytest.mark.parametrize(
    ("pruner", "policy"),
    [
        pytest.param(pruner, policy, marks=pytest.mark.long if (pruner, policy) in SLOWLY_TRACED else ())
        for pruner in INSIDE
        for policy in PositionPolicy
    ],
)
def test_exported_graphs_answer_as_transformers_does(
    pruner: str,
    policy: PositionPolicy,
    deep_bundle: DeepBundle,
    deep_reference: DeepReference,
    pixels: Pixels,
    questions: Ids,
) -> None:
    bundle = deep_bundle(pruner=pruner, positions=policy)
    pruning = bundle.manifest.pruning
    mine = answer(opened(bundle), pixels, questions)
    theirs = answer(deep_reference(pruning), pixels, questions)
    assert theirs.margins is not None
    assert theirs.margins.min() > precision("fp32").choice_margin, "no choice here may hang by a hair"
    for stage, ours, reference in zip(
        pruning.stages, mine.every_kept_indices, theirs.every_kept_indices, strict=True
    ):
        assert ours.shape == (4, stage.kept)
        assert ours.tolist() == reference.tolist()
        ascending = bool((np.diff(ours, axis=1) > 0).all())
        assert ascending == (policy.keeps_raster_order or stage.kept == VISUAL)
    assert mine.tokens == theirs.tokens
    assert difference(mine, theirs) < 1e-3
    assert np.abs(mine.logits[0]).max() > 1, "logits that could not differ prove nothing"


def test_policies_are_not_the_same_thing(deep_bundle: DeepBundle, pixels: Pixels, questions: Ids) -> None:
    answers = [
        answer(opened(deep_bundle(pruner="fastv", positions=p)), pixels, questions) for p in PositionPolicy
    ]
    for one, other in pairwise(answers):
        assert difference(one, other) > 0.1


def test_other_layers_and_grouped_queries(
    deep_bundle: DeepBundle, deep_reference: DeepReference, pixels: Pixels, questions: Ids
) -> None:
    """Four query heads on two key heads throughout; here the cut is before the last layer."""
    bundle = deep_bundle(pruner="fastv", prune_layers=(3,), keep=0.1)
    facts, stages = bundle.manifest.spec, bundle.manifest.pruning.stages
    assert (facts.attention_heads, facts.kv_heads) == (4, 2)
    assert [(stage.run, stage.kept) for stage in stages] == [(range(3), 36), (range(3, 4), 4)]
    mine, theirs = (
        answer(session, pixels, questions)
        for session in (opened(bundle), deep_reference(bundle.manifest.pruning))
    )
    assert mine.every_kept_indices[1].tolist() == theirs.every_kept_indices[1].tolist()
    assert difference(mine, theirs) < 1e-3


def test_keeping_everything_is_the_whole_decoder(
    deep_bundle: DeepBundle, deep_reference: DeepReference, pixels: Pixels, questions: Ids
) -> None:
    """Stages that drop nothing change nothing: the answer of transformers' own forward over all tokens."""
    whole = Pruning(pruner="none", keep=1.0, kept=VISUAL, positions=GAP, seed=0)
    mine = answer(opened(deep_bundle(pruner="fastv", keep=1.0)), pixels, questions)
    assert difference(mine, answer(deep_reference(whole), pixels, questions)) < 1e-3


# Shares that requests choose


@pytest.mark.parametrize("keep", [pytest.param(0.15, marks=pytest.mark.long), 0.25, 1.0])
@pytest.mark.parametrize(
    "pruner", [name if name == "fastv" else pytest.param(name, marks=pytest.mark.long) for name in INSIDE]
)
def test_a_share_that_is_chosen_is_the_share_that_is_built(
    pruner: str, keep: float, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    """Counts that are told with the prompt, and counts that are constants of the graphs."""
    ranged = deep_bundle(pruner=pruner, positions=GAP, keep="0.15:0.25:1.0")
    session, manifest = opened(ranged), ranged.manifest
    counts = keep_counts(manifest.pruning, manifest.spec, of_one_size(pixels, VISUAL), keep)
    assert counts.calls == (None,), "all of them enter the decoder"
    mine = answer(session, pixels, questions, keep_counts=counts)
    built = answer(opened(deep_bundle(pruner=pruner, positions=GAP, keep=keep)), pixels, questions)
    for one, other in zip(mine.every_kept_indices, built.every_kept_indices, strict=True):
        assert one.tolist() == other.tolist()
    assert mine.tokens == built.tokens
    assert difference(mine, built) < 1e-4
    with pytest.raises(InputError, match=r"outside 0\.15 to 1"):
        keep_counts(manifest.pruning, manifest.spec, of_one_size(pixels, VISUAL), 0.1)


# Batches


@pytest.mark.parametrize("pruner", INSIDE)
def test_four_at_once_are_four_alone(
    pruner: str, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    session = opened(deep_bundle(pruner=pruner, positions=GAP))
    together = answer(session, pixels, questions)
    for row in range(4):
        length = int((questions[row] >= 0).sum())
        alone = answer(session, pixels[[row]], questions[[row], :length])
        assert alone.tokens[0] == together.tokens[row]
        for mine, theirs in zip(alone.every_kept_indices, together.every_kept_indices, strict=True):
            assert mine[0].tolist() == theirs[row].tolist()
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert np.abs(a[0] - b[row]).max() < 1e-4


# Slots


@pytest.mark.parametrize("pruner", INSIDE)
def test_every_stage_has_the_slots_of_its_own_tokens(
    pruner: str, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    """Counted by hand from the prompts: T_pre + K_s + T_post; ids by N alone."""
    bundle = deep_bundle(pruner=pruner, positions=GAP)
    session = opened(bundle)
    placement = session.splice(questions, session.encode({"pixel_values": pixels})).placement
    tokens = [[int(token) for token in row if token >= 0] for row in questions]
    text = [len(row) - 1 for row in tokens]
    assert placement.image_slots is not None
    assert placement.image_slots[:, 0, 0].tolist() == [row.index(4) for row in tokens]
    assert placement.next_position.tolist() == [count + VISUAL for count in text]
    for stage, slots in zip(bundle.manifest.pruning.stages, placement.slots_of_stages, strict=True):
        assert slots.tolist() == [count + stage.kept for count in text]
    for row, count in enumerate(text):
        assert placement.position_ids[row, : count + VISUAL].tolist() == list(range(count + VISUAL))
    turn = advance(advance(placement))
    assert [slot.tolist() for slot in turn.stage_write_index] == [
        (slot + 1).tolist() for slot in placement.stage_next_slot
    ]
    assert turn.position_ids[:, 0].tolist() == [count + VISUAL + 1 for count in text]


@pytest.mark.parametrize("pruner", INSIDE)
def test_the_cache_of_every_layer_is_written_where_its_stage_counts(
    pruner: str, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    bundle = deep_bundle(pruner=pruner, positions=GAP)
    session, stages = opened(bundle), bundle.manifest.pruning.stages
    spliced = session.splice(questions, session.encode({"pixel_values": pixels}))
    session.prefill(spliced.embeds, spliced.placement)
    before = {name: array.copy() for name, array in session._cache.views().items()}
    addresses = {name: array.ctypes.data for name, array in session._cache.views().items()}
    turn = advance(spliced.placement)
    session.step(np.array([5, 6, 7, 8]), turn)
    assert {name: array.ctypes.data for name, array in session._cache.views().items()} == addresses
    for stage, slots in zip(stages, (turn.write_index, *turn.stage_write_index), strict=True):
        for layer in stage.run:
            for part in ("key", "value"):
                name = f"past.{layer}.{part}"
                assert before[name].shape == (4, 2, stage.capacity, 16)
                changed = (session._cache.views()[name] != before[name]).any(axis=(1, 3))
                assert [np.flatnonzero(row).tolist() for row in changed] == [[int(slot)] for slot in slots]


@pytest.mark.parametrize("pruner", INSIDE)
def test_a_later_stage_has_no_fewer_slots_to_spare(pruner: str, deep_bundle: DeepBundle) -> None:
    manifest = deep_bundle(pruner=pruner, positions=GAP).manifest
    spare = [stage.capacity - stage.kept for stage in manifest.pruning.stages]
    assert min(spare) == spare[0]
    assert manifest.cache_layout.capacities[0] == manifest.capacity == max(manifest.cache_layout.capacities)
    assert manifest.cache_layout.total_slots(manifest.cache_layout.capacities) == sum(
        tensor.extents("maximum")[2]
        for tensor in manifest.graphs["decode"].spec.inputs
        if tensor.name.endswith(".key")
    )
    mean = sum(stage.kept * stage.layers for stage in manifest.pruning.stages) / manifest.spec.layers
    assert manifest.pruning.mean_kept == mean
    assert manifest.pruning.kept_after_last_stage == 9


# Ids


@pytest.mark.parametrize("policy", [GAP, PositionPolicy.SHIFTED])
def test_survivors_take_their_ids_along_or_are_counted_again(
    policy: PositionPolicy, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    """All ids moved by as much turn every key and change no attention. Later layers see it where survivors keep their ids."""
    session = opened(deep_bundle(pruner="fastv", positions=policy))
    spliced = session.splice(questions, session.encode({"pixel_values": pixels}))
    moved = replace(spliced.placement, position_ids=spliced.placement.position_ids + 7)

    def after(placement: Placement) -> tuple[Ids, list[NDArray[np.float32]]]:
        kept = session.prefill(spliced.embeds, placement).kept_indices[0]
        return kept, [session._cache.views()[f"past.{layer}.key"].copy() for layer in range(4)]

    (kept, keys), (kept_moved, keys_moved) = after(spliced.placement), after(moved)
    assert kept.tolist() == kept_moved.tolist()
    for layer, (one, other) in enumerate(zip(keys, keys_moved, strict=True)):
        for row, slots in enumerate(spliced.placement.slots_of_stages[layer >= 2]):
            change = np.abs(one[row, :, :slots] - other[row, :, :slots]).max(axis=(0, 2))
            if layer < 2 or policy is GAP:
                assert (change > 1e-2).all()
            else:
                assert (change < 1e-3).all()


# Negative controls


@pytest.mark.parametrize("name", [name for name in controls(staged=True) if name != "ids shifted"])
@pytest.mark.parametrize("pruner", INSIDE)
def test_wrong_placements_show_in_the_logits(
    pruner: str, name: str, deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    session = opened(deep_bundle(pruner=pruner, positions=GAP))
    before = np.array([row.tolist().index(4) for row in questions])

    def wrong(placement: Placement, visual: VisualTokens) -> Placement:
        return controls(staged=True)[name](placement, before, runner.counts_of(visual.kept_indices))

    right = answer(session, pixels, questions)
    misled = answer(session, pixels, questions, adjust=wrong)
    first = [float(np.abs(a - b).max()) for a, b in zip(right.logits[:2], misled.logits[:2], strict=True)]
    assert max(first) > 1e-2
    if "slot" in name or "index" in name or "decoding" in name:
        assert first[0] == 0, "the prompt itself is placed rightly"


def test_ids_without_gaps_are_right_where_every_token_enters(
    deep_bundle: DeepBundle, pixels: Pixels, questions: Ids
) -> None:
    """The control that renumbers the prompt changes nothing here, and says so."""
    session = opened(deep_bundle(pruner="fastv", positions=GAP))
    placement = session.splice(questions, session.encode({"pixel_values": pixels})).placement
    renumbered = controls()["ids shifted"](placement, np.zeros(4, np.int64), np.full(4, VISUAL))
    for row, length in enumerate(placement.next_slot):
        assert renumbered.position_ids[row, :length].tolist() == placement.position_ids[row, :length].tolist()
    assert renumbered.next_position.tolist() == placement.next_position.tolist()


# Tracing once


def test_graphs_that_are_taken_for_the_same_are(deep_checkpoint: Path, tiny_options: dict[str, Any]) -> None:
    """Two strategies may have graphs of equal inputs and outputs, and other numbers inside."""
    from gap_export.checkpoint import open_checkpoint
    from gap_export.families import open_family
    from gap_export.plan import plan_for
    from gap_export.recipe.recipe import Recipe

    family = open_family(open_checkpoint(deep_checkpoint))

    def keys(**changes: Any) -> dict[str, Any]:
        recipe = Recipe.model_validate({**tiny_options, "keep": 0.25, **changes})
        sizes = family.spec(recipe)
        components = family.components(sizes, plan_for(recipe, sizes))
        return {each.spec.name: (each.spec.model_dump_json(), each.settings) for each in components}

    one, other = keys(pruner="pyramiddrop"), keys(pruner="sparsevlm")
    assert one["splice"][0] == other["splice"][0]
    assert {name for name in one if one[name] == other[name]} == {"vision", "embed"}
    shifted, permuted = (keys(pruner="fastv", positions=policy) for policy in ("shifted", "permuted"))
    same = {name for name in shifted if shifted[name] == permuted[name]}
    assert same == {"vision", "embed", "decode"}, "what is pruned later is encoded in raster order"
    assert keys(pruner="fastv")["decode"] != shifted["decode"]


# Engines


@pytest.mark.parametrize(
    "pruner", [name if name == "fastv" else pytest.param(name, marks=pytest.mark.long) for name in INSIDE]
)
def test_tensorrt_builds_both_graphs_in_half_precision(
    pruner: str, deep_graph: GraphExporter, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    from gap_export.engine.build import engine_from_graph

    names: tuple[GraphName, ...] = ("prefill", "decode")
    for name in names:
        exported = deep_graph(name, pruner=pruner, precision="fp16", capacity=80)
        engine = engine_from_graph(
            exported.path,
            exported.graph.spec,
            target="tensorrt-rtx",
            compute_capabilities=("8.6",),
            folder=tmp_path,
        )
        assert (tmp_path / engine.file).stat().st_size > 0
