"""A family that is registered from outside the package, whose image tokens see each other: held against plain torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gap_export import families, linter, prune
from gap_export.boxes import codecs
from gap_export.bundle.folder import Bundle
from gap_export.errors import LintError, RecipeError
from gap_export.families import table
from gap_export.pipeline.build import build
from gap_export.pipeline.graphs import export_graphs
from gap_export.positions import visible
from gap_export.recipe.recipe import Recipe, load_recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.shared_prefix import common_length, continue_answers, prefill_shared
from gap_export.runtime.torch.reference import open_torch
from tests.families import toy_family
from tests.families.plain_models import Llama, llama_shapes, random_weights, spliced
from tests.families.small_llama import write_tokenizer

pytestmark = pytest.mark.slow

SIZE, PATCH, TOWER, WIDTH, LAYERS, HEADS, KV_HEADS, EPS, THETA = 32, 8, 24, 64, 2, 4, 2, 1e-6, 100.0
VOCABULARY, VISUAL, KEPT, NEW = 64, 16, 8, 12
IMAGE_TOKEN = VOCABULARY - 1
EXPRESSIONS = ("the red mug", "a large blue circle on the left")
IMAGES = (
    Image.linear_gradient("L").convert("RGB").resize((50, 31)),
    Image.effect_noise((33, 40), 90).convert("RGB"),
)
CAUSAL = dataclasses.replace(
    toy_family.ROW,
    name="toy_causal",
    implementation="tests.families.toy_family:CausalToy",
    model_types=("toy_causal",),
    attention_mask="causal",
)
UNTRUE = dataclasses.replace(
    CAUSAL, name="toy_untrue", model_types=("toy_untrue",), attention_mask="image_blocks"
)
"""It says that image tokens see each other, and builds the causal mask."""
ROWS = {row.name: row for row in (toy_family.ROW, CAUSAL, UNTRUE)}


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """The rows are in the tables while this module's tests run, and no longer."""
    codecs.register(toy_family.CODEC)
    for row in ROWS.values():
        families.register(row)
    yield
    del codecs.CODECS[toy_family.CODEC.name]
    for name in ROWS:
        del table._ROWS[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every family, with the same random weights."""
    weights = random_weights(
        {
            "tower.patch.weight": (TOWER, 3, PATCH, PATCH),
            "tower.patch.bias": (TOWER,),
            "tower.positions": (VISUAL, TOWER),
            "tower.hidden.weight": (TOWER, TOWER),
            "tower.hidden.bias": (TOWER,),
            "tower.norm.weight": (TOWER,),
            "tower.norm.bias": (TOWER,),
            "projector.weight": (WIDTH, TOWER),
            "projector.bias": (WIDTH,),
            **{
                f"decoder.{key}": shape
                for key, shape in llama_shapes(
                    vocabulary=VOCABULARY,
                    width=WIDTH,
                    hidden=96,
                    layers=LAYERS,
                    heads=HEADS,
                    kv_heads=KV_HEADS,
                ).items()
            },
        },
        seed=5,
    )
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": EPS,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    vision = {"size": SIZE, "patch": PATCH, "width": TOWER}
    folders = {}
    for name in ROWS:
        folders[name] = tmp_path_factory.mktemp(name)
        save_file(weights, folders[name] / "model.safetensors")
        config = {"model_type": name, "text_config": text, "vision": vision, "image_token_id": IMAGE_TOKEN}
        (folders[name] / "config.json").write_text(json.dumps(config))
        write_tokenizer(folders[name], ["<image>"])
    return folders


def recipe_of(checkpoint: Path, family: str = "toy", **changes: Any) -> Recipe:
    recipe = load_recipe(str(Path(__file__).with_name("toy.yaml")))
    return recipe.replaced(checkpoint=str(checkpoint), family=family, **changes)


@pytest.fixture(scope="module")
def bundle_of(
    registered: None, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    built: dict[str, Bundle] = {}

    def bundle(family: str = "toy", **changes: Any) -> Bundle:
        name = "-".join([family, *map(str, changes.values())])
        if name not in built:
            recipe = recipe_of(checkpoints[family], family, **changes)
            built[name] = build(recipe, tmp_path_factory.mktemp("bundles") / "out", golden=False).bundle
        return built[name]

    return bundle


def asked(session: Any, bundle: Bundle, rows: list[int]) -> Generation:
    grounder = Grounder(bundle)
    return generate(
        session,
        grounder.prepare([IMAGES[row] for row in rows]),
        grounder.prompts([EXPRESSIONS[row] for row in rows], NEW).input_ids,
        max_new_tokens=NEW,
        eos_token_ids=(),
        keep_logits=True,
    )


def plain_tower(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """[N, E], patch by patch."""
    rows = []
    for number in range(VISUAL):
        down, across = divmod(number, SIZE // PATCH)
        patch = image[:, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH]
        x = (weights["tower.patch.weight"] * patch).sum(dim=(1, 2, 3)) + weights["tower.patch.bias"]
        x = x + weights["tower.positions"][number]
        inner = weights["tower.hidden.weight"] @ x + weights["tower.hidden.bias"]
        x = x + inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        rows.append(x * weights["tower.norm.weight"] + weights["tower.norm.bias"])
    return torch.stack(rows)


def plain_answer(
    bundle: Bundle, checkpoint: Path, row: int, kept: list[int], *, sees_each_other: bool
) -> tuple[list[int], list[int], list[torch.Tensor]]:
    """(position ids, tokens, logits) of one question, the whole sequence anew for every token."""
    weights = load_file(checkpoint / "model.safetensors")
    own = {
        key.removeprefix("decoder."): value for key, value in weights.items() if key.startswith("decoder.")
    }
    grounder = Grounder(bundle)
    pixels = torch.from_numpy(grounder.prepare([IMAGES[row]]).calls[0]["pixel_values"][0])
    features = plain_tower(weights, pixels)[kept]
    ids = [int(id_) for id_ in grounder.prompts([EXPRESSIONS[row]], NEW).input_ids[0] if id_ >= 0]
    first = ids.index(IMAGE_TOKEN)
    blocks = ((first, first + len(kept)),) if sees_each_other else ()
    decoder = Llama(own, LAYERS, HEADS, KV_HEADS, EPS, THETA, blocks)
    tokens = features @ weights["projector.weight"].T + weights["projector.bias"]
    embeds, positions, following = spliced(decoder, ids, IMAGE_TOKEN, tokens, kept, VISUAL)
    return positions, *decoder.answer(embeds, positions, following, NEW)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]], ids=str)
def test_graphs_are_the_model(
    rows: list[int], bundle_of: Callable[..., Bundle], checkpoints: dict[str, Path]
) -> None:
    """Every graph in ONNX Runtime, gapped ids, twelve tokens, one prompt and two: against plain torch."""
    bundle = bundle_of()
    assert bundle.manifest.family == "toy"
    made = asked(open_session(bundle, "onnxruntime", threads=1), bundle, rows)
    for number, row in enumerate(rows):
        kept = made.kept_indices[number].tolist()
        assert len(set(kept)) == KEPT < VISUAL
        positions, tokens, logits = plain_answer(bundle, checkpoints["toy"], row, kept, sees_each_other=True)
        assert made.placement.position_ids[number, : len(positions)].tolist() == positions
        assert made.tokens[number] == tokens
        for mine, theirs in zip(made.logits, logits, strict=True):
            np.testing.assert_allclose(mine[number], theirs.numpy(), atol=1e-4)


def test_the_causal_graph_of_the_same_weights_is_another_model(
    bundle_of: Callable[..., Bundle], checkpoints: dict[str, Path]
) -> None:
    """The comparison above can fail; and what it fails against is the causal model, and no accident."""
    bundle = bundle_of("toy_causal")
    made = asked(open_session(bundle, "onnxruntime", threads=1), bundle, [0])
    kept = made.kept_indices[0].tolist()
    prefix, causal = (
        plain_answer(bundle, checkpoints["toy_causal"], 0, kept, sees_each_other=sees)[2][0].numpy()
        for sees in (True, False)
    )
    assert np.abs(made.logits[0][0] - prefix).max() > 1e-2
    np.testing.assert_allclose(made.logits[0][0], causal, atol=1e-4)


@pytest.mark.parametrize("family", ["toy", "toy_causal"])
def test_the_reference_of_validate_is_the_same_model(family: str, bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(family)
    mine, theirs = (
        asked(session, bundle, [0, 1])
        for session in (open_session(bundle, "onnxruntime", threads=1), open_torch(bundle))
    )
    np.testing.assert_array_equal(mine.kept_indices, theirs.kept_indices)
    assert mine.tokens == theirs.tokens
    for one, other in zip(mine.logits, theirs.logits, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_expressions_share_the_image(bundle_of: Callable[..., Bundle]) -> None:
    """The image's tokens see no text after them, so what is common to all prompts is computed once."""
    bundle = bundle_of()
    session, grounder = open_session(bundle, "onnxruntime", threads=1), Grounder(bundle)
    ids = grounder.prompts(EXPRESSIONS, NEW).input_ids
    shared = common_length(ids, IMAGE_TOKEN)
    assert shared > int(np.flatnonzero(ids[0] == IMAGE_TOKEN)[0])
    prefix = prefill_shared(session, grounder.prepare([IMAGES[0]]), ids[0, :shared])
    together = continue_answers(session, prefix, ids[:, shared:], max_new_tokens=NEW, eos_token_ids=())
    apart = generate(
        session, grounder.prepare([IMAGES[0]] * 2), ids, max_new_tokens=NEW, eos_token_ids=(), keep_logits=True
    )  # fmt: skip
    assert together.tokens == apart.tokens
    np.testing.assert_allclose(together.logits[0], apart.logits[0], atol=1e-4)


# What lint says of the mask


@pytest.mark.parametrize(("family", "other"), [("toy", "causal"), ("toy_causal", "image_blocks")])
def test_a_decoder_is_held_to_the_mask_of_its_spec(
    family: str, other: Any, bundle_of: Callable[..., Bundle]
) -> None:
    bundle = bundle_of(family)
    own = bundle.manifest.spec.attention_mask
    assert own != other
    decoder = bundle.graph_path("decoder")
    for declared in (own, None):
        linter.lint_graph(decoder, strict=True, mask=declared).raise_for_errors()
    refused = linter.lint_graph(decoder, strict=True, mask=other)
    assert {finding.rule for finding in refused.errors} == {"mask-is-as-declared"}


def test_a_family_that_says_one_mask_and_builds_another_is_refused(
    registered: None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_of(checkpoints["toy_untrue"], "toy_untrue")
    with pytest.raises(LintError, match="mask-is-as-declared"):
        export_graphs(recipe, tmp_path, only=["decoder"])


def test_who_sees_whom() -> None:
    """A prompt of seven slots with an image in slots 2, 3, 4; then the token after it."""
    image = np.array([[[2, 5]]])
    seen = visible("image_blocks", np.arange(7)[None], 9, image)[0]
    for query in range(7):
        sees = set(range(query + 1)) | ({2, 3, 4} if query in (2, 3, 4) else set())
        assert set(np.flatnonzero(seen[query]).tolist()) == sees
    assert visible("image_blocks", np.array([[7]]), 9, image).sum() == 8
    assert (visible("causal", np.arange(7)[None], 9) == np.tri(7, 9, dtype=bool)).all()


# The row


def test_pruners_inside_the_decoder_are_refused(registered: None, checkpoints: dict[str, Path]) -> None:
    inside = set(prune.names(in_decoder=True))
    assert not inside & set(families.row("toy").pruners)
    assert inside <= set(families.row("toy_causal").pruners)
    with pytest.raises(RecipeError, match="attention mask"):
        export_graphs(recipe_of(checkpoints["toy"], pruner="fastv"), Path(), only=["decoder"])


def test_boxes_are_read_by_the_codec_that_came_along(bundle_of: Callable[..., Bundle]) -> None:
    box = bundle_of().manifest.box
    assert (box.codec, box.frame) == ("toy", "image")
    codec = codecs.CODECS[box.codec]
    assert codec.decode_one("there: <100 200 300 400>") == (0.1, 0.2, 0.3, 0.4)
    with pytest.raises(ValueError, match="'toy' is in the table already"):
        codecs.register(toy_family.CODEC)


def test_engines_are_built(bundle_of: Callable[..., Bundle]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    bundle = bundle_of(precision="fp16", targets=["tensorrt-rtx"])
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}
