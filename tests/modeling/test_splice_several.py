"""The splice of prompts with several images, with ids that count and ids of M-RoPE, against a walk through the unpruned prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from gap_export import linter
from gap_export.bundle.spec import GraphSpec
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.splice import SpliceSeveral
from gap_export.positions import PositionPolicy, place
from tests.unpruned import gather_ids

from .exporting import splice_spec, write_splice

IMAGE, PAD, VOCABULARY, HIDDEN, IMAGES, PLANES = 9, -1, 20, 4, 2, 1
GRIDS = np.array([[[3, 5], [2, 2]], [[1, 7], [4, 2]], [[2, 1], [1, 1]]])
KEPT = (((0, 4, 5, 14), (1,)), ((3,), (0, 6, 7)), ((1,), (0,)))
TEXT = ((2, 1, 3), (0, 0, 4), (3, 2, 0))
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
    splice = SpliceSeveral(
        embedding,
        image_token_id=IMAGE,
        visual_tokens=None,
        policy=policy,
        mrope=mrope,
        deepstack_levels=PLANES,
    )
    graph = splice_spec(policy, mrope=mrope, hidden=2 * HIDDEN, per_prompt=(IMAGES,))
    path = write_splice(splice, graph, table, tmp_path_factory.mktemp("splice"))
    return policy, mrope, path, graph


def words_of(row: int) -> list[int]:
    first, middle, last = TEXT[row]
    return [*range(1, 1 + first), IMAGE, *range(5, 5 + middle), IMAGE, *range(10, 10 + last)]


def feeds(rows: list[int]) -> dict[str, Any]:
    """Rows of the example, padded to the longest among them."""
    words = [words_of(row) for row in rows]
    kept = [[index for image in KEPT[row] for index in image] for row in rows]
    ids = np.full((len(rows), max(map(len, words))), PAD, np.int64)
    indices = np.full((len(rows), max(map(len, kept))), -1, np.int64)
    for number in range(len(rows)):
        ids[number, : len(words[number])] = words[number]
        indices[number, : len(kept[number])] = kept[number]
    rng = np.random.default_rng(1)
    return {
        "input_ids": ids,
        "visual_embeds": rng.normal(size=(*indices.shape, 2 * HIDDEN)).astype(np.float32),
        "kept_indices": indices,
        "kept_counts": np.array([[len(image) for image in KEPT[row]] for row in rows]),
        "image_grid": GRIDS[rows],
        "visual_counts": GRIDS[rows].prod(axis=2),
    }


def ids_by_crossing_out(row: int, policy: PositionPolicy, *, mrope: bool) -> tuple[Any, int]:
    """Number the unpruned prompt token by token and cross out what was pruned."""
    whole: list[list[int]] = []
    surviving: list[int] = []
    position = 0
    for part, words in enumerate(TEXT[row]):
        for _ in range(words):
            surviving.append(len(whole))
            whole.append([position] * 3)
            position += 1
        if part == IMAGES:
            break
        rows, columns = GRIDS[row][part]
        for index in range(rows * columns):
            if index in KEPT[row][part]:
                surviving.append(len(whole))
            grid = [position, position + index // columns, position + index % columns]
            whole.append(grid if mrope else [position + index] * 3)
        position += max(rows, columns) if mrope else rows * columns
    if policy is not PositionPolicy.GAP:
        ids = np.arange(len(surviving))
        return (np.stack([ids] * 3) if mrope else ids), len(surviving)
    gathered, following = gather_ids(np.array(whole).T, np.array(surviving))
    assert position >= following  # (equal, unless the prompt ends with an image)
    return (gathered if mrope else gathered[0]), position


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [1, 0]], ids=str)
def test_two_images_of_different_sizes(
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
        text_after=np.array([TEXT[row][2] for row in rows]),
        between=np.array([[TEXT[row][1]] for row in rows]),
        kept_counts=given["kept_counts"],
        visual_tokens=given["visual_counts"],
        policy=policy,
        grids=given["image_grid"] if mrope else None,
    )
    assert next_position.tolist() == expected.next_position.tolist()
    assert next_slot.tolist() == expected.next_slot.tolist()
    for number, row in enumerate(rows):
        length = sum(TEXT[row]) + sum(map(len, KEPT[row]))
        ids, following = ids_by_crossing_out(row, policy, mrope=mrope)
        assert position_ids[..., number, :length].tolist() == ids.tolist()
        assert expected.position_ids[..., number, :length].tolist() == ids.tolist()
        assert (next_position[number], next_slot[number]) == (following, length)
        visual = iter(given["visual_embeds"][number])
        naive = []
        counts = iter(map(len, KEPT[row]))
        for word in words_of(row):
            if word == IMAGE:
                naive += [next(visual) for _ in range(next(counts))]
            else:
                naive.append(np.concatenate([table[word], np.zeros(HIDDEN, np.float32)]))
        assert np.array_equal(embeds[number, :length], np.array(naive))


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


@pytest.mark.parametrize("rows", [[0, 1, 2], [2]], ids=str)
def test_where_every_image_lies(rows: list[int]) -> None:
    """For masks that look at images: slots of the kept tokens, counted from the beginning of the row."""
    embedding = nn.Embedding(VOCABULARY, 2 * HIDDEN)
    splice = SpliceSeveral(
        embedding,
        image_token_id=IMAGE,
        visual_tokens=None,
        policy=PositionPolicy.GAP,
        gives_image_slots=True,
    )
    given = {name: torch.from_numpy(array) for name, array in feeds(rows).items() if name != "image_grid"}
    slots = splice(**given)[-1]
    for number, row in enumerate(rows):
        (before, between, _), (first, second) = TEXT[row], map(len, KEPT[row])
        start = before + first + between
        assert slots[number].tolist() == [[before, before + first], [start, start + second]]
    expected = place(
        given["kept_indices"].numpy(),
        text_before=np.array([TEXT[row][0] for row in rows]),
        text_after=np.array([TEXT[row][2] for row in rows]),
        between=np.array([[TEXT[row][1]] for row in rows]),
        kept_counts=given["kept_counts"].numpy(),
        visual_tokens=given["visual_counts"].numpy(),
        policy=PositionPolicy.GAP,
    )
    assert np.array_equal(expected.image_slots, slots.numpy())
