"""The training code of `llava-shapes`: its fast forward passes are the transformers modules, its targets are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gap_export.boxes.scenes import SceneObject, make_scene  # noqa: E402
from training.shapes.data import ANSWER_LEN, QUESTION_LEN, build_bank, load_bank, owner_map, turn_ids  # noqa: E402
from training.shapes.decoder import Alone, FastDecoder  # noqa: E402
from training.shapes.evaluate import answer, box_of, features_and_scores, iou, kind_of  # noqa: E402
from training.shapes.losses import soft_targets  # noqa: E402
from training.shapes.model import PATCHES, build_model, build_processor  # noqa: E402
from training.shapes.tower import shifted_positions, tower_forward  # noqa: E402
from training.shapes.vocabulary import (  # noqa: E402
    PROMPT,
    TOKEN_ID,
    answer_ids,
    build_tokenizer,
    prefix_ids,
    question_ids,
)

_BOX = (12.0, 31.0, 48.0, 67.0)
_EXPRESSIONS = ("the red circle", "the small red circle left of the blue square", "the circle at the top")


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return build_model(seed=3)


def test_prompt_splits_into_the_ids_that_training_uses() -> None:
    tokenizer = build_tokenizer()
    for expression in _EXPRESSIONS:
        ids = tokenizer.encode(PROMPT.format(expression=expression)).ids
        assert ids == [*prefix_ids(), TOKEN_ID["<image>"], *question_ids(expression)]


def test_answer_survives_the_round_trip_through_text() -> None:
    tokenizer = build_tokenizer()
    ids = answer_ids((12, 3, 50, 71))
    assert tokenizer.decode(ids) == "[0.12, 0.03, 0.50, 0.71]"
    assert tokenizer.encode("[0.12, 0.03, 0.50, 0.71]").ids[1:] == ids[:-1]


def test_unknown_words_and_capitals() -> None:
    ids = build_tokenizer().encode("The RED zebra?").ids
    assert ids == [TOKEN_ID[word] for word in ("<s>", "the", "red", "<unk>", "?")]


def test_fast_tower_is_the_clip_module(model) -> None:  # type: ignore[no-untyped-def]
    pixels = np.stack([make_scene(5, index).pixels for index in range(3)])
    with torch.no_grad():
        fast, pooled = tower_forward(model, torch.from_numpy(pixels), torch.zeros(3, 2, dtype=torch.long))
        inputs = build_processor().image_processor(list(pixels), return_tensors="pt")
        slow = model.model.vision_tower(inputs.pixel_values, output_hidden_states=True)
    assert (fast - slow.hidden_states[-2]).abs().max() < 0.1  # bfloat16 against float32, values up to 5
    assert (pooled - slow.pooler_output).abs().max() < 0.1


def test_shift_wraps_around() -> None:
    places = shifted_positions(torch.tensor([[0, 0], [1, 2]])) - 1
    assert places[0].tolist() == list(range(PATCHES))
    assert places[1, 0] == 14
    assert sorted(places[1].tolist()) == list(range(PATCHES))


def test_fast_decoder_is_the_llama_module(model) -> None:  # type: ignore[no-untyped-def]
    decoder = FastDecoder(model, prefix_ids(), QUESTION_LEN, ANSWER_LEN)
    rows = [turn_ids(expression, _BOX) for expression in _EXPRESSIONS]
    turns = torch.tensor([[row for row, _, _ in rows]] * 2)
    padding = torch.tensor([[padding for _, padding, _ in rows]] * 2)
    features = torch.randn(2, PATCHES, 128, generator=torch.Generator().manual_seed(1))
    start = torch.tensor([21, 60, 100])
    with torch.no_grad():
        output = decoder(features, turns, padding, None, Alone(turns[0], padding[0], start))
        visual = model.model.multi_modal_projector(features)
        embed = model.get_input_embeddings()
        prefix = embed(torch.tensor(prefix_ids()))
        for sample in range(2):
            place = 21 + PATCHES
            for number in range(len(rows)):
                ids = turns[sample, number, padding[sample, number] :]
                text = place + torch.arange(len(ids))
                for between, positions, fast in (
                    ([visual[sample]], [torch.arange(21 + PATCHES), text], output.logits[sample, number]),
                    (
                        [],
                        [torch.arange(21), start[number] + torch.arange(len(ids))],
                        output.alone_logits[number],
                    ),
                ):
                    inputs = torch.cat([prefix, *between, embed(ids)])[None]
                    slow = model(
                        inputs_embeds=inputs,
                        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
                        position_ids=torch.cat(positions)[None],
                    ).logits[0, -len(fast) :]
                    assert (fast - slow).abs().max() < 0.02 * slow.abs().max()
                place += len(ids) + 3  # </s> and the next "USER:"


def test_soft_targets_are_distributions_around_the_right_token() -> None:
    table = soft_targets()
    assert torch.allclose(table.sum(-1), torch.ones(len(table)), atol=1e-5)
    assert (table.argmax(-1) == torch.arange(len(table))).all()


def test_bank_repeats_and_mirrors(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_bank(tmp_path / name, scenes=3, queries_per_view=4, seed=8)
    first, second = load_bank(tmp_path / "a"), load_bank(tmp_path / "b")
    assert np.array_equal(first.turns, second.turns)
    assert np.array_equal(first.pixels, second.pixels)
    views = np.array([0, 1])
    plain, mirrored = first.view_pixels(views)
    assert np.array_equal(plain[:, ::-1], mirrored)
    assert np.array_equal(first.owner[0].reshape(12, 12)[:, ::-1], first.owner[1].reshape(12, 12))
    assert first.boxes[0, 0, 0] == 96 - first.boxes[1, 0, 2]


def test_owner_map_gives_every_object_a_patch() -> None:
    item = SceneObject("circle", "red", "small", (2, 2, 16, 16))
    neighbours = (
        item,
        replace(item, box=(18, 2, 32, 16)),
        replace(item, shape="triangle", box=(40, 40, 53, 53)),
    )
    owner = owner_map(neighbours)
    assert set(owner.tolist()) == {0, 1, 2, 255}


def test_keeping_everything_is_not_pruning(model) -> None:  # type: ignore[no-untyped-def]
    pixels = make_scene(5, 0).pixels[None]
    visual, scores = features_and_scores(model, pixels)
    assert scores.shape == (1, PATCHES)
    assert 0 < scores.sum() < 1  # CLS looks at itself too
    question = torch.tensor([question_ids("the red circle")])
    kept = torch.arange(PATCHES)[None]
    assert torch.equal(
        answer(model, visual, kept, question, "gap"), answer(model, visual, kept, question, "shifted")
    )


def test_boxes_are_read_strictly() -> None:
    tokens = np.array(answer_ids((25, 50, 75, 99)))
    box = box_of(tokens)
    assert box is not None
    assert iou(box, (24.0, 48.0, 72.0, 95.04)) == pytest.approx(1.0)
    tokens[2] = TOKEN_ID["?"]
    assert box_of(tokens) is None
    assert iou(None, (0.0, 0.0, 1.0, 1.0)) < 0
    assert iou((5.0, 5.0, 1.0, 1.0), (0.0, 0.0, 9.0, 9.0)) == 0.0


def test_kind_is_read_from_the_words() -> None:
    assert kind_of("the red circle") == "attributes"
    assert kind_of("the circle on the left") == "location"
    assert kind_of("the circle left of the blue square") == "relation"
    assert kind_of("the circle below the blue square") == "relation"
