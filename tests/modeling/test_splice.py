"""The splice, as a torch module and as the exported graph in ONNX Runtime, against `positions.place` and plain Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.graph import passes, trace
from gap_export.modeling.components import Component
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.splice import Embed, Splice
from gap_export.positions import Ids, PositionPolicy, place
from tests.exported import GraphExporter

IMAGE, PAD = 9, -1
VISUAL, KEPT, VOCABULARY, HIDDEN, LONGEST = 12, 3, 20, 4, 10
OUTPUTS = ["inputs_embeds", "position_ids", "next_position", "next_slot"]

SpliceOutputs = tuple[NDArray[np.float32], Ids, Ids, Ids]
RunSplice = Callable[[Ids, NDArray[np.float32], Ids], SpliceOutputs]


def table() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)


def module(policy: PositionPolicy) -> Splice:
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    with torch.no_grad():
        embedding.weight.copy_(torch.from_numpy(table()))
    return Splice(embedding, image_token_id=IMAGE, visual_tokens=VISUAL, policy=policy).eval()


def as_torch(policy: PositionPolicy) -> RunSplice:
    splice = module(policy)

    def run(input_ids: Ids, visual: NDArray[np.float32], kept: Ids) -> SpliceOutputs:
        with torch.inference_mode():
            out = splice(torch.from_numpy(input_ids), torch.from_numpy(visual), torch.from_numpy(kept))
        embeds, ids, position, slot = (tensor.numpy() for tensor in out)
        return embeds, ids, position, slot

    return run


def spec_of(kept: int) -> GraphSpec:
    batch, text = (
        Dim(name="batch", minimum=1, optimum=1, maximum=4),
        Dim(name="text", minimum=2, optimum=LONGEST, maximum=LONGEST),
    )
    spliced = Dim(name="spliced", minimum=kept + 1, optimum=LONGEST - 1 + kept, maximum=LONGEST - 1 + kept)

    def tensor(name: str, dtype: str, *shape: int | Dim) -> TensorSpec:
        return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})

    return GraphSpec(
        name="splice",
        inputs=(
            tensor("input_ids", "int64", batch, text),
            tensor("visual_embeds", "float32", batch, kept, HIDDEN),
            tensor("kept_indices", "int64", batch, kept),
        ),
        outputs=(
            tensor("inputs_embeds", "float32", batch, spliced, HIDDEN),
            tensor("position_ids", "int64", batch, spliced),
            tensor("next_position", "int64", batch),
            tensor("next_slot", "int64", batch),
        ),
    )  # fmt: skip


def as_graph(policy: PositionPolicy, kept: int, folder: Path) -> RunSplice:
    """The same module, traced with a fake table, written, given the table as a plain initializer, run."""
    with fake_mode():
        embedding = nn.Embedding(VOCABULARY, HIDDEN)
    splice = Splice(embedding, image_token_id=IMAGE, visual_tokens=VISUAL, policy=policy).eval()
    component = Component(module=splice, spec=spec_of(kept), weight_key=lambda name: name)
    model = trace.graph_from_component(component)
    for name in [
        name for name, value in model.graph.initializers.items() if trace.is_fake(value.const_value)
    ]:
        model.graph.initializers[name].const_value = ir.tensor(table(), name=name)
    passes.simplify(model)
    passes.write_graph(model, component.spec, folder / "splice.onnx")
    session = ort.InferenceSession(str(folder / "splice.onnx"), providers=["CPUExecutionProvider"])
    # Where nothing is pruned both counters are equal; clean-up may merge what computes them, not the outputs.
    assert [value.name for value in session.get_outputs()] == OUTPUTS

    def run(input_ids: Ids, visual: NDArray[np.float32], kept_BK: Ids) -> SpliceOutputs:
        feeds = {"input_ids": input_ids, "visual_embeds": visual, "kept_indices": kept_BK}
        names = {value.name for value in session.get_inputs()}
        embeds, ids, position, slot = session.run(None, {k: v for k, v in feeds.items() if k in names})
        return embeds, ids, position, slot

    return run


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PositionPolicy, int], RunSplice]:
    built: dict[tuple[PositionPolicy, int], RunSplice] = {}

    def graph(policy: PositionPolicy, kept: int) -> RunSplice:
        if (policy, kept) not in built:
            built[policy, kept] = as_graph(policy, kept, tmp_path_factory.mktemp("splice"))
        return built[policy, kept]

    return graph


def check(
    run: RunSplice, rows: list[tuple[int, int]], kept: Ids, policy: PositionPolicy, seed: int = 0
) -> None:
    """Hold one batch, given as (text before, text after) per row, against Python."""
    rng = np.random.default_rng(seed)
    words = [int(word) for word in range(VOCABULARY) if word != IMAGE]
    lines = [
        [*rng.choice(words, before).tolist(), IMAGE, *rng.choice(words, after).tolist()]
        for before, after in rows
    ]
    input_ids = np.full((len(rows), max(map(len, lines))), PAD, np.int64)
    for row, line in enumerate(lines):
        input_ids[row, : len(line)] = line
    visual = rng.normal(size=(*kept.shape, HIDDEN)).astype(np.float32)

    embeds, position_ids, next_position, next_slot = run(input_ids, visual, kept)

    expected = place(
        kept,
        text_before=np.array([before for before, _ in rows]),
        text_after=np.array([after for _, after in rows]),
        visual_tokens=VISUAL,
        policy=policy,
    )
    embedding = table()
    assert embeds.shape == (len(rows), input_ids.shape[1] - 1 + kept.shape[1], HIDDEN)
    for row, (before, after) in enumerate(rows):
        length = before + kept.shape[1] + after
        naive = [embedding[id_] for id_ in lines[row][:before]]
        naive += list(visual[row])
        naive += [embedding[id_] for id_ in lines[row][before + 1 :]]
        assert np.array_equal(embeds[row, :length], np.stack(naive)), f"row {row}"
        assert position_ids[row, :length].tolist() == expected.position_ids[row, :length].tolist()
        assert expected.next_slot[row] == length
    assert next_position.tolist() == expected.next_position.tolist()
    assert next_slot.tolist() == expected.next_slot.tolist()


def some_kept(rng: np.random.Generator, rows: int, kept: int, policy: PositionPolicy) -> Ids:
    chosen = np.stack([rng.permutation(VISUAL)[:kept] for _ in range(rows)]).astype(np.int64)
    return np.sort(chosen, axis=1) if policy.keeps_raster_order else chosen


RAGGED = {
    "one row": [(3, 4)],
    "same length, different place": [(3, 4), (4, 3)],
    "ragged": [(5, 4), (2, 1), (3, 6)],
    "image first": [(0, 5), (0, 1)],
    "image last": [(5, 0), (1, 0)],
    "first and last together": [(0, 6), (6, 0), (0, 1), (1, 0)],
    "as short as can be": [(0, 1)],
    "image last and as short as can be": [(1, 0)],
}


@pytest.mark.parametrize("policy", PositionPolicy)
@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("form", ["torch", "graph"])
def test_ragged_batches(
    form: str,
    rows: list[tuple[int, int]],
    policy: PositionPolicy,
    graphs: Callable[[PositionPolicy, int], RunSplice],
) -> None:
    run = as_torch(policy) if form == "torch" else graphs(policy, KEPT)
    check(run, rows, some_kept(np.random.default_rng(5), len(rows), KEPT, policy), policy)


@pytest.mark.parametrize("policy", [PositionPolicy.GAP, PositionPolicy.SHIFTED])
@pytest.mark.parametrize("kept", [1, VISUAL])
@pytest.mark.parametrize("form", ["torch", "graph"])
def test_one_token_kept_and_all_kept(
    form: str, kept: int, policy: PositionPolicy, graphs: Callable[[PositionPolicy, int], RunSplice]
) -> None:
    run = as_torch(policy) if form == "torch" else graphs(policy, kept)
    rows = [(2, 3), (0, 1), (4, 0)]
    check(run, rows, some_kept(np.random.default_rng(6), len(rows), kept, policy), policy)


@given(data=st.data())
@settings(max_examples=60)
def test_torch_splice_is_placement_and_concatenation(data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(PositionPolicy))
    kept = data.draw(st.integers(1, VISUAL))
    row = st.tuples(st.integers(0, 5), st.integers(0, 4)).filter(lambda pair: sum(pair) >= 1)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    check(
        as_torch(policy), rows, some_kept(np.random.default_rng(seed), len(rows), kept, policy), policy, seed
    )


def test_a_row_does_not_see_its_neighbours(graphs: Callable[[PositionPolicy, int], RunSplice]) -> None:
    run = graphs(PositionPolicy.GAP, KEPT)
    rng = np.random.default_rng(0)
    ids = np.array([[1, 2, IMAGE, 3], [IMAGE, 4, PAD, PAD]], np.int64)
    visual = rng.normal(size=(2, KEPT, HIDDEN)).astype(np.float32)
    kept = np.array([[0, 5, 11], [1, 2, 3]])
    together, alone = run(ids, visual, kept), run(ids[1:, :2], visual[1:], kept[1:])
    length = 1 + KEPT
    assert np.array_equal(together[0][1, :length], alone[0][0, :length])
    assert np.array_equal(together[1][1, :length], alone[1][0, :length])
    assert (together[2][1], together[3][1]) == (alone[2][0], alone[3][0])


def test_embed_is_a_table() -> None:
    embedding = module(PositionPolicy.GAP).embed_tokens
    ids = torch.tensor([[1, 3], [0, 19]])
    assert np.array_equal(Embed(embedding)(ids).detach().numpy(), table()[ids.numpy()])


# The graph inside a bundle, with its weights in the checkpoint's file.


@pytest.mark.parametrize("policy", [PositionPolicy.GAP, PositionPolicy.SHIFTED])
def test_the_splice_of_a_bundle(policy: PositionPolicy, tiny_graph: GraphExporter, ragged_ids: Ids) -> None:
    splice = tiny_graph("splice", positions=str(policy))
    facts, kept = splice.model.spec, splice.plan.pruning.kept
    session = ort.InferenceSession(str(splice.path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    indices = np.sort(np.stack([rng.permutation(facts.visual_tokens)[:kept] for _ in ragged_ids]), axis=1)
    visual = rng.normal(size=(4, kept, facts.hidden_size)).astype(np.float32)
    feeds = {"input_ids": ragged_ids, "visual_embeds": visual}
    if policy is PositionPolicy.GAP:  # a graph that renumbers does not ask which tokens were kept
        feeds["kept_indices"] = indices
    assert {value.name for value in session.get_inputs()} == set(feeds)
    embeds, ids, position, slot = session.run(None, feeds)
    token = splice.model.prompt.image_token_id
    before = np.array([row.tolist().index(token) for row in ragged_ids])
    after = (ragged_ids != PAD).sum(axis=1) - 1 - before
    expected = place(
        indices, text_before=before, text_after=after, visual_tokens=facts.visual_tokens, policy=policy
    )
    for row in range(4):
        length = int(expected.next_slot[row])
        assert ids[row, :length].tolist() == expected.position_ids[row, :length].tolist()
        assert np.array_equal(embeds[row, before[row] : before[row] + kept], visual[row])
    assert position.tolist() == expected.next_position.tolist()
    assert slot.tolist() == expected.next_slot.tolist()
