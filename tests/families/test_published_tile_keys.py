"""The same for families whose images become tiles: keys of published checkpoints at full size, and how many tokens images have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import open_family
from gap_export.modeling.components import Component
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.families.plain_models import llama_shapes
from tests.families.test_published_keys import (
    CLIP_CONFIG,
    Shapes,
    clip_shapes,
    named,
    projector,
    renamed,
    write,
)

NORMAL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
DECODERS = {
    "llama": {"width": 4096, "hidden": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
    "mistral": {"width": 4096, "hidden": 14336, "layers": 32, "heads": 32, "kv_heads": 8},
    "qwen2-7b": {"width": 3584, "hidden": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
    "qwen2-0.5b": {"width": 896, "hidden": 4864, "layers": 24, "heads": 14, "kv_heads": 2},
}


def decoder_config(kind: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    sizes = DECODERS[kind]
    return {
        "model_type": kind.partition("-")[0],
        "vocab_size": vocabulary,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": 32768 if "qwen" in kind else 4096,
        "eos_token_id": 2,
        **changes,
    }


def decoder_shapes(kind: str, vocabulary: int, *, tied: bool = False) -> Shapes:
    sizes = DECODERS[kind]
    shapes = llama_shapes(vocabulary=vocabulary, **sizes)
    if "qwen" in kind:
        shared = sizes["width"] // sizes["heads"] * sizes["kv_heads"]
        extents = {"q": sizes["width"], "k": shared, "v": shared}
        for layer in range(sizes["layers"]):
            for part, extent in extents.items():
                shapes[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = (extent,)
    if tied:
        del shapes["lm_head.weight"]
    return shapes


def siglip_shapes() -> Shapes:
    """SigLIP so400m/14 at 384 without its last layer and its head."""
    width, hidden = 1152, 4304
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (729, width),
        **{f"post_layernorm.{part}": (width,) for part in ("weight", "bias")},
    }
    for number in range(26):
        name = f"encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{name}.self_attn.{part}.weight": (width, width),
                f"{name}.self_attn.{part}.bias": (width,),
            }
        for part, extents in (("fc1", (hidden, width)), ("fc2", (width, hidden))):
            shapes |= {f"{name}.mlp.{part}.weight": extents, f"{name}.mlp.{part}.bias": extents[:1]}
        shapes |= {f"{name}.layer_norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    return shapes


def intern_vit_shapes() -> Shapes:
    """InternViT-300M at 448."""
    width, hidden = 1024, 4096
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1025, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    for number in range(24):
        name = f"encoder.layer.{number}"
        for part in (
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.projection_layer",
        ):
            shapes |= {f"{name}.{part}.weight": (width, width), f"{name}.{part}.bias": (width,)}
        for part, extents in (("fc1", (hidden, width)), ("fc2", (width, hidden))):
            shapes |= {f"{name}.mlp.{part}.weight": extents, f"{name}.mlp.{part}.bias": extents[:1]}
        shapes |= {
            f"{name}.layernorm_{at}.{part}": (width,)
            for at in ("before", "after")
            for part in ("weight", "bias")
        }
        shapes |= {f"{name}.lambda_{n}": (width,) for n in (1, 2)}
    return shapes


def placed(decoder: Shapes, others: Shapes, *, new: bool) -> Shapes:
    """Everything under the names of transformers before or after 4.52."""
    if not new:
        return {**named("language_model.", decoder), **others}
    return {**renamed(decoder, model="model.language_model"), **named("model.", others)}


def saved(folder: Path, config: dict[str, Any], shapes: Shapes, **processor: Any) -> Checkpoint:
    target = write(folder / "checkpoint", config, shapes)
    (target / "preprocessor_config.json").write_text(json.dumps({**NORMAL, **processor}))
    return open_checkpoint(target)


def llava_next(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    others = named("vision_tower.vision_model.", clip_shapes(336)) | {"image_newline": (4096,)}
    others |= projector(4096, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    config = {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": NEXT_GRIDS,
        "text_config": decoder_config(kind, 32064, **({"sliding_window": None} if kind == "mistral" else {})),
        "vision_config": {**CLIP_CONFIG, "image_size": 336},
        "tie_word_embeddings": False,
    }
    shapes = placed(decoder_shapes(kind, 32064), others, new=new)
    return saved(folder, config, shapes, image_grid_pinpoints=NEXT_GRIDS)


def llava_onevision(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    width, tied = DECODERS[kind]["width"], kind == "qwen2-0.5b"
    others = named("vision_tower.vision_model.", siglip_shapes()) | {"image_newline": (width,)}
    for part, inner in (("linear_1", 1152), ("linear_2", width)):
        others |= {
            f"multi_modal_projector.{part}.weight": (width, inner),
            f"multi_modal_projector.{part}.bias": (width,),
        }
    config = {
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "image_grid_pinpoints": ONEVISION_GRIDS,
        "vision_aspect_ratio": "anyres_max_9",
        "text_config": decoder_config(kind, 152000, tie_word_embeddings=tied),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "tie_word_embeddings": tied,
    }
    shapes = placed(decoder_shapes(kind, 152000, tied=tied), others, new=new)
    return saved(folder, config, shapes, image_grid_pinpoints=ONEVISION_GRIDS)


def internvl(folder: Path, *, new: bool) -> Checkpoint:
    width = DECODERS["qwen2-0.5b"]["width"]
    others = named("vision_tower.", intern_vit_shapes())
    others |= {f"multi_modal_projector.layer_norm.{part}": (4096,) for part in ("weight", "bias")}
    for part, inner in (("linear_1", 4096), ("linear_2", width)):
        others |= {
            f"multi_modal_projector.{part}.weight": (width, inner),
            f"multi_modal_projector.{part}.bias": (width,),
        }
    config = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "text_config": decoder_config("qwen2-0.5b", 151674, tie_word_embeddings=False),
        "vision_config": {"model_type": "internvl_vision", "attention_bias": True},
        "tie_word_embeddings": False,
    }
    shapes = placed(decoder_shapes("qwen2-0.5b", 151674), others, new=new)
    return saved(folder, config, shapes, min_patches=1, max_patches=12)


PUBLISHED: dict[str, tuple[Callable[[Path], Checkpoint], tuple[int, int, int]]] = {
    "llava-v1.6-vicuna-7b-hf, old names": (lambda f: llava_next(f, "llama", new=False), (687, 291, 2928)),
    "llava-v1.6-mistral-7b-hf, new names": (lambda f: llava_next(f, "mistral", new=True), (687, 291, 2928)),
    "llava-onevision-qwen2-7b-ov-hf, old names": (
        lambda f: llava_onevision(f, "qwen2-7b", new=False),
        (765, 339, 8829),
    ),
    "llava-onevision-qwen2-0.5b-ov-hf, new names, tied": (
        lambda f: llava_onevision(f, "qwen2-0.5b", new=True),
        (716, 290, 8829),
    ),
    "InternVL3-1B-hf, old names": (lambda f: internvl(f, new=False), (733, 291, 3328)),
    "InternVL3-1B-hf, new names": (lambda f: internvl(f, new=True), (733, 291, 3328)),
}
"""Name -> (checkpoint, (how many tensors, of those the decoder's, visual tokens of the largest image))."""


def components(checkpoint: Checkpoint) -> tuple[ModelSpec, list[Component]]:
    family = open_family(checkpoint)
    recipe = Recipe(name="x", checkpoint="x", precision="fp16", pruner="dart")
    facts = family.spec(recipe)
    return facts, family.components(facts, plan_for(recipe, facts))


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_is_found_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    make, (tensors, decoder, tokens) = PUBLISHED[name]
    checkpoint = make(tmp_path)
    in_decoder = [key for key in checkpoint.weights if "language_model" in key or key.startswith("lm_head")]
    assert (len(checkpoint.weights), len(in_decoder)) == (tensors, decoder)
    facts, parts = components(checkpoint)
    assert (facts.visual_tokens, facts.grid) == (tokens, None)
    found = set()
    for part in parts:
        for parameter, value in part.module.named_parameters():
            key = part.weight_key(parameter)
            assert checkpoint.weights[key].shape == tuple(value.shape), key
            found.add(key)
    assert found == set(checkpoint.weights)


@pytest.mark.parametrize("name", ["llava-v1.6-vicuna-7b-hf, old names", "InternVL3-1B-hf, new names"])
def test_a_key_that_is_not_known_is_named(name: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED[name][0](tmp_path)
    weight = next(iter(checkpoint.weights.values()))
    with pytest.raises(CheckpointError, match=r"no place for: model\.resampler\.weight"):
        components(checkpoint.with_weights({"model.resampler.weight": weight}))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llava_next", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("llava_next", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ("llava_next", {"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
        ("llava_next", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ("llava_next", {"text_config": {"model_type": "gpt2"}}, "text_config.model_type"),
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio"),
        ("llava_onevision", {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("internvl", {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("internvl", {"downsample_ratio": 0.7}, "downsample_ratio"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    makers: dict[str, Callable[[Path], Checkpoint]] = {
        "llava_next": lambda f: llava_next(f, "llama", new=False),
        "llava_onevision": lambda f: llava_onevision(f, "qwen2-0.5b", new=False),
        "internvl": lambda f: internvl(f, new=False),
    }
    folder = makers[family](tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_family(checkpoint).spec(Recipe(name="x", checkpoint="x"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "resample of the image processor"),
        ({"size": {"shortest_edge": 224}}, "size of the image processor"),
        ({"crop_size": {"height": 336, "width": 224}}, "size of the image processor"),
        ({"image_mean": None}, "no image processor settings"),
    ],
    ids=str,
)
def test_tiles_of_another_kind_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = llava_next(tmp_path, "llama", new=False)
    path = checkpoint.folder / "preprocessor_config.json"
    as_published = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "resample": 3}
    settings = json.loads(path.read_text()) | as_published
    path.write_text(json.dumps(settings))
    assert open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))
    path.write_text(json.dumps(settings | changes))
    with pytest.raises(CheckpointError, match=message):
        open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))


@pytest.mark.parametrize(
    ("make", "pruner", "works"),
    [
        (lambda f: llava_onevision(f, "qwen2-0.5b", new=False), "cls_attention", {"divprune", "dart", "random", "none"}),
        (lambda f: llava_onevision(f, "qwen2-0.5b", new=False), "spatial", {"divprune", "dart", "random", "none"}),
        (lambda f: internvl(f, new=False), "visionzip", {"cls_attention", "vispruner", "divprune"}),
        (lambda f: llava_next(f, "llama", new=False), "spatial", {"cls_attention", "visionzip", "prumerge"}),
    ],
)  # fmt: skip
def test_strategies_that_cannot_work_are_refused(
    make: Callable[[Path], Checkpoint], pruner: str, works: set[str], tmp_path: Path
) -> None:
    checkpoint = make(tmp_path)
    recipe = Recipe(name="x", checkpoint="x", pruner=pruner)
    facts = open_family(checkpoint).spec(recipe)
    with pytest.raises(RecipeError) as caught:
        plan_for(recipe, facts)
    offered = set(caught.value.hint.removeprefix("these work on it: ").split(", "))
    assert works <= offered
    assert not offered & {pruner, "fastv", "spatial"}


def test_squares_are_not_asked_for(tmp_path: Path) -> None:
    checkpoint = llava_next(tmp_path, "llama", new=False)
    with pytest.raises(RecipeError, match="tiles"):
        open_family(checkpoint).layout(Recipe(name="x", checkpoint="x", fit="pad"))
