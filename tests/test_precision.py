"""The table of precisions: looked up, added to from outside the package, and light."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gap_export import precision as table
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import BundleError, RecipeError
from gap_export.graph.quantize.scheme import load_scheme
from gap_export.inputs.batch import of_one_size
from gap_export.plan import plan_for
from gap_export.precision import ACTIVATIONS, PRECISIONS, Precision, Thresholds, one_of, precision, register
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import generate
from gap_export.runtime.torch.reference import open_torch
from tests.graph.quantize import coarse_grid

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Precision:
    """The row from outside, which is gone after the test."""
    monkeypatch.setattr(table, "PRECISIONS", dict(PRECISIONS))
    register(coarse_grid.ROW)
    return coarse_grid.ROW


def test_a_precision_from_outside_is_built_and_runs(
    registered: Precision, tiny_bundle: Callable[..., Bundle], tiny_checkpoint: Path
) -> None:
    """One row and one module: recipe, plan, weights, graphs, manifest and session know it by them."""
    bundle = open_bundle(tiny_bundle(precision=registered.name).folder)
    assert bundle.manifest.precision == registered.name
    assert bundle.manifest.gates == registered.gates

    decoder = ir.load(bundle.graph_path("decoder")).graph
    found = {name.removesuffix(".grid") for name in decoder.initializers if name.endswith(".grid")}
    assert len(found) == 2 * 7, "two layers of seven; the head stays in floats"
    checkpoint = load_file(tiny_checkpoint / "model.safetensors")
    for name in found:
        numbers, step = (decoder.initializers[f"{name}.{piece}"].const_value for piece in ("grid", "step"))
        inner = name.removeprefix("language_model.")
        (weight,) = (w for key, w in checkpoint.items() if "language_model" in key and key.endswith(inner))
        assert step.numpy() == np.float32(np.abs(weight).max() / 127)
        np.testing.assert_array_equal(numbers.numpy().T, np.rint(weight / step.numpy()))
    assert bundle.manifest.graphs["vision"].operators["DequantizeLinear"] > 10

    ours, theirs = (
        prompt_logits(session)
        for session in (open_session(bundle, "onnxruntime", threads=1), open_torch(bundle))
    )
    assert not np.array_equal(ours, theirs)
    assert ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)) > 0.97


def prompt_logits(session: Any) -> NDArray[np.float32]:
    pixels = np.random.default_rng(1).standard_normal((2, 3, 36, 36), np.float32)
    ids = np.array([[1, 5, 6, 4, 7, 8, 9]] * 2, np.int64)
    answer = generate(
        session, of_one_size(pixels, 36), ids, max_new_tokens=1, eos_token_ids=(), keep_logits=True
    )
    return answer.logits[0].ravel()


def test_what_a_row_says_holds(
    registered: Precision, tiny_bundle: Callable[..., Bundle], tiny_options: dict[str, Any]
) -> None:
    recipe = Recipe.model_validate(
        {**tiny_options, "precision": registered.name, "targets": ["onnx", "tensorrt-rtx"]}
    )
    with pytest.raises(RecipeError, match="fp32-grid: runs in ONNX Runtime"):
        plan_for(recipe, tiny_bundle().manifest.spec)
    assert registered.name in one_of()


def test_an_unknown_precision_is_named_with_those_there_are(
    tiny_options: dict[str, Any], bundle_copy: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"'int44': is not a precision; did you mean 'int4'\? \(choose one of fp32"
    ):
        precision("int44")
    recipe = Recipe.model_validate(tiny_options)
    with pytest.raises(
        RecipeError, match=r"precision 'int44': is not a precision; .*choose one of fp32, fp16"
    ):
        recipe.replaced(precision="int44")
    manifest = bundle_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "fp32-grid"'))
    with pytest.raises(BundleError, match="is not a precision"):
        open_bundle(bundle_copy)


def test_a_second_row_of_a_name_is_an_error(registered: Precision) -> None:
    with pytest.raises(ValueError, match="'fp32-grid' is in the table already"):
        register(dataclasses.replace(registered, summary="another"))


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)
def test_every_row_leads_to_what_it_names(row: Precision) -> None:
    import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)
    import torch

    assert row.activations in ACTIVATIONS
    assert np.dtype(row.activations.dtype).itemsize == row.activations.bytes
    assert getattr(torch, row.activations.dtype).itemsize == row.activations.bytes
    assert ir.DataType[row.activations.onnx].itemsize == row.activations.bytes
    for name in (row.decoder, row.wide, row.head, row.elsewhere):
        if name is not None:
            scheme = load_scheme(name)
            assert all(callable(getattr(scheme, each)) for each in ("fits", "pieces", "encode", "nodes"))
    assert row.quantizes == (row.bytes_per_weight != row.activations.bytes)
    assert row.cpu or row.engines


def test_the_table_is_light() -> None:
    code = (
        "import sys, gap_export.precision; sys.exit(str({'pydantic', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_logit_difference": 0},
        {"max_relative_logit_difference": 0},
        {"max_relative_logit_difference": float("nan")},
        {"max_perplexity_rise": -0.1},
        {"max_mean_kl": 0.0},
        {"min_top1_agreement": 1.01},
        {"max_norm_deviation": 0.0},
        {"max_accuracy_drop": -0.1},
        {"min_box_iou": 1.1},
        {"max_logit_difference": float("nan")},
        {"min_logit_cosine": float("nan")},
    ],
    ids=str,
)
def test_thresholds_that_cannot_be_meant(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        Thresholds(**bounds)


def test_losses_are_those_that_were_measured() -> None:
    record = json.loads((ROOT / "bench" / "results" / "real_weights.json").read_text())
    measured = {name: round(row["rise"], 3) + 0.0 for name, row in record["gap_export"].items()}
    named = {row.name: row.perplexity_rise for row in PRECISIONS.values() if row.perplexity_rise is not None}
    assert named == {name: measured[name] for name in named}
    assert set(named) >= {"int8", "int8-blocks", "int4"}
    assert record["ok"]
