"""The splice where images differ in how many visual tokens they have, with ids that count and ids of M-RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from torch import nn

from gap_export import linter
from gap_export.bundle.spec import GraphSpec
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.splice import Splice
from gap_export.positions import PositionPolicy, place
from tests.unpruned import gather_ids

from .exporting import splice_spec, write_splice

IMAGE, PAD, VOCABULARY, HIDDEN = 9, -1, 20, 4
GRIDS = np.array([[3, 5], [4, 2], [1, 7]])
KEPT = ((0, 4, 5, 14), (1, 6), (3,))
TEXT = ((2, 3), (0, 4), (3, 1))
POLICIES = (PositionPolicy.GAP, PositionPolicy.SHIFTED)


@pytest.fixture(scope="module")
def table() -> Any:
    return np.random.default_rng(0).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)


@pytest.fixture(scope="module", params=[(p, m) for p in POLICIES for m in (False, True)], ids=str)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, table: Any
) -> tuple[PositionPolicy, bool, Path, GraphSpec]:
    policy, mrope = request.param
    with fake_mode():
        embedding = nn.Embedding(VOCABULARY, HIDDEN)
    splice = Splice(embedding, image_token_id=IMAGE, visual_tokens=None, policy=policy, mrope=mrope)
    graph = splice_spec(policy, mrope=mrope, hidden=HIDDEN)
    path = write_splice(splice, graph, table, tmp_path_factory.mktemp("splice"))
    return policy, mrope, path, graph


def feeds(rows: list[int]) -> dict[str, Any]:
    """Rows of the example, padded to the longest among them."""
    longest, most = max(sum(TEXT[row]) + 1 for row in rows), max(len(KEPT[row]) for row in rows)
    rng = np.random.default_rng(1)
    ids = np.full((len(rows), longest), PAD, np.int64)
    kept = np.full((len(rows), most), -1, np.int64)
    for place_, row in enumerate(rows):
        before, after = TEXT[row]
        ids[place_, : before + 1 + after] = [*range(1, 1 + before), IMAGE, *range(10, 10 + after)]
        kept[place_, : len(KEPT[row])] = KEPT[row]
    return {
        "input_ids": ids,
        "visual_embeds": rng.normal(size=(len(rows), most, HIDDEN)).astype(np.float32),
        "kept_indices": kept,
        "kept_counts": np.array([len(KEPT[row]) for row in rows]),
        "image_grid": GRIDS[rows],
        "visual_counts": GRIDS[rows].prod(axis=1),
    }


def ids_by_crossing_out(row: int, policy: PositionPolicy, *, mrope: bool) -> tuple[Any, int]:
    """Number the unpruned prompt and cross out what was pruned; baselines number what is left afresh, in all rows alike."""
    (before, after), (rows, columns), kept = TEXT[row], GRIDS[row], KEPT[row]
    if policy is not PositionPolicy.GAP:
        length = before + len(kept) + after
        ids = np.arange(length)
        return (np.stack([ids] * 3) if mrope else ids), length
    surviving = [*range(before), *(before + k for k in kept)]
    surviving += range(before + rows * columns, before + rows * columns + after)
    if not mrope:
        return np.array(surviving), before + rows * columns + after
    whole = [[j] * 3 for j in range(before)]
    whole += [[before, before + r, before + c] for r in range(rows) for c in range(columns)]
    whole += [[before + max(rows, columns) + j] * 3 for j in range(after)]
    return gather_ids(np.array(whole).T, np.array(surviving))


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [1, 0]], ids=str)
def test_images_of_different_sizes(
    exported: tuple[PositionPolicy, bool, Path, GraphSpec], table: Any, rows: list[int]
) -> None:
    policy, mrope, path, graph = exported
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = feeds(rows)
    outputs = session.run(None, {tensor.name: given[tensor.name] for tensor in graph.inputs})
    embeds, position_ids, next_position, next_slot = outputs
    expected = place(
        given["kept_indices"],
        text_before=np.array([TEXT[row][0] for row in rows]),
        text_after=np.array([TEXT[row][1] for row in rows]),
        visual_tokens=given["visual_counts"],
        policy=policy,
        grids=given["image_grid"] if mrope else None,
    )
    assert next_position.tolist() == expected.next_position.tolist()
    assert next_slot.tolist() == expected.next_slot.tolist()
    for number, row in enumerate(rows):
        (before, after), kept = TEXT[row], len(KEPT[row])
        length = before + kept + after
        ids, following = ids_by_crossing_out(row, policy, mrope=mrope)
        assert position_ids[..., number, :length].tolist() == ids.tolist()
        assert expected.position_ids[..., number, :length].tolist() == ids.tolist()
        assert (next_position[number], next_slot[number]) == (following, length)
        words = given["input_ids"][number]
        text_before, text_after = table[words[:before]], table[words[before + 1 : before + 1 + after]]
        naive = np.concatenate([text_before, given["visual_embeds"][number, :kept], text_after])
        assert np.array_equal(embeds[number, :length], naive)


def test_ids_come_from_the_kept_indices(exported: tuple[PositionPolicy, bool, Path, GraphSpec]) -> None:
    policy, _, path, _ = exported
    assert linter.lint_graph(path, kind="splice", strict=True, policy=policy).verdict.survives


def test_tensorrt_rtx_builds_it(
    exported: tuple[PositionPolicy, bool, Path, GraphSpec], tmp_path: Path
) -> None:
    from gap_export.engine.build import engine_from_graph

    policy, mrope, path, graph = exported
    if policy is PositionPolicy.GAP and mrope:  # the one with a division
        engine = engine_from_graph(
            path, graph, target="tensorrt-rtx", compute_capabilities=("8.9",), folder=tmp_path
        )
        assert (tmp_path / engine.file).is_file()
