"""Small checkpoints with random weights in the published layout of every family: what `matrix.py` builds bundles of.

Configurations are the published ones with other sizes (`tests/families/reduced.py`), but for the decoder, which has four layers: pruners inside
the decoder cut it into as many stages. Tokenizers know the special tokens that are published, and some words of the recipe's prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gap_export.checkpoint.random_weights import CONFIGS, published
from gap_export.environment import versions
from gap_export.recipe.recipe import Recipe
from tests.families.plain_models import llama_shapes, random_weights
from tests.families.reduced import BOS, EOS, HEADS, HIDDEN, IMAGE_TOKEN, PAD, VOCABULARY, WIDTH, reduced
from tests.families.small_llama import write_tokenizer

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, Any]
"""Of a recipe."""

ROOT = Path(__file__).resolve().parents[1]
_WRITERS = ("torch", "transformers", "tokenizers", "safetensors")
LAYERS = 4
"""Of every decoder."""
UNKNOWN = 3
EXPRESSION = "the red mug"
"""Every tokenizer here knows its words."""

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 36,
    "patch_size": 6,
    "projection_dim": 16,
}
"""Of CLIP, as small as in the reduced configurations."""
_LLAMA = {"width": WIDTH, "hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "kv_heads": HEADS}
_EVA_WIDTH, _EVA_HIDDEN, _EVA_BLOCKS, _EVA_PATCH, _EVA_SIDE = 2 * 88, 96, 2, 56, 4
_RANK = 64
"""Of MiniGPT-v2's updates, which the family knows."""


def ensure(recipe: Recipe, folder: Path) -> Fields:
    """A checkpoint for a recipe, and what lies beside it, written where it is not there yet.

    Args:
        recipe: of a published model.
        folder: for this recipe's checkpoint; behind its name comes a hash of what makes it. Those of CLIP lie beside it, one for all recipes.

    Returns:
        Fields of the recipe that name what was written.
    """
    assert recipe.family is not None
    folder = folder.with_name(f"{folder.name}-{made_of(recipe.checkpoint, recipe.family, recipe.prompt)}")
    clip = folder.with_name(f"clip-{made_of()}")
    write = _ORIGINALS.get(recipe.family)
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if write is None:
            _write_published(recipe, folder / "checkpoint")
        else:
            write(folder)
        complete.touch()
    fields = {"checkpoint": folder / "checkpoint"}
    if recipe.base is not None:
        fields["base"] = folder / "base"
    if recipe.vision_tower is not None:
        own = folder / "eva_vit_g.pth"
        fields["vision_tower"] = own if own.exists() else _ensure_clip(clip)
    if recipe.text_tower is not None:
        fields["text_tower"] = _ensure_clip(clip)
    return {name: str(path) for name, path in fields.items()}


def sources() -> list[Path]:
    """Files that say what checkpoints hold: this one, what it takes from the tests of families, and the published layouts."""
    tests = [
        path for path in (ROOT / "tests" / "families").rglob("*.py") if not path.name.startswith("test_")
    ]
    package = (ROOT / "gap_export" / "checkpoint").rglob("*.py")
    return sorted([Path(__file__).resolve(), *tests, *package, *CONFIGS.glob("*.json")])


def made_of(*more: str | None) -> str:
    """Hash of what a checkpoint is made from: the sources, the libraries that write it, and what else is given."""
    digest = hashlib.sha256(json.dumps([*more, versions(_WRITERS)], sort_keys=True).encode())
    for path in sources():
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _write_published(recipe: Recipe, target: Path) -> None:
    """A family that transformers knows, in its layout."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    assert recipe.family is not None
    assert recipe.prompt is not None
    config, processor = reduced(recipe.checkpoint, recipe.family)
    config = _deeper(config)
    target.mkdir()
    _write_json(target / "config.json", config)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(target)).float()
    _draw_weights(model, torch.Generator().manual_seed(7))
    model.save_pretrained(target)
    _write_json(target / "config.json", config)  # transformers wrote more than is published
    _write_json(target / "preprocessor_config.json", processor)
    original = published(recipe.checkpoint)
    _write_words(
        target / "tokenizer.json",
        special_ids(original.special_tokens, original.config, config),
        recipe.prompt,
    )


def _draw_weights(model: Any, generator: Any) -> None:
    """Large enough that attention is sharp: a wrong position must show."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            centre = 0.0 if parameter.dim() > 1 else float(parameter.mean() > 0.5)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def _deeper(config: Json) -> Json:
    """With as many decoder layers as the longest schedule has stages."""
    if "text_config" in config:
        return {**config, "text_config": _deeper(config["text_config"])}
    return {**config, "num_hidden_layers": LAYERS}


def special_ids(special: Mapping[str, int], original: Json, small: Json) -> dict[str, int]:
    """Special tokens -> ids in the small table.

    A token whose published id stands in a field of the configuration gets the id that this field has now; all others get the next that is free.

    Args:
        special: name -> id, as published.
        original: the configuration, as published.
        small: reduced.
    """
    renumbered = {
        before: now[name]
        for was, now in ((original.get("text_config", {}), small.get("text_config", {})), (original, small))
        for name, before in was.items()
        if re.fullmatch(r"\w+_token_(id|index)", name) and isinstance(before, int)
    }
    ids = {
        name: renumbered[id_] for name, id_ in special.items() if name != "<unk>" and id_ in renumbered
    } | {"<unk>": UNKNOWN}
    if "<s>" in special:
        ids |= {"<s>": BOS, "</s>": EOS}
    taken = {PAD, BOS, EOS, IMAGE_TOKEN, *ids.values()}
    free = (id_ for id_ in range(VOCABULARY) if id_ not in taken)
    return {name: ids[name] if name in ids else next(free) for name in special}


def _write_words(path: Path, special: dict[str, int], prompt: str) -> None:
    """Special tokens, the expression's words, and as many of the prompt's as there are ids left for; the others are `<unk>`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    for name in special:
        prompt = prompt.replace(name, " ")
    words = dict.fromkeys([*EXPRESSION.split(), *re.findall(r"\w+|[^\w\s]+", prompt)])
    free = [id_ for id_ in range(VOCABULARY) if id_ not in special.values()]
    fill = [f"w{number}" for number in range(len(free))]
    vocabulary = {**special, **dict(zip([*words, *fill], free, strict=False))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special["<s>"])]
        )
    tokenizer.save(str(path))


def _ensure_clip(folder: Path) -> Path:
    """CLIP, with the tower that models look through and the text tower of its space."""
    if (folder / "complete").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel

    shutil.rmtree(folder, ignore_errors=True)
    begin, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {word: id_ for id_, word in enumerate([*EXPRESSION.split(), "<unk>", begin, end])}
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "eos_token_id": vocabulary[end],
        "projection_dim": 16,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=16))
    _draw_weights(model, torch.Generator().manual_seed(5))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(word, vocabulary[word]) for word in (begin, end)]
    )
    tokenizer.add_special_tokens([begin, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "complete").touch()
    return folder


def _write_llava_original(folder: Path) -> None:
    """`liuhaotian/llava-v1.5-*`: two .bin shards and their index, no token for the image, the tower beside it."""
    import torch

    target = folder / "checkpoint"
    target.mkdir()
    shapes: Shapes = {
        **llama_shapes(vocabulary=VOCABULARY, **_LLAMA),
        "model.mm_projector.0.weight": (WIDTH, 32),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
    }
    weights = random_weights(shapes, seed=1)
    names, half = list(weights), len(weights) // 2
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:half],
        "pytorch_model-00002-of-00002.bin": names[half:],
    }
    for file, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, target / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    _write_json(target / "pytorch_model.bin.index.json", index)
    config, _ = reduced("liuhaotian/llava-v1.5-7b", "llava_original")
    _write_json(target / "config.json", _deeper(config))
    write_tokenizer(target, [])


def _write_shikra(folder: Path) -> None:
    """A delta over a base with three tokens fewer."""
    from safetensors.torch import save_file

    merged = random_weights(llama_shapes(vocabulary=VOCABULARY, **_LLAMA), seed=3)
    base = random_weights(llama_shapes(vocabulary=VOCABULARY - 3, **_LLAMA), seed=2)
    delta = {key: value.clone() for key, value in merged.items()}
    for key, value in base.items():
        delta[key][: len(value)] -= value
    delta |= random_weights(
        {"model.mm_projector.weight": (WIDTH, 32), "model.mm_projector.bias": (WIDTH,)}, seed=4
    )
    config = _deeper(reduced("shikras/shikra-7b-delta-v1", "shikra")[0])
    of_base = {**config, "model_type": "llama", "vocab_size": VOCABULARY - 3}
    for name, weights, content in (("checkpoint", delta, config), ("base", base, of_base)):
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors")
        _write_json(folder / name / "config.json", content)
        write_tokenizer(folder / name, ["<im_patch>", "<im_start>", "<im_end>"])


def _write_minigpt_v2(folder: Path) -> None:
    """A folder with one .pth of what was trained, the tower (a .pth), the language model."""
    import torch
    from safetensors.torch import save_file

    for name in ("checkpoint", "base"):
        (folder / name).mkdir()
    own: Shapes = {"llama_proj.weight": (WIDTH, 4 * _EVA_WIDTH), "llama_proj.bias": (WIDTH,)}
    for number in range(LAYERS):
        for part in "qv":
            name = f"llama_model.base_model.model.model.layers.{number}.self_attn.{part}_proj"
            own |= {f"{name}.lora_A.weight": (_RANK, WIDTH), f"{name}.lora_B.weight": (WIDTH, _RANK)}
    torch.save({"model": random_weights(own, seed=1)}, folder / "checkpoint" / "stage3.pth")
    torch.save(random_weights(_eva_shapes(), seed=2), folder / "eva_vit_g.pth")
    save_file(
        random_weights(llama_shapes(vocabulary=VOCABULARY, **_LLAMA), seed=3),
        folder / "base" / "model.safetensors",
    )
    config, _ = reduced("meta-llama/Llama-2-7b-chat-hf", "minigpt_v2")
    _write_json(folder / "base" / "config.json", _deeper(config))
    write_tokenizer(folder / "base", ["<Img>", "</Img>"])


def _eva_shapes() -> Shapes:
    """EVA-CLIP: positions are those of a smaller image."""
    width, hidden = _EVA_WIDTH, _EVA_HIDDEN
    layer: Shapes = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + _EVA_SIDE**2, width),
        "patch_embed.proj.weight": (width, 3, _EVA_PATCH, _EVA_PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        **{f"blocks.{number}.{key}": shape for number in range(_EVA_BLOCKS) for key, shape in layer.items()},
    }


_ORIGINALS: dict[str, Callable[[Path], None]] = {
    "llava_original": _write_llava_original,
    "shikra": _write_shikra,
    "minigpt_v2": _write_minigpt_v2,
}
"""Families whose layout transformers does not know."""


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
