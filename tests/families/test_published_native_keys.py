"""The same for the Qwen-VL models: keys of published checkpoints at full size, and how many tokens images have."""

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
from tests.families.test_published_keys import Shapes, named, renamed, write

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {**CLIP, "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
    "qwen2_5_vl": {**CLIP, "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
    "qwen3_vl": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
    },
}
TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "video_token_id": 151656}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2-2b": {"width": 1536, "hidden": 8960, "layers": 28, "heads": 12, "kv_heads": 2},
    "qwen2-7b": {"width": 3584, "hidden": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
    "qwen2.5-3b": {"width": 2048, "hidden": 11008, "layers": 36, "heads": 16, "kv_heads": 2},
    "qwen3-4b": {"width": 2560, "hidden": 9728, "layers": 36, "heads": 32, "kv_heads": 8},
    "qwen3-8b": {"width": 4096, "hidden": 12288, "layers": 36, "heads": 32, "kv_heads": 8},
}


def text_config(kind: str, vocabulary: int, sections: list[int], **changes: Any) -> dict[str, Any]:
    sizes = DECODERS[kind]
    return {
        "vocab_size": vocabulary,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **changes,
    }


def decoder_shapes(kind: str, vocabulary: int, *, tied: bool) -> Shapes:
    sizes = DECODERS[kind]
    shapes = llama_shapes(vocabulary=vocabulary, **sizes)
    for layer in range(sizes["layers"]):
        name = f"model.layers.{layer}.self_attn"
        if kind.startswith("qwen3"):  # heads are as wide as they are, and are normed
            query, shared, width = 128 * sizes["heads"], 128 * sizes["kv_heads"], sizes["width"]
            shapes |= {
                f"{name}.q_proj.weight": (query, width),
                f"{name}.k_proj.weight": (shared, width),
                f"{name}.v_proj.weight": (shared, width),
                f"{name}.o_proj.weight": (width, query),
                f"{name}.q_norm.weight": (128,),
                f"{name}.k_norm.weight": (128,),
            }
        else:
            shared = sizes["width"] // sizes["heads"] * sizes["kv_heads"]
            extents = {"q": sizes["width"], "k": shared, "v": shared}
            shapes |= {f"{name}.{part}_proj.bias": (extent,) for part, extent in extents.items()}
    if tied:
        del shapes["lm_head.weight"]
    return shapes


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (width,) for part in (("weight", "bias") if bias else ("weight",))}


def blocks(depth: int, width: int, mlp: dict[str, tuple[int, int]], *, norm_bias: bool) -> Shapes:
    shapes: Shapes = {}
    for number in range(depth):
        name = f"blocks.{number}"
        shapes |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
        for n in (1, 2):
            shapes |= norm(f"{name}.norm{n}", width, bias=norm_bias)
        for part, extents in mlp.items():
            shapes |= linear(f"{name}.mlp.{part}", *extents)
    return shapes


def qwen2_tower(out: int) -> Shapes:
    mlp = {"fc1": (5120, 1280), "fc2": (1280, 5120)}
    return {
        "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **blocks(32, 1280, mlp, norm_bias=True),
        **norm("merger.ln_q", 1280),
        **linear("merger.mlp.0", 5120, 5120),
        **linear("merger.mlp.2", out, 5120),
    }


def qwen25_tower(out: int) -> Shapes:
    mlp = {"gate_proj": (3420, 1280), "up_proj": (3420, 1280), "down_proj": (1280, 3420)}
    return {
        "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **blocks(32, 1280, mlp, norm_bias=False),
        **norm("merger.ln_q", 1280, bias=False),
        **linear("merger.mlp.0", 5120, 5120),
        **linear("merger.mlp.2", out, 5120),
    }


def qwen3_tower(depth: int, width: int, hidden: int, out: int) -> Shapes:
    mlp = {"linear_fc1": (hidden, width), "linear_fc2": (width, hidden)}
    shapes: Shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (2304, width),
        **blocks(depth, width, mlp, norm_bias=True),
    }
    for name, normed in (("merger", width), *((f"deepstack_merger_list.{n}", 4 * width) for n in range(3))):
        shapes |= norm(f"{name}.norm", normed)
        shapes |= linear(f"{name}.linear_fc1", 4 * width, 4 * width) | linear(
            f"{name}.linear_fc2", out, 4 * width
        )
    return shapes


def saved(folder: Path, config: dict[str, Any], decoder: Shapes, tower: Shapes, *, new: bool) -> Checkpoint:
    """Names of transformers before 4.52 begin with `model.` and `visual.`."""
    shapes = (
        {**renamed(decoder, model="model.language_model"), **named("model.visual.", tower)}
        if new
        else {**decoder, **named("visual.", tower)}
    )
    config = {**config, **TOKENS, "image_token_id": 151655}
    target = write(folder / "checkpoint", config, shapes)
    (target / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSORS[config["model_type"]], "merge_size": 2, "temporal_patch_size": 2})
    )
    return open_checkpoint(target)


def qwen2_vl(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    tied, vocabulary = kind == "qwen2-2b", 151936 if kind == "qwen2-2b" else 152064
    width = DECODERS[kind]["width"]
    config = {
        "model_type": "qwen2_vl",
        **text_config(kind, vocabulary, [16, 24, 24], sliding_window=32768, use_sliding_window=False),
        "tie_word_embeddings": tied,
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3}
        | {"hidden_size": width, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }
    return saved(folder, config, decoder_shapes(kind, vocabulary, tied=tied), qwen2_tower(width), new=new)


def qwen25_vl(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    tied, vocabulary = kind == "qwen2.5-3b", 151936 if kind == "qwen2.5-3b" else 152064
    width = DECODERS[kind]["width"]
    config = {
        "model_type": "qwen2_5_vl",
        **text_config(kind, vocabulary, [16, 24, 24], sliding_window=32768, use_sliding_window=False),
        "tie_word_embeddings": tied,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
    return saved(folder, config, decoder_shapes(kind, vocabulary, tied=tied), qwen25_tower(width), new=new)


def qwen3_vl(folder: Path, kind: str) -> Checkpoint:
    tied, vocabulary = kind == "qwen3-4b", 151936
    depth, width, hidden = (24, 1024, 4096) if tied else (27, 1152, 4304)
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    config = {
        "model_type": "qwen3_vl",
        "text_config": text_config(
            kind,
            vocabulary,
            [],
            head_dim=128,
            rope_scaling=rope,
            rope_theta=5000000,
            model_type="qwen3_vl_text",
        ),
        "tie_word_embeddings": tied,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17] if tied else [8, 16, 24],
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": DECODERS[kind]["width"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    tower = qwen3_tower(depth, width, hidden, DECODERS[kind]["width"])
    return saved(folder, config, decoder_shapes(kind, vocabulary, tied=tied), tower, new=True)


PUBLISHED: dict[str, tuple[Callable[[Path], Checkpoint], tuple[int, int, int]]] = {
    "Qwen2-VL-7B-Instruct, old names": (lambda f: qwen2_vl(f, "qwen2-7b", new=False), (730, 391, 16384)),
    "Qwen2-VL-2B-Instruct, new names, tied": (
        lambda f: qwen2_vl(f, "qwen2-2b", new=True),
        (729, 391, 16384),
    ),
    "Qwen2.5-VL-7B-Instruct, old names": (lambda f: qwen25_vl(f, "qwen2-7b", new=False), (729, 390, 16384)),
    "Qwen2.5-VL-3B-Instruct, old names, tied": (
        lambda f: qwen25_vl(f, "qwen2.5-3b", new=False),
        (824, 390, 16384),
    ),
    "Qwen3-VL-8B-Instruct": (lambda f: qwen3_vl(f, "qwen3-8b"), (750, 351, 16384)),
    "Qwen3-VL-4B-Instruct, tied": (lambda f: qwen3_vl(f, "qwen3-4b"), (713, 315, 16384)),
}
"""Name -> (checkpoint, (how many tensors, of those the tower's, visual tokens of the largest image))."""


def components(checkpoint: Checkpoint, **options: Any) -> tuple[ModelSpec, list[Component]]:
    family = open_family(checkpoint)
    recipe = Recipe(name="x", checkpoint="x", precision="fp16", pruner="dart", **options)
    facts = family.spec(recipe)
    return facts, family.components(facts, plan_for(recipe, facts))


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_is_found_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    make, (tensors, tower, tokens) = PUBLISHED[name]
    checkpoint = make(tmp_path)
    in_tower = [key for key in checkpoint.weights if "visual." in key]
    assert (len(checkpoint.weights), len(in_tower)) == (tensors, tower)
    facts, parts = components(checkpoint)
    assert (facts.visual_tokens, facts.grid, facts.position_rows) == (tokens, None, 3)
    assert facts.deepstack_levels == (3 if "Qwen3" in name else 0)
    found = set()
    for part in parts:
        for parameter, value in part.module.named_parameters():
            key = part.weight_key(parameter)
            assert checkpoint.weights[key].shape == tuple(value.shape), key
            found.add(key)
    assert found == set(checkpoint.weights)


def test_sizes_of_the_decoder(tmp_path: Path) -> None:
    """Heads of Qwen3 are wider than their share of the hidden size."""
    facts, _ = components(PUBLISHED["Qwen3-VL-4B-Instruct, tied"][0](tmp_path))
    assert (facts.hidden_size, facts.attention_heads, facts.kv_heads, facts.head_dim) == (2560, 32, 8, 128)
    assert facts.embedding_width == 4 * 2560


@pytest.mark.parametrize(("pixels", "tokens"), [(1003520, 1280), (200704, 256), (None, 16384)])
def test_pixels_bound_the_cache(pixels: int | None, tokens: int, tmp_path: Path) -> None:
    facts, parts = components(PUBLISHED["Qwen2.5-VL-7B-Instruct, old names"][0](tmp_path), max_pixels=pixels)
    assert facts.visual_tokens == tokens
    decoder = next(part for part in parts if part.spec.name == "decoder")
    past = next(each for each in decoder.spec.inputs if each.name == "past.0.key")
    slots = past.extents("maximum")[2]
    assert 0 <= slots - (127 + round(0.25 * tokens) + 32) <= 16


def test_a_key_that_is_not_known_is_named(tmp_path: Path) -> None:
    checkpoint = PUBLISHED["Qwen3-VL-8B-Instruct"][0](tmp_path)
    weight = next(iter(checkpoint.weights.values()))
    with pytest.raises(CheckpointError, match=r"no place for: model\.visual\.merger\.ln_q\.weight"):
        components(checkpoint.with_weights({"model.visual.merger.ln_q.weight": weight}))


def changed(checkpoint: Checkpoint, file: str, **changes: Any) -> Checkpoint:
    path = checkpoint.folder / file
    stored = json.loads(path.read_text())
    for field, value in changes.items():
        inner = stored.get(field)
        stored[field] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value
    path.write_text(json.dumps(stored))
    return open_checkpoint(checkpoint.folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen2-VL-7B-Instruct, old names", {"use_sliding_window": True, "max_window_layers": 9}, "use_sliding_window"),
        (
            "Qwen2.5-VL-7B-Instruct, old names",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"rope_scaling\.type",
        ),
        ("Qwen2.5-VL-7B-Instruct, old names", {"vision_config": {"window_size": 14}}, "window_size"),
        ("Qwen3-VL-8B-Instruct", {"vision_config": {"deepstack_visual_indexes": [8, 40]}}, "deepstack_visual_indexes"),
        ("Qwen3-VL-8B-Instruct", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = changed(PUBLISHED[name][0](tmp_path), "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_family(checkpoint).spec(Recipe(name="x", checkpoint="x"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "patch_size of the image processor"),
        ({"merge_size": 4}, "merge_size of the image processor"),
        ({"resample": 2}, "resample of the image processor"),
        ({"min_pixels": None}, "size of the image processor"),
        ({"min_pixels": 20000000}, "size of the image processor"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
    ids=str,
)
def test_a_processor_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = PUBLISHED["Qwen2-VL-7B-Instruct, old names"][0](tmp_path)
    assert open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))
    checkpoint = changed(checkpoint, "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_family(checkpoint).layout(Recipe(name="x", checkpoint="x"))


@pytest.mark.parametrize("pruner", ["cls_attention", "spatial", "text_similarity", "fastv"])
def test_strategies_that_cannot_work_are_refused(pruner: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED["Qwen2.5-VL-7B-Instruct, old names"][0](tmp_path)
    recipe = Recipe(name="x", checkpoint="x", pruner=pruner)
    with pytest.raises(RecipeError) as caught:
        plan_for(recipe, open_family(checkpoint).spec(recipe))
    assert "dart" in caught.value.hint
