"""MiniGPT-v2: a small random checkpoint in its published layout, held against plain torch written from its description."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gap_export.bundle.folder import Bundle
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError
from gap_export.families import open_family
from gap_export.inputs.square import fit
from gap_export.pipeline.build import build_bundle
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.torch.staged import open_reference
from gap_export.runtime.torch.text_reference import EmbeddingReference
from tests.families.both_ways import assert_equal_both_ways
from tests.families.plain_answers import (
    EXPRESSIONS,
    IMAGES,
    Bundles,
    PlainAnswer,
    asked,
    assert_answers,
    difference,
)
from tests.families.plain_models import EvaTower, Llama, llama_shapes, random_weights, spliced
from tests.families.reduced import reduced
from tests.families.small_llama import write_tokenizer

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH, LAYERS, HEADS = 64, 64, 2, 4
LLAMA = {"width": WIDTH, "hidden": 96, "layers": LAYERS, "heads": HEADS, "kv_heads": HEADS}
EVA_WIDTH, BLOCKS, PATCH, OWN_SIDE = 2 * 88, 2, 56, 4
SIDE = 448 // PATCH
ROWS, COLUMNS = SIDE, SIDE // 4
KEPT, NEW = 5, 20
PROMPT = "<s> USER where <Img> <ImageHere> </Img> is {expression} ? ASSISTANT"
CONFIG = reduced("meta-llama/Llama-2-7b-chat-hf", "minigpt_v2")[0]
"""Of the language model, as published, but for sizes."""
LOW_RANK = "llama_model.base_model.model.model.layers"


def eva_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, EVA_WIDTH),
        "pos_embed": (1, 1 + OWN_SIDE**2, EVA_WIDTH),
        "patch_embed.proj.weight": (EVA_WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (EVA_WIDTH,),
        "norm.weight": (EVA_WIDTH,),
        "norm.bias": (EVA_WIDTH,),
    }
    for number in range(BLOCKS):
        name = f"blocks.{number}"
        shapes |= {
            f"{name}.norm1.weight": (EVA_WIDTH,),
            f"{name}.norm1.bias": (EVA_WIDTH,),
            f"{name}.attn.qkv.weight": (3 * EVA_WIDTH, EVA_WIDTH),
            f"{name}.attn.q_bias": (EVA_WIDTH,),
            f"{name}.attn.v_bias": (EVA_WIDTH,),
            f"{name}.attn.proj.weight": (EVA_WIDTH, EVA_WIDTH),
            f"{name}.attn.proj.bias": (EVA_WIDTH,),
            f"{name}.norm2.weight": (EVA_WIDTH,),
            f"{name}.norm2.bias": (EVA_WIDTH,),
            f"{name}.mlp.fc1.weight": (96, EVA_WIDTH),
            f"{name}.mlp.fc1.bias": (96,),
            f"{name}.mlp.fc2.weight": (EVA_WIDTH, 96),
            f"{name}.mlp.fc2.bias": (EVA_WIDTH,),
        }
    return shapes


def low_rank_shapes(spelling: str, rank: int = 64) -> dict[str, tuple[int, ...]]:
    names = [f"{LOW_RANK}.{n}.self_attn.{part}_proj" for n in range(LAYERS) for part in "qv"]
    return {
        f"{name}.{spelling.format(half)}": shape
        for name in names
        for half, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank)))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minigpt")


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    own = random_weights({"llama_proj.weight": (WIDTH, 4 * EVA_WIDTH), "llama_proj.bias": (WIDTH,)}, seed=1)
    eva = random_weights(eva_shapes(), seed=2)
    base = random_weights(llama_shapes(vocabulary=VOCABULARY, **LLAMA), seed=3)
    low_rank = random_weights(low_rank_shapes("lora_{}.weight"), seed=4)
    return {"own": own, "eva": eva, "base": base, "low_rank": low_rank}


@pytest.fixture(scope="module")
def places(folder: Path, weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, Path]:
    """checkpoint (a folder with one .pth), the tower (a .pth), the language model (Hugging Face layout)."""
    checkpoint, base = folder / "minigpt", folder / "llama-2"
    for target in (checkpoint, base):
        target.mkdir()
    trained = {**weights["own"], **weights["low_rank"]}
    torch.save({"model": trained, "optimizer": {"lr": 1e-5}, "epoch": 34}, checkpoint / "stage3.pth")
    torch.save(weights["eva"], folder / "eva_vit_g.pth")
    save_file(weights["base"], base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(base, ["<Img>", "</Img>"])
    return {"checkpoint": checkpoint, "vision_tower": folder / "eva_vit_g.pth", "base": base}


@pytest.fixture(scope="module")
def options(places: dict[str, Path]) -> dict[str, Any]:
    given = {name: str(path) for name, path in places.items()}
    return {"name": "small", "prompt": PROMPT, "max_new_tokens": NEW, "max_text": 24, "max_batch": 4, "keep": KEPT / 16, **given}  # fmt: skip


@pytest.fixture(scope="module")
def build(options: dict[str, Any], folder: Path) -> Bundles:
    return Bundles(options, folder / "bundles")


def positions_by_hand(table: torch.Tensor) -> torch.Tensor:
    """Bicubic with a = -0.75 and half-pixel centres, edges repeated, as torch documents it; along rows, then columns."""

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    spread = torch.zeros(SIDE, OWN_SIDE)
    for place in range(SIDE):
        centre = (place + 0.5) * OWN_SIDE / SIDE - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            spread[place, min(max(source, 0), OWN_SIDE - 1)] += weight(centre - source)
    grid = table[0, 1:].reshape(OWN_SIDE, OWN_SIDE, -1)
    return torch.cat([table[0, :1], torch.einsum("yr,xc,rce->yxe", spread, spread, grid).flatten(0, 1)])[None]


def plain_answers(
    weights: dict[str, dict[str, torch.Tensor]],
    bundle: Bundle,
    *,
    gap: bool = True,
    merged: bool = True,
    in_order: bool = True,
) -> list[PlainAnswer]:
    """Of every question; wrong on purpose where asked to be."""
    base = dict(weights["base"])
    for name, a in weights["low_rank"].items():
        if merged and "lora_A" in name:
            own = name.removeprefix("llama_model.base_model.model.").replace("lora_A.", "")
            base[own] = base[own] + 16 / 64 * weights["low_rank"][name.replace("lora_A", "lora_B")] @ a
    decoder = Llama(base, LAYERS, HEADS, HEADS, CONFIG["rms_norm_eps"], 10000.0)
    eva = EvaTower(
        {**weights["eva"], "pos_embed": positions_by_hand(weights["eva"]["pos_embed"])}, 2, PATCH, BLOCKS
    )
    grounder = Grounder(bundle)
    answers = []
    prompts = grounder.prompts(EXPRESSIONS, NEW).input_ids
    for image, ids in zip(IMAGES, prompts, strict=True):
        hidden, attention = eva.run(torch.from_numpy(grounder.prepare([image]).calls[0]["pixel_values"][0]))
        hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])[1:]
        order = torch.arange(SIDE**2)
        if not in_order:  # squares of two by two instead of four in a row
            order = order.view(SIDE // 2, 2, SIDE // 2, 2).permute(0, 2, 1, 3).flatten()
        tokens = torch.stack([torch.cat([hidden[patch] for patch in four]) for four in order.view(-1, 4)])
        scores = torch.stack([attention[four].mean() for four in order.view(-1, 4)])
        kept = sorted(scores.topk(KEPT).indices.tolist())
        projected = tokens[kept] @ weights["own"]["llama_proj.weight"].T + weights["own"]["llama_proj.bias"]
        row = [int(id_) for id_ in ids if id_ >= 0]
        embeds, positions, following = spliced(
            decoder, row, bundle.manifest.prompt.image_token_id, projected, kept, ROWS * COLUMNS
        )
        if not gap:
            positions, following = list(range(len(embeds))), len(embeds)
        answers.append((kept, positions, *decoder.answer(embeds, positions, following, NEW)))
    return answers


def test_graphs_are_the_model(
    build: Bundles, weights: dict[str, dict[str, torch.Tensor]], places: dict[str, Path]
) -> None:
    """Every graph in ONNX Runtime, gapped ids, twenty tokens, one image and two; and the reference of `validate`."""
    bundle = build()
    truth = plain_answers(weights, bundle)
    session = open_session(bundle, "onnxruntime", threads=1)
    for rows in ([0], [1], [0, 1]):
        assert_answers(asked(session, bundle, rows, NEW), [truth[row] for row in rows])
    parts = {name: places[name] for name in ("base", "vision_tower")}
    reference = open_reference("minigpt_v2", places["checkpoint"], bundle.manifest.pruning, parts=parts)
    assert_answers(asked(reference, bundle, [0, 1], NEW), truth)


@pytest.mark.parametrize("wrong", ["gap", "merged", "in_order"])
def test_what_is_wrong_shows(wrong: str, build: Bundles, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Renumbered ids, updates left out, squares of patches: each is far from the model."""
    right, other = plain_answers(weights, build()), plain_answers(weights, build(), **{wrong: False})
    assert difference(right, other) > 1e-2


def test_facts(build: Bundles) -> None:
    manifest = build().manifest
    assert (manifest.family, manifest.spec.grid, manifest.spec.visual_tokens) == ("minigpt_v2", (8, 2), 16)
    assert (manifest.box.codec, manifest.box.frame) == ("minigpt_v2", "image")
    assert manifest.prompt.image_token_id == VOCABULARY
    ids = Grounder(build()).prompts(EXPRESSIONS, NEW).input_ids[0].tolist()
    assert ids[:2] == [1, 1], "one BOS from the template, one from the tokenizer"


def test_images_are_stretched(build: Bundles) -> None:
    halves = Image.new("RGB", (40, 10), (0, 0, 0))
    halves.paste((255, 255, 255), (0, 0, 40, 5))
    seen = np.asarray(fit(halves, build().manifest.layout))
    assert seen.shape == (448, 448, 3)
    assert seen[:200].min() > 200
    assert seen[-200:].max() < 50


@pytest.mark.parametrize(
    "pruner",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("divprune", "vispruner", "spatial")),
        "dart",
        "fastv",
    ],
)
def test_other_strategies_build(pruner: str, build: Bundles) -> None:
    layers = {"prune_layers": [1]} if pruner == "fastv" else {}
    assert build(pruner=pruner, max_new_tokens=4, **layers).manifest.pruning.pruner == pruner


@pytest.mark.parametrize(
    ("pruner", "keep"),
    [
        ("visionzip", 0.5),
        pytest.param("prumerge", 0.5, marks=pytest.mark.long),
        pytest.param("prumerge_plus", "adaptive", marks=pytest.mark.long),
    ],
)
def test_projected_tokens_are_merged(
    pruner: str, keep: float | str, build: Bundles, places: dict[str, Path]
) -> None:
    """As the reference of `validate` merges them, in float64: half of a token of four patches could not be projected."""
    bundle = build(pruner=pruner, keep=keep, **({"keep_bound": 1.0} if keep == "adaptive" else {}))
    session = open_session(bundle, "onnxruntime", threads=1)
    parts = {name: places[name] for name in ("base", "vision_tower")}
    reference = open_reference("minigpt_v2", places["checkpoint"], bundle.manifest.pruning, parts=parts)
    assert bundle.manifest.pruning.merged == (0 if pruner == "visionzip" else 1)
    for rows in ([0], [0, 1]):
        mine, theirs = (asked(who, bundle, rows, NEW) for who in (session, reference))
        for row in range(len(rows)):
            kept = theirs.kept_indices[row][theirs.kept_indices[row] >= 0]
            assert mine.kept_indices[row][mine.kept_indices[row] >= 0].tolist() == kept.tolist()
        assert mine.tokens == theirs.tokens
        for one, other in zip(mine.logits, theirs.logits, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_text_tower_of_another_vision_tower_is_refused(
    options: dict[str, Any], tiny_text_tower: Path, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({**options, "pruner": "trim", "text_tower": str(tiny_text_tower)})
    with pytest.raises(CheckpointError, match="belongs to another vision tower") as caught:
        build_bundle(recipe, tmp_path / "out")
    assert "\n" not in str(caught.value.message)
    assert "leave --text-tower out" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.long), {"pruner": "divprune", "keep": "0.2:1.0"}],
    ids=str,
)
def test_engines_are_built(changes: dict[str, Any], build: Bundles) -> None:
    bundle = build(precision="fp16", targets=["tensorrt-rtx"], max_new_tokens=4, **changes)
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}


# Bad input


def changed(options: dict[str, Any], tmp_path: Path, own: dict[str, torch.Tensor]) -> CheckpointError:
    target = tmp_path / "changed"
    target.mkdir()
    torch.save({"model": own}, target / "checkpoint.pth")
    with pytest.raises(CheckpointError) as caught:
        build_bundle(Recipe.model_validate({**options, "checkpoint": str(target)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return caught.value


def test_newer_names_of_updates(
    weights: dict[str, dict[str, torch.Tensor]], places: dict[str, Path], tmp_path: Path
) -> None:
    renamed = {key.replace(".weight", ".default.weight"): value for key, value in weights["low_rank"].items()}
    torch.save({"model": {**weights["own"], **renamed}}, tmp_path / "new.pth")
    checkpoint = open_checkpoint(tmp_path / "new.pth")
    for name in ("base", "vision_tower"):
        checkpoint = checkpoint.with_companion(name, open_checkpoint(places[name]))
    family = open_family(checkpoint)
    resolved = family.checkpoint.weights
    merged = [key for key in resolved if resolved[key] is not checkpoint.weights.get(key)]
    assert family.row.name == "minigpt_v2"
    assert len([key for key in merged if key.startswith("base/")]) == 2 * LAYERS


def test_an_update_of_another_rank(
    options: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    other = random_weights(low_rank_shapes("lora_{}.weight", rank=8), seed=4)
    error = changed(options, tmp_path, {**weights["own"], **other})
    assert "where rank 64 on 64 x 64 needs 64 x 64" in str(error)


def test_a_checkpoint_without_updates(
    options: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    assert "has no low-rank updates" in str(changed(options, tmp_path, weights["own"]))


def test_weights_without_a_place(
    options: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    own = {**weights["own"], **weights["low_rank"], "query_tokens": torch.ones(1, 32, 8)}
    assert "no place for: query_tokens" in str(changed(options, tmp_path, own))


def test_a_language_model_of_another_kind(
    options: dict[str, Any], places: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(places["base"], tmp_path / "base"))
    (base / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    with pytest.raises(CheckpointError, match="'mistral' where a Llama is needed"):
        build_bundle(Recipe.model_validate({**options, "base": str(base)}), tmp_path / "out")


@pytest.mark.long
def test_layers_are_copied(options: dict[str, Any], tmp_path: Path) -> None:
    assert_equal_both_ways(options, tmp_path, copied=("vision", "decoder"))


@pytest.mark.long
@pytest.mark.parametrize("pruner", ["text_similarity", "trim", "cdpruner"])
def test_expressions_are_read_by_embeddings(pruner: str, build: Bundles, places: dict[str, Path]) -> None:
    bundle = build(pruner=pruner, keep=0.5)
    grounder = Grounder(bundle)
    text_ids = grounder.text_ids(EXPRESSIONS[:2])
    assert text_ids is not None
    shades = np.random.default_rng(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
    (pixels,) = grounder.prepare([Image.fromarray(each) for each in shades]).calls
    parts = {name: places[name] for name in ("base", "vision_tower")}
    session = open_session(bundle, "onnxruntime", threads=1)
    reference = open_reference(
        "minigpt_v2",
        places["checkpoint"],
        bundle.manifest.pruning,
        parts=parts,
        text_tower=EmbeddingReference(),
    )
    mine, theirs, swapped = (
        who.encode(pixels, text_ids_BL=ids)
        for who, ids in ((session, text_ids), (reference, text_ids), (session, text_ids[::-1].copy()))
    )
    assert mine.kept_indices.tolist() == theirs.kept_indices.tolist()
    assert mine.kept_indices.tolist() != swapped.kept_indices.tolist(), "it is read"
