"""Stand-ins for published checkpoints: complete, the same every time, and built like any other."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.checkpoint import open_checkpoint, random_weights
from gap_export.checkpoint.random_weights import CONFIGS, published, random_checkpoint
from gap_export.errors import BundleError, CheckpointError, MissingRequirementError
from gap_export.evaluation import validate
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def tiny(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A published model of a few kilobytes."""
    content = {
        "config": json.loads((tiny_checkpoint / "config.json").read_text()) | {"torch_dtype": "float16"},
        "preprocessor_config": json.loads((tiny_checkpoint / "preprocessor_config.json").read_text()),
        "special_tokens": {"<unk>": 3, "<s>": 1, "</s>": 2, "<image>": 4},
    }
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "owner--tiny.json").write_text(json.dumps(content))
    monkeypatch.setattr(random_weights, "CONFIGS", configs)
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "owner/tiny"


def recipe(checkpoint: str, **changes: Any) -> Recipe:
    options = {
        "name": "tiny",
        "checkpoint": checkpoint,
        "weights": "random",
        "max_text": 64,
        "max_new_tokens": 4,
    }
    return Recipe.model_validate({**options, "prompt": "<image> {expression}", **changes})


def test_a_stand_in_is_built_like_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    bundle = build(recipe(tiny), tmp_path / "out", golden=False).bundle
    assert bundle.manifest.checkpoint == "random"
    folder = tmp_path / "cache" / "gap-export" / "random" / "owner--tiny"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    written = [shard.stat().st_mtime_ns for shard in shards]
    again = random_checkpoint(tiny)
    assert [shard.stat().st_mtime_ns for shard in sorted(again.glob("*.safetensors"))] == written
    with pytest.raises(BundleError, match="holds random weights, which ground nothing"):
        validate.validate(bundle.folder, limit=4)


def test_weights_are_the_same_every_time(tiny: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        random_weights.write_checkpoint(tmp_path / name, published(tiny))
    for shard in (tmp_path / "one").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "other" / shard.name).read_bytes()


def test_a_full_disk_leaves_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(MissingRequirementError, match="random weights take"):
        random_checkpoint(tiny)
    assert list((tmp_path / "cache" / "gap-export" / "random").iterdir()) == []


def test_what_is_not_known_is_refused(tiny: str) -> None:
    with pytest.raises(CheckpointError, match="sizes are not known") as caught:
        random_checkpoint("somebody/else")
    assert tiny in caught.value.hint


def test_every_recipe_has_its_published_config() -> None:
    """MiniGPT-v2 has none; that of its language model is the one that is read."""
    recipes = [load_recipe(name) for name in known_recipes() if name != "shapes"]
    wanted = {recipe.base if recipe.family == "minigpt_v2" else recipe.checkpoint for recipe in recipes}
    assert {file.stem.replace("--", "/") for file in CONFIGS.glob("*.json")} == wanted
    sources = (CONFIGS / "SOURCES.md").read_text()
    assert all(f"| `{file.stem}` |" in sources for file in CONFIGS.glob("*.json"))


def test_a_model_in_pieces_has_no_stand_in() -> None:
    with pytest.raises(CheckpointError, match="its pieces lie in several checkpoints") as caught:
        random_checkpoint("liuhaotian/llava-v1.5-7b")
    assert "llava-hf/llava-1.5-7b-hf" in caught.value.hint
    assert "liuhaotian" not in caught.value.hint


@pytest.mark.parametrize("name", random_weights.stand_ins())
def test_every_stand_in_is_what_its_family_takes(name: str, tmp_path: Path) -> None:
    """At full size, as headers over holes: its keys and shapes, its prompt, its preprocessing, and the recipe that it belongs to."""
    from gap_export.checkpoint.random_weights import _shapes, _write_tokenizer
    from gap_export.families import open_family
    from gap_export.inputs.prompt import encode_prompts
    from gap_export.inputs.tokenizer import load_tokenizer
    from gap_export.plan import plan_for
    from tests.families.published.files import write

    content = published(name)
    recipe = next(r for r in map(load_recipe, known_recipes()) if r.checkpoint == name)
    (tmp_path / "config.json").write_text(json.dumps(content.config))
    folder = write(tmp_path / "checkpoint", content.config, _shapes(tmp_path))
    (folder / "preprocessor_config.json").write_text(json.dumps(content.preprocessor_config))
    _write_tokenizer(folder / "tokenizer.json", content.special_tokens)
    checkpoint = open_checkpoint(folder)
    family = open_family(checkpoint)
    assert family.row.name == recipe.family
    assert family.notes == ()
    sizes = family.spec(recipe)
    plan = plan_for(recipe, sizes)
    found = {
        part.weight_key(parameter)
        for part in family.components(sizes, plan)
        for parameter, _ in part.module.named_parameters()
    }
    # (A tower's layers above those that are used, and its norms, are in the checkpoint too.)
    assert len(found) > 0.9 * len(checkpoint.weights)
    prompts = encode_prompts(
        load_tokenizer(folder / "tokenizer.json"),
        family.prompt(recipe),
        ["object"],
        vocabulary=sizes.vocabulary,
        kept=plan.pruning.max_tokens,
        capacity=plan.capacity,
        max_new_tokens=recipe.max_new_tokens,
    )
    assert prompts.text_before[0] > 0
    assert {"fp16": "float16", "bf16": "bfloat16"}[recipe.precision] == content.dtype


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    import torch

    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    stored = torch.from_numpy(random_weights._bfloat16(numbers).view(np.int16)).view(torch.bfloat16)
    assert np.abs(stored.float().numpy() - numbers).max() <= 2**-7 * np.abs(numbers).max()
    assert not np.array_equal(stored.float().numpy(), numbers)


def test_a_stand_in_has_the_layout_that_families_read(tiny: str) -> None:
    assert "model.language_model.norm.weight" in open_checkpoint(random_checkpoint(tiny)).weights
