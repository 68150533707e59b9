"""What linear layers read of a text, against transformers; builds with a calibration text; and texts that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch._subclasses import FakeTensor
from transformers import LlavaForConditionalGeneration

from gap_export import linter
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import CheckpointError, InputError, RecipeError
from gap_export.evaluation.validate import _recipe_here
from gap_export.files import sha256_of
from gap_export.graph.quantize.calibration import Moments, hand_over_moments
from gap_export.graph.quantize.store import FILE
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.components import Component
from gap_export.pipeline.graphs import export_graphs
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.plan import plan_for
from gap_export.progress import SILENT, Progress
from gap_export.recipe.calibration import CALIBRATION, read_calibration
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder
from tests.prose import prose


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prose(tmp_path_factory.mktemp("texts"), 600)


@pytest.fixture
def decoder(tiny_options: dict[str, Any]) -> Callable[..., tuple[Component, OpenedModel]]:
    """`decoder(**recipe)`: the component that holds the decoder, and its model."""

    def opened(**changes: Any) -> tuple[Component, OpenedModel]:
        recipe = Recipe.model_validate({**tiny_options, **changes})
        model = open_model(recipe)
        components = model.components(plan_for(recipe, model.spec, model.text_tower))
        return next(each for each in components if hasattr(each.module, "language_model")), model

    return opened


def linear_keys(component: Component) -> dict[str, str]:
    names = [
        f"{name}.weight"
        for name, module in component.module.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    return {name: component.weight_key(name) for name in names}


def measured(component: Component, model: OpenedModel, ids_BS: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def receive(moments: Moments) -> None:
        found.update(dict.fromkeys(moments.keys, moments.moments_KK))

    hand_over_moments(receive, component, model.checkpoint, ids_BS, linear_keys(component), SILENT)
    return found


def of_transformers(checkpoint: Path, ids_BS: Any) -> dict[str, Any]:
    """Module of the language model -> X^T X in float64, from a plain model, one call at a time."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    found: dict[str, Any] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def saw(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            found[name] = found.get(name, 0) + (rows.T @ rows).numpy()

        module.register_forward_pre_hook(saw)

    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    with torch.no_grad():
        for ids in torch.from_numpy(ids_BS):
            model.model.language_model(ids[None])
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "int4"},
        {"precision": "int4-fp16"},
        {"precision": "int4", "pruner": "fastv", "prune_layers": (1,), "keep": 0.25},
    ],
    ids=["int4", "int4-fp16", "dropping tokens"],
)
def test_moments_are_those_of_transformers(
    changes: dict[str, Any], decoder: Callable[..., tuple[Component, OpenedModel]], tiny_checkpoint: Path
) -> None:
    component, model = decoder(**changes)
    ids_BS = np.random.default_rng(1).integers(5, 60, (3, 40))
    before = [id(parameter) for parameter in component.module.parameters()]
    language_model: Any = component.module.language_model

    found = measured(component, model, ids_BS)

    assert [id(parameter) for parameter in component.module.parameters()] == before
    assert all(isinstance(each.data, FakeTensor) for each in component.module.parameters())
    assert language_model.config._attn_implementation == IMPLEMENTATION
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in component.module.modules()), (
        "hooks are left"
    )
    wanted = of_transformers(tiny_checkpoint, ids_BS)
    keys = {name: component.weight_key(f"language_model.{name}.weight") for name in wanted}
    assert len(keys) == 2 * 7
    assert set(found) == set(keys.values())
    for name, moments_KK in wanted.items():
        np.testing.assert_allclose(
            found[keys[name]], moments_KK, rtol=1e-4, atol=1e-4 * moments_KK.diagonal().mean()
        )
    assert found[keys["layers.0.self_attn.q_proj"]] is found[keys["layers.0.self_attn.v_proj"]]
    assert found[keys["layers.0.mlp.gate_proj"]] is found[keys["layers.0.mlp.up_proj"]]


def test_a_layer_has_weights_only_while_it_computes(
    decoder: Callable[..., tuple[Component, OpenedModel]],
) -> None:
    component, model = decoder(precision="int4")
    layers = component.module.language_model.layers  # type: ignore[union-attr]
    seen: list[int] = []

    def receive(_: Moments) -> None:
        real = [
            parameter
            for layer in layers  # type: ignore[union-attr]
            for parameter in layer.parameters()
            if not isinstance(parameter.data, FakeTensor)
        ]
        seen.append(len(real))

    hand_over_moments(
        receive, component, model.checkpoint, np.full((1, 8), 7), linear_keys(component), SILENT
    )
    assert seen == [0] * 8, "two layers, four different activations in each"


def test_a_fault_leaves_no_weights_behind(decoder: Callable[..., tuple[Component, OpenedModel]]) -> None:
    component, model = decoder(precision="int4")

    def receive(_: Moments) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand_over_moments(
            receive, component, model.checkpoint, np.full((1, 8), 7), linear_keys(component), SILENT
        )
    assert all(isinstance(each.data, FakeTensor) for each in component.module.parameters())
    assert not any(each._forward_pre_hooks for each in component.module.modules())


def test_activations_that_overflow_are_named(
    decoder: Callable[..., tuple[Component, OpenedModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gap_export.graph.quantize import calibration

    read = calibration._Weights.embedded
    monkeypatch.setattr(calibration._Weights, "embedded", lambda self, ids: read(self, ids) * torch.nan)
    component, model = decoder(precision="int4")
    with pytest.raises(CheckpointError, match="overflow"):
        measured(component, model, np.full((1, 8), 7))


@pytest.mark.parametrize("precision", ["int4", "int4-fp16"])
def test_a_bundle_built_with_a_text(
    precision: str, text: Path, tiny_bundle: Callable[..., Bundle], low: Callable[[str], Bundle]
) -> None:
    bundle = open_bundle(tiny_bundle(precision=precision, calibration=str(text)).folder, every_hash=True)
    plain = low(precision)
    assert (bundle.folder / CALIBRATION).read_text() == text.read_text()
    assert bundle.manifest.files[CALIBRATION].sha256 == sha256_of(text)
    assert bundle.manifest.recipe.calibration == str(text)
    mine, others = (load_file(each.folder / FILE) for each in (bundle, plain))
    assert mine.keys() == others.keys()
    numbers = {name for name in mine if name.endswith("int4") and "layers" in name}
    assert len(numbers) >= 12
    assert all((mine[name] != others[name]).any() for name in numbers)
    untouched = {name for name in mine if "lm_head" in name}
    assert all((mine[name] == others[name]).all() for name in untouched)
    linter.lint_graph(bundle.graph_path("decoder"), kind="decoder", strict=True).raise_for_errors()
    with open_session(bundle, "onnxruntime", threads=1) as session:
        assert Grounder(bundle).ground(session, [Image.new("RGB", (36, 36))], ["the red circle"])


def test_baselines_of_a_validation_take_the_bundles_own_text(
    text: Path, tiny_bundle: Callable[..., Bundle]
) -> None:
    """The text may be gone by then."""
    bundle = tiny_bundle(precision="int4", calibration=str(text))
    recipe = _recipe_here(bundle, None, None, None)
    assert recipe.calibration == str(bundle.folder / CALIBRATION)
    assert open_model(recipe).calibration is not None


def test_outputs_of_layers_change_less(
    text: Path,
    tiny_bundle: Callable[..., Bundle],
    decoder: Callable[..., tuple[Component, OpenedModel]],
    tiny_checkpoint: Path,
) -> None:
    """The weights that lie in the bundle, read back, against those of the checkpoint: errors weighed by what the layers read."""
    component, model = decoder(precision="int4", calibration=str(text))
    assert model.calibration is not None
    moments = measured(component, model, model.calibration.ids_BS)
    stored = load_file(tiny_checkpoint / "model.safetensors")
    bundles = tiny_bundle(precision="int4", calibration=str(text)), tiny_bundle(precision="int4")
    files = [load_file(bundle.folder / FILE) for bundle in bundles]
    better = 0
    for key, moments_KK in moments.items():
        losses = []
        for file in files:
            if f"{key}.uint4" not in file:
                continue
            errors_NK = read_back(file, key, stored[key].shape) - stored[key]
            losses.append(float((errors_NK @ moments_KK * errors_NK).sum()))
        if losses:
            assert losses[0] < losses[1], key
            better += 1
    assert better >= 12


def read_back(file: dict[str, Any], key: str, shape: tuple[int, ...]) -> Any:
    """[N, K] floats of a weight in uint4, of the bytes that lie in the file."""
    columns, inner = shape
    numbers, zeros = (
        np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1, columns).astype(np.float64)
        for packed in (file[f"{key}.uint4"], file[f"{key}.zero"])
    )
    scales = file[f"{key}.scale"].reshape(-1, columns)
    return ((numbers - zeros.repeat(32, axis=0)) * scales.repeat(32, axis=0)).T.reshape(columns, inner)


class Recorded:
    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.count = 0

    def stage(self, message: str, total: int | None = None) -> None:
        self.totals[message] = total

    def advance(self, count: int = 1) -> None:
        self.count += count


def test_progress_counts_layers(
    text: Path, tiny_options: dict[str, Any], tracer: Any, tmp_path: Path
) -> None:
    recorded = Recorded()
    progress: Progress = recorded
    recipe = Recipe.model_validate({**tiny_options, "precision": "int4", "calibration": str(text)})
    export_graphs(recipe, tmp_path, only={"decoder"}, tracer=tracer, progress=progress)
    assert recorded.totals["calibrating the decoder's layers"] == 2
    assert recorded.count == 2


def test_graphs_without_a_decoder_read_no_text(
    text: Path, tiny_options: dict[str, Any], tracer: Any, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({**tiny_options, "precision": "int4", "calibration": str(text)})
    export_graphs(recipe, tmp_path, only={"embed"}, tracer=tracer)
    assert not (tmp_path / CALIBRATION).exists()


def test_how_much_of_a_text_is_read(
    text: Path, decoder: Callable[..., tuple[Component, OpenedModel]], tmp_path: Path
) -> None:
    _, model = decoder()
    wanted = {"vocabulary": model.spec.vocabulary}
    assert read_calibration(text, model.tokenizer, max_positions=256, **wanted).ids_BS.shape == (2, 256)
    assert read_calibration(text, model.tokenizer, max_positions=9999, **wanted).ids_BS.shape == (1, 512)
    long = prose(tmp_path, 20000, name="long.txt")
    read = read_calibration(long, model.tokenizer, max_positions=2048, **wanted)
    assert read.ids_BS.shape == (8, 512)
    (tmp_path / CALIBRATION).write_text(read.text)
    again = read_calibration(tmp_path / CALIBRATION, model.tokenizer, max_positions=2048, **wanted)
    np.testing.assert_array_equal(again.ids_BS, read.ids_BS)
    assert len(read.text) < len(long.read_text())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-blocks"])
def test_other_precisions_have_no_use_for_a_text(
    precision: str, text: Path, decoder: Callable[..., tuple[Component, OpenedModel]]
) -> None:
    with pytest.raises(RecipeError, match="no use for a calibration text") as refused:
        decoder(precision=precision, calibration=str(text))
    assert "int4 or int4-fp16" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "has 1 tokens"),
        (b"where is " * 255, "has 511 tokens"),
        (("where is " * 300).encode("utf-16"), "is not UTF-8"),
        (("where is " * 300).encode("utf-16-le"), "holds null bytes"),
    ],
    ids=["missing", "empty but for the first token", "short", "UTF-16", "UTF-16 without a mark"],
)
def test_texts_that_are_refused(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    decoder: Callable[..., tuple[Component, OpenedModel]],
) -> None:
    if content is not None:
        (tmp_path / "prose.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        decoder(precision="int4", calibration=str(tmp_path / "prose.txt"))
    assert "prose.txt" in refused.value.subject
    assert "\n" not in str(refused.value)


def test_tokens_without_an_embedding_are_refused(
    text: Path, decoder: Callable[..., tuple[Component, OpenedModel]]
) -> None:
    _, model = decoder()
    with pytest.raises(InputError, match="embedding of 8 tokens"):
        read_calibration(text, model.tokenizer, vocabulary=8, max_positions=256)
