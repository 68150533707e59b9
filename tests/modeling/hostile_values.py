"""Small checkpoints of every family without weights, and values that fields of their files should not have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, processors

from gap_export.modeling.config_fields import (
    CLIP_TOWER,
    CONFIG,
    FAMILIES,
    GENERATION,
    PROCESSING,
    SQUARE_PIXELS,
    KnownFields,
)
from gap_export.modeling.fields import Fields
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe
from tests.families.reduced import IMAGE_TOKEN, VOCABULARY, reduced
from tests.families.small_llama import write_tokenizer
from tests.families.tiny_families import FAMILIES as TINY

PROCESSOR, NESTED, TOKENIZER_CONFIG = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**12, 10**400, -(10**12), 0.5, -0.5, 1e-300, 1e300, 1.7976931348623157e308,
    "", "x", "16", "\n[/red]", "a" * 10**5, [], [0], [1, 2], [-1, "x"], [[1, 2]], [None], [[]] * 3, {}, {"x": 1}, {"factor": "x"},
    {"rope_type": "yarn"}, {"height": -1}, [10**9] * 3, list(range(2000)),
)  # fmt: skip
"""NaN and infinity are no JSON, and refused as such."""

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Small:
    """A checkpoint without weights.

    Attributes:
        folder: of it.
        files: name -> content of its JSON files.
        options: of the recipe.
        known: its fields.
    """

    folder: Path
    files: Mapping[str, dict[str, Any]]
    options: Mapping[str, Any]
    known: KnownFields

    def open(self) -> OpenedModel:
        """Everything that is read before anything is traced."""
        recipe = Recipe.model_validate({"name": "x", "checkpoint": str(self.folder), **self.options})
        model = open_model(recipe)
        plan_for(recipe, model.spec, model.text_tower)
        return model

    def write(self, file: str, content: Any) -> None:
        """One of its files."""
        (self.folder / file).write_text(json.dumps(content))

    def changed(self, file: str, path: Path_, value: Any) -> None:
        """One of its files with another value in it."""
        content = deepcopy(self.files[file])
        target = content
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value
        self.write(file, content)

    def fields(self) -> Iterator[tuple[str, Path_]]:
        """Every field of every file: those that stand there, those inside them, and those that are followed and left out."""
        config = self.files[CONFIG]
        objects: list[tuple[str, Path_, Fields]] = [
            (CONFIG, (), self.known.config),
            (GENERATION, (), self.known.generation),
        ]
        for part, kinds in (("text_config", self.known.decoders), ("vision_config", self.known.towers)):
            if part in config:
                objects.append((CONFIG, (part,), kinds[config[part].get("model_type") or ""]))
        beside = [file for file in self.files if "/" in file]
        objects += [
            (file, (), CLIP_TOWER if file.endswith(f"/{CONFIG}") else SQUARE_PIXELS)
            for file in beside
            if "tower" in file
        ]
        objects += [
            (file, (part,), Fields())
            for file in beside
            if "clip/" in file
            for part in ("text_config", "vision_config")
        ]
        if self.known.processor is not None:
            objects += [(PROCESSOR, (), self.known.processor), (NESTED, (), PROCESSING)]
        seen = set()
        for file, prefix, fields in objects:
            content: Any = self.files[file]
            for name in prefix:
                content = content[name]
            names = [*content, *sorted(fields.followed | fields.only.keys())]
            for path in [(*prefix, name) for name in names]:
                seen.add((file, path))
                inner = content.get(path[-1])
                if isinstance(inner, dict) and inner is not config.get(path[-1]):
                    seen |= {(file, (*path, name)) for name in inner}
        seen |= {
            (CONFIG, (name,))
            for name in ("auto_map", "transformers_weights", "num_labels", "id2label", "dtype")
        }
        if TOKENIZER_CONFIG not in self.files:
            yield from sorted(seen)
            return
        seen |= {(TOKENIZER_CONFIG, (name,)) for name in ("added_tokens_decoder", "add_bos_token")}
        seen.add((TOKENIZER_CONFIG, ("added_tokens_decoder", "4")))
        seen.add((TOKENIZER_CONFIG, ("added_tokens_decoder", "4", "content")))
        yield from sorted(seen)


def small(folder: Path, name: str, tokenizer: Path) -> Small:
    """A checkpoint of a family with nothing but headers.

    Args:
        folder: where it is made.
        name: of `NAMES`.
        tokenizer: a tokenizer.json whose placeholder is `IMAGE_TOKEN`.
    """
    family = name.removesuffix("_mistral")
    if name in TINY:
        config, processor = TINY[name].config, TINY[name].processor
    else:
        config, processor = reduced(PUBLISHED[name], name)
    placeholder = PLACEHOLDERS.get(family, "<|image_pad|>" if family.startswith("qwen") else "<image>")
    described = {"content": placeholder, "special": True, "normalized": False}
    prompt = f"USER : {placeholder} where is {{expression}} ? ASSISTANT :"
    files: dict[str, dict[str, Any]] = {
        CONFIG: dict(config),
        GENERATION: {"eos_token_id": [2], "bos_token_id": 1},
    }
    options: dict[str, Any] = {"prompt": prompt, "keep": 0.5, "pruner": "random"}
    if processor:
        files |= {PROCESSOR: dict(processor), NESTED: {}}
        files[TOKENIZER_CONFIG] = {"added_tokens_decoder": {str(IMAGE_TOKEN): described}}
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(tokenizer.read_text().replace("<image>", placeholder))
    else:  # the placeholder is added behind the vocabulary, or stands in it; the tower lies beside the model
        files |= {
            f"tower/{CONFIG}": {"model_type": "clip_vision_model", **_TOWER},
            f"tower/{PROCESSOR}": _PIXELS,
        }
        options["vision_tower"] = str(folder / "tower")
        (folder / "tower").mkdir(parents=True)
        write_tokenizer(folder, ["<im_patch>"] if name == "shikra" else [])
        _headers(folder / "tower", "x")
    _headers(folder, "x")
    if name == "llava":  # with a text tower
        files |= {f"clip/{CONFIG}": {"model_type": "clip", "projection_dim": 16, **_CLIP}}
        options |= {"text_tower": str(folder / "clip"), "pruner": "trim"}
        (folder / "clip").mkdir()
        _headers(
            folder / "clip",
            "text_projection.weight",
            "text_model.final_layer_norm.weight",
            "visual_projection.weight",
        )
        _end_texts(tokenizer, folder / "clip" / "tokenizer.json")
    made = Small(folder, files, options, FAMILIES[family])
    for file, content in files.items():
        made.write(file, content)
    assert VOCABULARY > IMAGE_TOKEN
    return made


def _headers(folder: Path, *keys: str) -> None:
    save_file({key: np.zeros((1, 32), np.float32) for key in keys}, folder / "model.safetensors")


def _end_texts(tokenizer: Path, target: Path) -> None:
    """The tokenizer with a token that ends every text."""
    ending = Tokenizer.from_file(str(tokenizer))
    ending.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    ending.save(str(target))


_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 36,
    "patch_size": 6,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP: dict[str, Any] = {
    "text_config": {
        **_TOWER,
        "vocab_size": 64,
        "max_position_embeddings": 12,
        "eos_token_id": 2,
        "projection_dim": 16,
    },
    "vision_config": _TOWER,
}
_PIXELS: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 36, "width": 36},
    "resample": 3,
    "rescale_factor": 1 / 255,
}
PUBLISHED = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_original": "liuhaotian/llava-v1.5-7b",
    "shikra": "shikras/shikra-7b-delta-v1",
}
PLACEHOLDERS = {"internvl": "<IMG_CONTEXT>", "shikra": "<im_patch>"}
NAMES = (*PUBLISHED, *TINY)
