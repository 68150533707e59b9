"""The training code of `clip-shapes`: what counts as named, both losses, and that the tower's patches are the pruners' ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gap_export.boxes.scenes import COLOURS, SHAPES, SIZES, SceneObject, cases, make_scene, queries  # noqa: E402
from training.clip_shapes import data  # noqa: E402
from training.clip_shapes.evaluate import Truth, area_under_curve, survival, truth_of  # noqa: E402
from training.clip_shapes.losses import image_loss, image_scores, patch_loss  # noqa: E402
from training.clip_shapes.model import build_config, build_model, load_checkpoint, save_checkpoint  # noqa: E402
from training.clip_shapes.train import losses  # noqa: E402
from training.clip_shapes.vocabulary import (  # noqa: E402
    ANY,
    BOS,
    CONTEXT,
    EOS,
    TOKEN_ID,
    UNK,
    VOCABULARY,
    build_tokenizer,
    named_kinds,
    text_ids,
)
from training.shapes.data import build_bank, load_bank, owner_map, turn_ids  # noqa: E402
from training.shapes.model import build_model as build_llava  # noqa: E402
from training.shapes.model import build_processor  # noqa: E402

_SEED = 5


@pytest.fixture(scope="module")
def llava():  # type: ignore[no-untyped-def]
    return build_llava(seed=3)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("bank")
    build_bank(folder, scenes=3, queries_per_view=4, seed=_SEED)
    return load_bank(folder)


def _said_of(item: SceneObject, expression: str) -> bool:
    """Whether one of the two halves of an expression fits the object: all its words but the place are the object's."""
    for place in (" on the left", " on the right", " at the top", " at the bottom"):
        expression = expression.removesuffix(place)
    for relation in ("left of", "right of", "above", "below"):
        expression = expression.replace(relation, "|")
    own = {"the", item.shape, item.colour, item.size}
    return any(set(half.split()) <= own for half in expression.split("|"))


def test_every_word_of_the_grammar_has_a_token() -> None:
    tokenizer = build_tokenizer()
    seen: set[str] = set()
    for index in range(60):
        for query in queries(make_scene(_SEED, index).objects):
            ids = tokenizer.encode(query.expression).ids
            assert TOKEN_ID[UNK] not in ids
            assert len(ids) <= CONTEXT
            seen.update(query.expression.split())
    assert seen == set(VOCABULARY) - {UNK, BOS, EOS}


def test_text_survives_the_round_trip_and_stands_between_start_and_end() -> None:
    ids = build_tokenizer().encode("The SMALL red circle, left of the zebra?").ids
    words = ["the", "small", "red", "circle", "left", "of", "the", UNK]
    assert [VOCABULARY[token] for token in ids] == [BOS, *words, EOS]
    assert build_tokenizer().decode(build_tokenizer().encode("the red circle").ids) == "the red circle"


def test_the_end_token_has_the_highest_id_and_is_the_padding() -> None:
    (row,) = text_ids(["the circle"])
    assert len(row) == CONTEXT
    assert row.index(max(row)) == 3
    assert set(row[3:]) == {TOKEN_ID[EOS]} == {max(TOKEN_ID.values())}


@pytest.mark.parametrize(
    ("expression", "kinds"),
    [
        ("the circle", ((0, ANY, ANY), (0, ANY, ANY))),
        ("the small red square on the left", ((1, 0, 0), (1, 0, 0))),
        ("the large triangle above the blue diamond", ((2, ANY, 1), (3, 2, ANY))),
    ],
)
def test_what_an_expression_names(expression: str, kinds: object) -> None:
    assert named_kinds(expression) == kinds


@pytest.mark.parametrize("expression", ["the zebra", "the circle above the square above the diamond"])
def test_a_foreign_expression_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="names"):
        named_kinds(expression)


def test_objects_and_patches_that_are_named() -> None:
    """Against the words themselves, object by object and patch by patch."""
    for index in range(20):
        objects = make_scene(_SEED, index).objects
        kinds = np.zeros((1, 6, 3), np.uint8)  # what is absent looks like a small red circle
        for slot, item in enumerate(objects):
            kinds[0, slot] = (
                SHAPES.index(item.shape),
                COLOURS.index(item.colour),
                SIZES.index(item.size),
            )
        owner = owner_map(objects)
        for query in queries(objects):
            named = np.array([named_kinds(query.expression)])
            fits = data.fitting(kinds, np.array([len(objects)]), named)[0].any(0)
            said = [_said_of(item, query.expression) for item in objects]
            assert fits[0].tolist() == said + [False] * (6 - len(objects))
            shown = data.shows_named(owner[None], fits)[0]
            assert shown.tolist() == [slot != 255 and said[slot] for slot in owner]


def test_the_expression_is_read_back_from_the_bank() -> None:
    for query in queries(make_scene(_SEED, 1).objects):
        row, padding, _ = turn_ids(query.expression, (0.0, 0.0, 9.0, 9.0))
        assert data.expression_of(np.array(row, np.uint8), padding) == query.expression


def test_patches_are_the_normalised_feature_layer(llava) -> None:  # type: ignore[no-untyped-def]
    pixels = np.stack([make_scene(_SEED, index).pixels for index in range(2)])
    inputs = build_processor().image_processor(list(pixels), return_tensors="pt")
    tower, norm = llava.model.vision_tower, llava.model.vision_tower.post_layernorm
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        states = tower(inputs.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    x = states.double().numpy()
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    expected = unit * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
    assert np.abs(data.patch_features(llava, pixels).numpy() - expected).max() < 1e-4


def test_patches_are_kept_until_the_tower_changes(llava, bank, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = np.array(data.cache_patches(llava, bank, tmp_path))
    (tmp_path / "patches.npy").chmod(0o444)
    written = (tmp_path / "patches.npy").stat().st_mtime_ns
    data.cache_patches(llava, bank, tmp_path)
    assert (tmp_path / "patches.npy").stat().st_mtime_ns == written
    (tmp_path / "patches.npy").chmod(0o644)
    with torch.no_grad():
        llava.model.vision_tower.post_layernorm.bias += 1
    assert np.abs(data.cache_patches(llava, bank, tmp_path) - first - 1).max() < 0.01


def test_image_scores_are_means_over_the_best_patches() -> None:
    similarity = np.random.default_rng(0).standard_normal((3, 2, 10))
    expected = np.sort(similarity, axis=-1)[..., -4:].mean(-1)
    assert np.allclose(image_scores(torch.from_numpy(similarity)).numpy(), expected)


def test_image_loss_counts_true_negatives_only() -> None:
    rng = np.random.default_rng(1)
    scores, absent = rng.standard_normal((4, 4)), rng.random((4, 4)) < 0.5
    np.fill_diagonal(absent, False)
    total = 0.0
    for own in range(4):
        top = math.exp(scores[own, own])
        images = sum(math.exp(scores[own, other]) for other in range(4) if absent[own, other])
        texts = sum(math.exp(scores[other, own]) for other in range(4) if absent[other, own])
        total -= math.log(top / (top + images)) + math.log(top / (top + texts))
    loss = image_loss(torch.from_numpy(scores), torch.from_numpy(absent))
    assert loss.item() == pytest.approx(total / 8)
    harder = torch.from_numpy(scores + 9.0 * ~(absent | np.eye(4, dtype=bool)))
    assert image_loss(harder, torch.from_numpy(absent)).item() == pytest.approx(total / 8)


def test_patch_loss_asks_for_every_named_patch() -> None:
    rng = np.random.default_rng(2)
    similarity, named = rng.standard_normal((3, 12)), rng.random((3, 12)) < 0.4
    named[:, 0], named[:, 1] = True, False
    rows = []
    for row in range(3):
        others = sum(math.exp(value) for value in similarity[row][~named[row]])
        each = [
            -math.log(math.exp(value) / (math.exp(value) + others)) for value in similarity[row][named[row]]
        ]
        rows.append(sum(each) / len(each))
    loss = patch_loss(torch.from_numpy(similarity), torch.from_numpy(named))
    assert loss.item() == pytest.approx(sum(rows) / 3)


def test_a_few_steps_lower_the_loss(llava, bank, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pairs = data.pairs_from_bank(bank, data.cache_patches(llava, bank, tmp_path))
    model = build_model(build_config(llava.config.vision_config), seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(10):
        loss, _ = losses(model, pairs, np.random.default_rng(0), weight=1.0, batch=16)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert all(value.grad is not None for value in model.parameters())
    assert history[-1] < 0.8 * history[0]


def test_checkpoint_comes_back(llava, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = build_config(llava.config.vision_config)
    model = build_model(config, seed=4)
    save_checkpoint(model, config, tmp_path)
    for name, value in load_checkpoint(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_truth_knows_the_meant_object() -> None:
    scenes = list(cases(12, _SEED))
    truth = truth_of(scenes, _SEED)
    for index, case in enumerate(scenes):
        objects = make_scene(_SEED, index).objects
        assert objects[truth.target[index]].box == case.box
        said = [_said_of(item, case.expression) for item in objects]
        assert truth.named[index, : len(objects)].tolist() == said


def test_survival_and_area_of_a_small_image() -> None:
    owner = np.full((1, 144), 255, np.uint8)
    owner[0, :4], owner[0, 4:6] = 0, 1
    truth = Truth(owner, np.array([0]), np.array([[True, True, False, False, False, False]]))
    scores = torch.arange(0.0, -144.0, -1.0)[None]  # patch 0 first
    assert area_under_curve(scores, truth) == 1.0
    assert area_under_curve(-scores, truth) == 0.0
    assert area_under_curve(0 * scores, truth) == 0.5
    assert survival(scores, truth, 1) == {"one": 1.0, "half": 0.0, "named half": 0.0}
    assert survival(scores, truth, 2) == {"one": 1.0, "half": 1.0, "named half": 0.5}
    assert survival(scores, truth, 5) == {"one": 1.0, "half": 1.0, "named half": 1.0}
    assert survival(-scores, truth, 5) == {"one": 0.0, "half": 0.0, "named half": 0.0}
