"""LLaVA-1.5 as its authors publish it, and Shikra: small random checkpoints in those layouts, held against plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gap_export.bundle.folder import Bundle
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import row_of
from gap_export.families.clip_llama import ClipLlama
from gap_export.families.shikra import Shikra
from gap_export.inputs.square import fit
from gap_export.pipeline.build import build_bundle
from gap_export.pipeline.opened import open_model
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.torch.staged import open_reference
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
from tests.families.plain_models import ClipTower, Llama, llama_shapes, random_weights, spliced
from tests.families.reduced import reduced
from tests.families.small_llama import HEADS, LAYERS, LLAMA, VOCABULARY, WIDTH, write_tokenizer

pytestmark = pytest.mark.slow

KEPT, VISUAL, NEW = 9, 36, 20
PROMPTS = {
    "llava_original": "USER : <image> where is {expression} ? ASSISTANT :",
    "shikra": "USER : where is {expression} in the picture <im_start><im_patch><im_end> ? ASSISTANT :",
}
CONFIGS = {
    "llava_original": reduced("liuhaotian/llava-v1.5-7b", "llava_original")[0],
    "shikra": reduced("shikras/shikra-7b-delta-v1", "shikra")[0],
}
"""As published, but for sizes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("original")


@pytest.fixture(scope="module")
def original(folder: Path) -> Path:
    """`liuhaotian/llava-v1.5-*`: two .bin shards and their index, no token for the image, the tower beside it."""
    target = folder / "llava-v1.5"
    target.mkdir()
    weights = random_weights(
        {
            **llama_shapes(vocabulary=VOCABULARY, **LLAMA),
            "model.mm_projector.0.weight": (WIDTH, 32),
            "model.mm_projector.0.bias": (WIDTH,),
            "model.mm_projector.2.weight": (WIDTH, WIDTH),
            "model.mm_projector.2.bias": (WIDTH,),
        },
        seed=1,
    )
    names, half = list(weights), len(weights) // 2
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:half],
        "pytorch_model-00002-of-00002.bin": names[half:],
    }
    for file, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, target / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps(CONFIGS["llava_original"]))
    write_tokenizer(target, [])
    return target


@pytest.fixture(scope="module")
def shikra(folder: Path) -> dict[str, Path]:
    """Shikra as a delta over a base with three tokens fewer, that base, and both merged."""
    base = random_weights(llama_shapes(vocabulary=VOCABULARY - 3, **LLAMA), seed=2)
    merged = random_weights(llama_shapes(vocabulary=VOCABULARY, **LLAMA), seed=3)
    delta = {}
    for key, value in merged.items():
        delta[key] = value.clone()
        delta[key][: len(base[key])] -= base[key]
    own = random_weights(
        {"model.mm_projector.weight": (WIDTH, 32), "model.mm_projector.bias": (WIDTH,)}, seed=4
    )
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(LAYERS)}
    contents = {
        "llama-7b": base,
        "shikra-7b-delta-v1": {**delta, **own, **buffers},
        "merged": {**merged, **own},
    }
    folders = {}
    for name, weights in contents.items():
        folders[name] = folder / name
        folders[name].mkdir()
        save_file(weights, folders[name] / "model.safetensors")
        # The ids in the published config are wrong.
        config = {**CONFIGS["shikra"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
        if name == "llama-7b":
            config |= {"model_type": "llama", "vocab_size": VOCABULARY - 3}
        (folders[name] / "config.json").write_text(json.dumps(config))
        write_tokenizer(folders[name], ["<im_patch>", "<im_start>", "<im_end>"])
    return folders


Build = Callable[..., Bundle]


@pytest.fixture(scope="module")
def options(original: Path, shikra: dict[str, Path], tiny_text_tower: Path) -> dict[str, dict[str, Any]]:
    tower = {"vision_tower": str(tiny_text_tower), "max_new_tokens": NEW, "max_text": 24, "max_batch": 4}
    return {
        "llava_original": {**tower, "checkpoint": str(original), "prompt": PROMPTS["llava_original"]},
        "shikra": {
            **tower,
            "checkpoint": str(shikra["shikra-7b-delta-v1"]),
            "base": str(shikra["llama-7b"]),
            "prompt": PROMPTS["shikra"],
        },
        "shikra merged": {**tower, "checkpoint": str(shikra["merged"]), "prompt": PROMPTS["shikra"]},
    }


@pytest.fixture(scope="module")
def build(options: dict[str, dict[str, Any]], folder: Path) -> Build:
    bundles = {which: Bundles(given, folder / "bundles" / which) for which, given in options.items()}
    return lambda which, **changes: bundles[which](**changes)


def merged_weights(which: str, options: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    folder = Path(options[which]["checkpoint"])
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    if "base" in options[which]:
        for key, value in load_file(Path(options[which]["base"]) / "model.safetensors").items():
            weights[key][: len(value)] += value
    return weights


def plain_answers(
    which: str, options: dict[str, dict[str, Any]], bundle: Bundle, tower: Path, *, gap: bool = True
) -> list[PlainAnswer]:
    """Of every question."""
    weights = merged_weights(which, options)
    eps = CONFIGS[which.split()[0]]["rms_norm_eps"]
    decoder = Llama(weights, LAYERS, HEADS, HEADS, eps, 10000.0)
    clip = ClipTower(load_file(tower / "model.safetensors"), heads=2, patch=6)
    grounder = Grounder(bundle)
    prompts = grounder.prompts(EXPRESSIONS, NEW).input_ids
    answers = []
    for image, ids in zip(IMAGES, prompts, strict=True):
        pixels = torch.from_numpy(grounder.prepare([image]).calls[0]["pixel_values"][0])
        hidden, attention = clip.run(pixels, layers=2)  # of three: hidden state -2
        kept = sorted(attention.topk(KEPT).indices.tolist())
        tokens = hidden[1:][kept]
        if which == "llava_original":
            first, second = ("model.mm_projector.0", "model.mm_projector.2")
            inner = tokens @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]
            tokens = (
                torch.nn.functional.gelu(inner) @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]
            )
        else:
            tokens = tokens @ weights["model.mm_projector.weight"].T + weights["model.mm_projector.bias"]
        row = [int(id_) for id_ in ids if id_ >= 0]
        embeds, positions, following = spliced(
            decoder, row, bundle.manifest.prompt.image_token_id, tokens, kept, VISUAL
        )
        if not gap:
            positions, following = list(range(len(embeds))), len(embeds)
        answers.append((kept, positions, *decoder.answer(embeds, positions, following, NEW)))
    return answers


@pytest.mark.parametrize("which", ["llava_original", "shikra", "shikra merged"])
def test_graphs_are_the_model(
    which: str, build: Build, options: dict[str, dict[str, Any]], tiny_text_tower: Path
) -> None:
    """Every graph in ONNX Runtime, gapped ids, twenty tokens, one image and two: against plain torch."""
    bundle = build(which)
    assert bundle.manifest.family == which.split()[0]
    session = open_session(bundle, "onnxruntime", threads=1)
    truth = plain_answers(which, options, bundle, tiny_text_tower)
    for rows in ([0], [1], [0, 1]):
        assert_answers(asked(session, bundle, rows, NEW), [truth[row] for row in rows])


@pytest.mark.parametrize("which", ["llava_original", "shikra"])
def test_renumbered_ids_are_another_model(
    which: str, build: Build, options: dict[str, dict[str, Any]], tiny_text_tower: Path
) -> None:
    """The comparison above can fail: with the same tokens and renumbered ids, logits are far apart."""
    right = plain_answers(which, options, build(which), tiny_text_tower)
    wrong = plain_answers(which, options, build(which), tiny_text_tower, gap=False)
    assert difference(right, wrong) > 1e-2


@pytest.mark.parametrize("which", ["llava_original", "shikra"])
def test_the_reference_of_validate_is_the_same_model(
    which: str, build: Build, options: dict[str, dict[str, Any]], tiny_text_tower: Path
) -> None:
    bundle = build(which)
    given = options[which]
    parts = {name: Path(given[name]) for name in ("base", "vision_tower") if name in given}
    reference = open_reference(
        bundle.manifest.family, Path(given["checkpoint"]), bundle.manifest.pruning, parts=parts
    )
    truth = plain_answers(which, options, bundle, tiny_text_tower)
    assert_answers(asked(reference, bundle, [0, 1], NEW), truth)


def test_shikra_pads_with_white_and_llava_with_the_mean(build: Build) -> None:
    wide = Image.new("RGB", (40, 10), (10, 20, 30))
    corners = {
        which: np.asarray(fit(wide, build(which).manifest.layout))[0, 0].tolist()
        for which in ("llava_original", "shikra")
    }
    assert corners == {"llava_original": [122, 116, 104], "shikra": [255, 255, 255]}


def test_how_boxes_are_written(build: Build) -> None:
    shikra, llava = build("shikra").manifest, build("llava_original").manifest
    assert (shikra.box.codec, shikra.box.frame) == ("shikra", "padded_square")
    assert (llava.box.codec, llava.box.frame) == ("llava", "padded_square")
    assert shikra.prompt.eos_token_ids == (2,)


def test_the_placeholder_is_no_row_of_the_table(build: Build) -> None:
    """LLaVA's own tokenizer has no token for the image; it gets one beyond the table, and the splice never looks it up."""
    bundle = build("llava_original")
    assert bundle.manifest.prompt.image_token_id == VOCABULARY == bundle.manifest.spec.vocabulary
    content = json.loads(bundle.tokenizer_path.read_text())
    assert {"<image>": VOCABULARY}.items() <= {t["content"]: t["id"] for t in content["added_tokens"]}.items()


def test_only_what_changes_is_written(build: Build) -> None:
    """A merged checkpoint is linked whole; of a delta, every weight of the decoder is new and the tower is linked."""
    files = {which: build(which).manifest.files for which in ("shikra", "shikra merged", "llava_original")}
    own = {which: sum("weights-" in name for name in names) for which, names in files.items()}
    assert own == {"shikra": 1, "shikra merged": 0, "llava_original": 0}
    assert sum(name.endswith(".bin") for name in files["llava_original"]) == 2


@pytest.mark.parametrize("which", ["llava_original", "shikra"])
def test_engines_are_built(which: str, build: Build) -> None:
    bundle = build(which, precision="fp16", targets=["tensorrt-rtx"], max_new_tokens=4)
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}


def test_other_policies_build_too(build: Build) -> None:
    assert build("shikra merged", positions="shifted").manifest.pruning.positions is PositionPolicy.SHIFTED


# Bad input


def refused(options: dict[str, Any], out: Path, **changes: Any) -> CheckpointError | RecipeError:
    with pytest.raises((CheckpointError, RecipeError)) as caught:
        build_bundle(Recipe.model_validate({"name": "small", **options, **changes}), out)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("which", ["llava_original", "shikra"])
def test_a_part_that_is_missing_is_named(
    which: str, options: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    error = refused(options[which], tmp_path / "out", vision_tower=None)
    assert "has no vision tower" in str(error)
    assert "--vision-tower openai/clip-vit-large-patch14" in error.hint


def test_a_delta_needs_its_base(options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    error = refused(options["shikra"], tmp_path / "out", base=None)
    assert "delta over LLaMA-7B" in str(error)
    error = refused(options["llava_original"], tmp_path / "out", base="x/y")
    assert "has no place in this model" in str(error)


def test_a_delta_is_told_by_its_weights(
    options: dict[str, dict[str, Any]], shikra: dict[str, Path], tmp_path: Path
) -> None:
    """Folders are renamed, and the recipe of the delta names a base, which must not be added to weights that are whole."""
    renamed, whole = tmp_path / "shikra", tmp_path / "shikra-7b-delta-v1-merged"
    shutil.copytree(shikra["shikra-7b-delta-v1"], renamed)
    shutil.copytree(shikra["merged"], whole)
    file = whole / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    error = refused({**options["shikra"], "checkpoint": str(renamed)}, tmp_path / "out", base=None)
    assert "delta over LLaMA-7B" in str(error)
    for base in ("huggyllama/llama-7b", options["shikra"]["base"]):
        model = open_model(Recipe(name="x", **{**options["shikra"], "checkpoint": str(whole), "base": base}))
        assert model.recipe.base is None
        assert set(model.checkpoint.companions) == {"vision_tower"}


@pytest.mark.parametrize("damage", ["width", "layers"])
def test_a_delta_over_another_base(
    damage: str, options: dict[str, dict[str, Any]], shikra: dict[str, Path], tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(shikra["llama-7b"], tmp_path / "base"))
    sizes = {**LLAMA, "width": 32} if damage == "width" else {**LLAMA, "layers": LAYERS + 1}
    save_file(
        random_weights(llama_shapes(vocabulary=VOCABULARY - 3, **sizes), seed=2), wrong / "model.safetensors"
    )
    error = refused(options["shikra"], tmp_path / "out", base=str(wrong))
    expected = {"width": "is not what the delta was taken from", "layers": "that the delta does not change"}
    assert expected[damage] in str(error)


def test_weights_without_a_place_are_named(
    options: dict[str, dict[str, Any]], shikra: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shikra["merged"], tmp_path / "merged"))
    weights = load_file(copy / "model.safetensors")
    save_file(
        {**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, copy / "model.safetensors"
    )
    error = refused(options["shikra merged"], tmp_path / "out", checkpoint=str(copy))
    assert "no place for: model.layers.0.self_attn.q_norm.weight" in str(error)


def test_a_tokenizer_of_the_base_model(
    options: dict[str, dict[str, Any]], shikra: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shikra["merged"], tmp_path / "merged"))
    write_tokenizer(copy, [])
    error = refused(options["shikra merged"], tmp_path / "out", checkpoint=str(copy))
    assert "has no token <im_patch>" in str(error)


@pytest.mark.parametrize("which", ["llava_original", "shikra merged"])
def test_images_are_prepared_as_the_tower_says(
    which: str, options: dict[str, dict[str, Any]], tiny_text_tower: Path, tmp_path: Path
) -> None:
    """Both originals take the image processor from the tower's checkpoint; not all CLIP towers have OpenAI's mean."""
    tower = Path(shutil.copytree(tiny_text_tower, tmp_path / "tower"))
    file = tower / "preprocessor_config.json"
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.5], "size": 36, "crop_size": 36}

    def opened(**fields: Any) -> Any:
        file.write_text(json.dumps({**settings, **fields}))
        return open_model(Recipe(name="x", **{**options[which], "vision_tower": str(tower)}))

    model = opened()
    assert (model.layout.mean, model.layout.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 0.5))
    white = (255, 255, 255)
    assert model.layout.background == ((127, 102, 76) if which == "llava_original" else white)
    assert opened(sharpen=1).notes[0].startswith(f"{tower}: preprocessor_config.json: sharpen")
    for fields in ({"size": 224}, {"resample": 2}, {"do_normalize": False}):
        with pytest.raises(CheckpointError) as caught:
            opened(**fields)
        assert caught.value.subject == str(file)


def test_a_tower_of_another_kind(
    options: dict[str, dict[str, Any]], shikra: dict[str, Path], tmp_path: Path
) -> None:
    error = refused(options["shikra"], tmp_path / "out", vision_tower=str(shikra["llama-7b"]))
    assert "'llama' where a CLIP checkpoint is needed" in str(error)


def test_shikra_is_asked_as_its_authors_ask() -> None:
    """`REC` of their demo (mllm/demo/webdemo.py) in their conversation `vicuna_v1.1`, one `<im_patch>` standing for 256."""
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
    sentence = "Can you point out <expr> in the image <image> and provide the coordinates of its location?"
    asked = sentence.replace("<expr>", "{expression}").replace("<image>", "<im_start><im_patch><im_end>")
    assert Shikra.grounding_prompt == f"{system} USER: {asked} ASSISTANT:"


def test_layouts_are_told_apart(original: Path, shikra: dict[str, Path], tiny_checkpoint: Path) -> None:
    names = {
        folder: row_of(open_checkpoint(folder)).name
        for folder in (original, shikra["merged"], tiny_checkpoint)
    }
    assert list(names.values()) == ["llava_original", "shikra", "llava"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("image_aspect_ratio", "anyres"),
        ("image_aspect_ratio", None),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_resampler_type", "spatial_pool"),
        ("mm_vision_select_layer", [-2, -5]),
    ],
)
def test_fields_that_change_tokens_or_pixels_are_refused_by_name(
    field: str, value: Any, options: dict[str, dict[str, Any]], original: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps({**CONFIGS["llava_original"], field: value}))
    error = refused(options["llava_original"], tmp_path / "out", checkpoint=str(copy))
    assert f"{copy / 'config.json'}: {field} is " in str(error)


@pytest.mark.parametrize("which", ["llava_original", "shikra merged"])
def test_a_list_of_one_layer_is_that_layer(
    which: str, options: dict[str, dict[str, Any]], original: Path, tmp_path: Path
) -> None:
    source = Path(options[which]["checkpoint"])
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    config = json.loads((source / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "mm_vision_select_layer": [-2]}))
    given = {**options[which], "checkpoint": str(copy)}
    family = open_model(Recipe.model_validate({"name": "small", **given})).family
    assert isinstance(family, ClipLlama)
    assert family.config.feature_layer == 2  # of three
    assert family.notes == ()


@pytest.mark.long
@pytest.mark.parametrize("layout", ["llava_original", "shikra", "shikra merged"])
def test_layers_are_copied(layout: str, options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert_equal_both_ways(options[layout], tmp_path, copied=("vision", "decoder"))
