"""The keys and shapes of published checkpoints at full size: each family finds all of its weights there, and none is left over.

The lists are written out from the configurations, not from the code that reads them. Files are headers over holes: nothing of their
size is ever on the disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.safetensors import WeightLocation
from gap_export.errors import CheckpointError
from gap_export.families import open_family
from gap_export.modeling.components import Component
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.families.plain_models import llama_shapes
from tests.families.test_original_layouts import write_tokenizer

Shapes = dict[str, tuple[int, ...]]

SIZES = {
    "7b": {"width": 4096, "hidden": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
    "13b": {"width": 5120, "hidden": 13824, "layers": 40, "heads": 40, "kv_heads": 40},
}


def llama_config(size: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    sizes = SIZES[size]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        **changes,
    }


def clip_shapes(image: int) -> Shapes:
    """OpenAI's CLIP ViT-L/14, vision tower."""
    width, hidden = 1024, 4096
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": ((image // 14) ** 2 + 1, width),
        **{f"{norm}.{part}": (width,) for norm in ("pre_layrnorm", "post_layernorm") for part in ("weight", "bias")},
    }  # fmt: skip
    for number in range(24):
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


CLIP_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}


def named(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def renamed(shapes: Shapes, **prefixes: str) -> Shapes:
    """Keys with another beginning."""
    changed = {}
    for key, shape in shapes.items():
        old = next((old for old in prefixes if key.startswith(f"{old}.")), None)
        changed[key if old is None else prefixes[old] + key.removeprefix(old)] = shape
    return changed


def projector(width: int, first: str, second: str) -> Shapes:
    return {
        f"{first}.weight": (width, 1024),
        f"{first}.bias": (width,),
        f"{second}.weight": (width, width),
        f"{second}.bias": (width,),
    }


def write(folder: Path, config: dict[str, Any], shapes: Shapes) -> Path:
    """A folder whose weights are a header over a hole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return folder


def hugging_face(folder: Path, size: str, *, new: bool) -> Checkpoint:
    decoder = llama_shapes(vocabulary=32064, **SIZES[size])
    assert len(decoder) == {"7b": 291, "13b": 363}[size]
    width = SIZES[size]["width"]
    head = {"lm_head.weight": decoder.pop("lm_head.weight")}
    if new:
        shapes = renamed(decoder, model="model.language_model") | head
        shapes |= named("model.vision_tower.vision_model.", clip_shapes(336))
        shapes |= projector(
            width, "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"
        )
    else:
        shapes = named("language_model.", {**decoder, **head})
        shapes |= named("vision_tower.vision_model.", clip_shapes(336))
        shapes |= projector(width, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": llama_config(size, 32064),
        "vision_config": {**CLIP_CONFIG, "image_size": 336},
    }
    return open_checkpoint(write(folder / "checkpoint", config, shapes))


def clip(folder: Path, image: int) -> Checkpoint:
    """The whole of CLIP as published: the text tower is known, and not needed."""
    shapes = named("vision_model.", clip_shapes(image))
    shapes |= {
        "text_projection.weight": (768, 768),
        "visual_projection.weight": (768, 1024),
        "logit_scale": (),
    }
    shapes |= {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "vision_model.embeddings.position_ids": (1, 577),
    }
    config = {"model_type": "clip", "vision_config": {**CLIP_CONFIG, "image_size": image}}
    return open_checkpoint(write(folder / "clip", config, shapes))


def original(folder: Path, size: str, *, tower_inside: bool) -> Checkpoint:
    width = SIZES[size]["width"]
    shapes = llama_shapes(vocabulary=32000, **SIZES[size])
    shapes |= projector(width, "model.mm_projector.0", "model.mm_projector.2")
    if tower_inside:
        shapes |= named("model.vision_tower.vision_tower.vision_model.", clip_shapes(336))
    config = llama_config(
        size, 32000, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_projector_type="mlp2x_gelu"
    )
    target = write(folder / "checkpoint", {**config, "model_type": "llava"}, shapes)
    write_tokenizer(target, [])
    return open_checkpoint(target).with_companion("vision_tower", clip(folder, 336))


def shikra(folder: Path) -> Checkpoint:
    shapes = llama_shapes(vocabulary=32003, **SIZES["7b"])
    shapes |= {"model.mm_projector.weight": (4096, 1024), "model.mm_projector.bias": (4096,)}
    shapes |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (64,) for n in range(32)}
    target = write(
        folder / "shikra-7b-delta-v1", {**llama_config("7b", 32003), "model_type": "shikra"}, shapes
    )
    write_tokenizer(target, ["<im_patch>", "<im_start>", "<im_end>"])
    base = write(
        folder / "llama-7b", llama_config("7b", 32000), llama_shapes(vocabulary=32000, **SIZES["7b"])
    )
    checkpoint = open_checkpoint(target).with_companion("vision_tower", clip(folder, 224))
    return checkpoint.with_companion("base", open_checkpoint(base))


def minigpt_v2(folder: Path) -> Checkpoint:
    """Trained parameters as the code names them; the tower's positions are those of 224 pixels, and it has a block too many."""
    width, blocks = 1408, 40
    tower: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 257, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for n in range(blocks):
        name = f"blocks.{n}"
        tower |= {f"{name}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
        tower |= {f"{name}.attn.{part}": (width,) for part in ("q_bias", "v_bias", "proj.bias")}
        tower |= {f"{name}.attn.qkv.weight": (3 * width, width), f"{name}.attn.proj.weight": (width, width)}
        tower |= {f"{name}.mlp.fc1.weight": (6144, width), f"{name}.mlp.fc1.bias": (6144,)}
        tower |= {f"{name}.mlp.fc2.weight": (width, 6144), f"{name}.mlp.fc2.bias": (width,)}
    own: Shapes = {"llama_proj.weight": (4096, 4 * width), "llama_proj.bias": (4096,)}
    for n in range(32):
        for part in "qv":
            name = f"llama_model.base_model.model.model.layers.{n}.self_attn.{part}_proj"
            own |= {f"{name}.lora_A.weight": (64, 4096), f"{name}.lora_B.weight": (4096, 64)}
    base = write(folder / "llama-2", llama_config("7b", 32000), llama_shapes(vocabulary=32000, **SIZES["7b"]))
    write_tokenizer(base, ["<Img>", "</Img>"])
    trained = open_checkpoint(write(folder / "own", {}, own))
    checkpoint = Checkpoint(trained.folder, "minigpt", {}, trained.weights)
    checkpoint = checkpoint.with_companion("vision_tower", open_checkpoint(write(folder / "eva", {}, tower)))
    return checkpoint.with_companion("base", open_checkpoint(base))


PUBLISHED: dict[str, Callable[[Path], Checkpoint]] = {
    "llava-1.5-7b-hf, old names": lambda folder: hugging_face(folder, "7b", new=False),
    "llava-1.5-13b-hf, new names": lambda folder: hugging_face(folder, "13b", new=True),
    "liuhaotian/llava-v1.5-7b": lambda folder: original(folder, "7b", tower_inside=False),
    "liuhaotian/llava-v1.5-13b, tower inside": lambda folder: original(folder, "13b", tower_inside=True),
    "shikra-7b-delta-v1": shikra,
    "minigpt-v2": minigpt_v2,
}
VISUAL = {"shikra-7b-delta-v1": (16, 16), "minigpt-v2": (32, 8)}


def components(checkpoint: Checkpoint) -> tuple[ModelSpec, list[Component], Checkpoint]:
    family = open_family(checkpoint)
    recipe = Recipe(name="x", checkpoint="x", precision="fp16")
    facts = family.spec(recipe)
    return facts, family.components(facts, plan_for(recipe, facts)), family.checkpoint


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_is_found_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    facts, parts, checkpoint = components(PUBLISHED[name](tmp_path))
    assert facts.grid == VISUAL.get(name, (24, 24))
    found = {}
    for part in parts:
        for parameter, value in part.module.state_dict(keep_vars=True).items():
            if value is not None and parameter in dict(part.module.named_parameters()):
                key = part.weight_key(parameter)
                found[key] = checkpoint.weights[key].shape == tuple(value.shape)
    assert all(found.values()), [key for key, fits in found.items() if not fits][:3]
    decoder = [key for key in found if "layers." in key and "vision" not in key and "blocks" not in key]
    assert len(decoder) == 9 * facts.layers


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf, old names", "minigpt-v2"])
def test_a_key_that_is_not_known_is_named(name: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED[name](tmp_path)
    any_weight = next(iter(checkpoint.weights.values()))
    assert isinstance(any_weight, WeightLocation)
    with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.0\.self_attn\.q_norm\.weight"):
        components(checkpoint.with_weights({"model.layers.0.self_attn.q_norm.weight": any_weight}))


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = PUBLISHED["llava-1.5-7b-hf, old names"](tmp_path)
    del checkpoint.weights["language_model.model.layers.7.mlp.up_proj.weight"]
    _, parts, _ = components(checkpoint)
    decoder = next(part for part in parts if part.spec.name == "decoder")
    with pytest.raises(
        CheckpointError, match=r"has no weight for language_model\.layers\.7\.mlp\.up_proj\.weight"
    ):
        decoder.weight_key("language_model.layers.7.mlp.up_proj.weight")
