"""Ranges against PyTorch's own layers; and what cannot be calibrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gap_export.boxes.scenes import DEV_SEED, cases
from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, InputError
from gap_export.evaluation import runner
from gap_export.evaluation.calibrate import calibrate
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.torch.reference import open_torch
from tests.recorded import Recorded

pytestmark = pytest.mark.slow

SAMPLES = 3


def largest_in_torch(bundle: Bundle, questions: list[Any]) -> dict[bytes, float]:
    """Weight -> largest magnitude of what its linear layer read while PyTorch answered."""
    found: dict[bytes, float] = {}

    def watch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Linear):
            key = module.weight.detach().float().numpy().tobytes()
            found[key] = max(found.get(key, 0.0), float(inputs[0].abs().max()))

    session = open_torch(bundle)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        runner.run_cases(Grounder(bundle), session, questions, batch=1)
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("pruner", ["cls_attention", "fastv"])
def test_ranges_are_what_pytorch_sees(
    deep_bundle: Callable[..., Bundle], pruner: str, deep_checkpoint: Path
) -> None:
    bundle = deep_bundle(pruner=pruner)
    found = calibrate(bundle.folder, limit=SAMPLES, threads=1)
    theirs = largest_in_torch(bundle, list(cases(SAMPLES, DEV_SEED)))
    weights = {
        key: value
        for file in deep_checkpoint.glob("*.safetensors")
        for key, value in load_file(file).items()
        if "language_model" in key
    }
    # Layers before a drop run over the rows that are left, the last one over the last row alone; keys and values over all.
    layers = bundle.manifest.spec.layers
    shortened = {layers - 1, *(stage.first_layer - 1 for stage in bundle.manifest.pruning.stages[1:])}
    compared = 0
    for name, largest in found.largest.items():
        inner = name.removeprefix("language_model.")
        (weight,) = (value for key, value in weights.items() if key.endswith(f".{inner}"))
        seen = theirs[weight.astype(np.float32).tobytes()]
        short = name.startswith("lm_head") or any(f"layers.{layer}." in name for layer in shortened)
        if short and "k_proj" not in name and "v_proj" not in name:
            assert largest <= seen * 1.001, name
        else:
            assert largest == pytest.approx(seen, rel=1e-3), name
            compared += 1
    assert compared == 7 * layers - 5 * len(shortened)
    assert len(found.largest) == 7 * layers + 1


def test_what_is_recorded(tiny_bundle: Callable[..., Bundle]) -> None:
    told = Recorded()
    found = calibrate(tiny_bundle().folder, limit=2, threads=1, progress=told)
    assert (found.samples, found.source, found.family, told.totals) == (2, "scenes", "llava", [2])
    assert sum(told.counts) == 2


def test_a_data_set_of_ones_own(tiny_bundle: Callable[..., Bundle]) -> None:
    found = calibrate(tiny_bundle().folder, limit=2, threads=1, dataset=open_dataset("scenes:2"))
    assert (found.samples, found.source) == (2, "scenes:2")
    assert found.largest != calibrate(tiny_bundle().folder, limit=2, threads=1).largest


def test_a_data_set_without_images(tiny_bundle: Callable[..., Bundle]) -> None:
    bare = Dataset("refs.json", "", open_dataset("scenes").expressions[:2], None)
    with pytest.raises(InputError, match="has no images"):
        calibrate(tiny_bundle().folder, limit=2, dataset=bare)


def test_only_floats_can_be_measured(tiny_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match="is in int8"):
        calibrate(tiny_bundle(precision="int8").folder, limit=1)
