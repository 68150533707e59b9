"""The parts of the measurement on a GPU, in the order of their worth, with what each takes and what each needs.

Estimates are of a data-centre GPU beside 16 cores, in seconds, by the model whose speed is measured; what a part takes longer elsewhere, up to
twice as long, it may.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gpu_device import ENGINES, PLUGINS, look_around
from gpu_parity import check_parity
from gpu_schedule import Outcomes, Part
from gpu_settings import Settings
from gpu_speed import (
    measure_beside_transformers,
    measure_engines,
    measure_other_requests,
    prepare_model,
)

from gap_export.bundle.manifest import EngineTarget

THERE, MODEL = "what is there", "model"
PARITY_SECONDS = 60.0
PREPARE_SECONDS = {"7b": 90.0, "135m": 40.0, "shapes": 20.0}
BESIDE_SECONDS = {"7b": 150.0, "135m": 120.0, "shapes": 100.0}
OTHER_SECONDS = {"7b": 110.0, "135m": 60.0, "shapes": 40.0}
ENGINE_PARITY_SECONDS = {"tensorrt-rtx": 80.0, "tensorrt": 150.0}
ENGINE_SECONDS = {"7b": 300.0, "135m": 150.0, "shapes": 80.0}
MODEL_BYTES = {"7b": 14.2e9, "135m": 0.5e9, "shapes": 0.1e9}
WORKING_BYTES = 4e9
"""Of the device, beside weights: activations, cache, workspaces."""

Obstacle = Callable[[Outcomes], str | None]


def parts_of(settings: Settings) -> list[Part]:
    """All parts, the most worth first."""
    on_ort = partial(check_parity, backend=settings.onnxruntime, target="onnx")
    model, weights = settings.model, MODEL_BYTES[settings.model]
    two_models = _holds(2 * weights + WORKING_BYTES)
    parts = [
        Part(THERE, look_around, 25.0),
        Part("parity fp32", partial(on_ort, precision="fp32"), PARITY_SECONDS, _device),
        Part("parity fp16", partial(on_ort, precision="fp16"), PARITY_SECONDS, _device),
        Part(MODEL, prepare_model, PREPARE_SECONDS[model], _device),
        Part(
            "speed beside transformers",
            measure_beside_transformers,
            BESIDE_SECONDS[model],
            _first(_device, _model, two_models),
        ),
        Part("parity bf16", partial(on_ort, precision="bf16"), PARITY_SECONDS, _device),
        *_engine_parts(settings, "tensorrt-rtx"),
        *(
            Part(
                f"parity {package}",
                partial(
                    check_parity,
                    backend=f"onnxruntime@{package}",
                    target="onnx",
                    precision=settings.precision,
                ),
                PARITY_SECONDS,
                _first(_device, _plugin(package), _serves("tensorrt-rtx")),
            )
            for package in PLUGINS
        ),
        *_engine_parts(settings, "tensorrt"),
        Part(
            "other shares and batches",
            measure_other_requests,
            OTHER_SECONDS[model],
            _first(_device, _model, two_models),
        ),
    ]
    return parts


def _engine_parts(settings: Settings, target: EngineTarget) -> list[Part]:
    installed = _first(_device, _serves(target), _library(target))
    weights = MODEL_BYTES[settings.model]
    return [
        Part(
            f"parity {target}",
            partial(check_parity, backend=target, target=target, precision=settings.precision),
            ENGINE_PARITY_SECONDS[target],
            installed,
        ),
        Part(
            f"speed {target}",
            partial(measure_engines, target=target),
            ENGINE_SECONDS[settings.model],
            _first(installed, _model, _holds(3 * weights + WORKING_BYTES)),
        ),
    ]


# Why a part cannot be done


def _first(*obstacles: Obstacle) -> Obstacle:
    """The first of several that there is."""
    return lambda outcomes: next((said for each in obstacles if (said := each(outcomes)) is not None), None)


def _device(outcomes: Outcomes) -> str | None:
    there = outcomes[THERE]
    return None if there.found.get("gpu") else f"no GPU: {there.reason}"


def _model(outcomes: Outcomes) -> str | None:
    made = outcomes.get(MODEL)
    if made is None or made.outcome == "done":  # not among the parts: an earlier run made it
        return None
    return f"there is no model to measure: {made.outcome}, {made.reason}"


def _holds(needed: float) -> Obstacle:
    def obstacle(outcomes: Outcomes) -> str | None:
        memory = outcomes[THERE].found["gpu"]["memory_bytes"]
        if memory >= needed:
            return None
        return f"memory: it needs about {needed / 1e9:.0f} GB, the device has {memory / 1e9:.0f} GB"

    return obstacle


def _serves(target: str) -> Obstacle:
    return lambda outcomes: outcomes[THERE].found.get("not_served", {}).get(target)


def _library(target: str) -> Obstacle:
    def obstacle(outcomes: Outcomes) -> str | None:
        if target in outcomes[THERE].found.get("served", ()):
            return None
        return f"no library: {outcomes[THERE].missing.get(target, outcomes[THERE].reason)}"

    return obstacle


def _plugin(package: str) -> Obstacle:
    def obstacle(outcomes: Outcomes) -> str | None:
        there = package in outcomes[THERE].found.get("plugins", ())
        return None if there else f"no library: {package} is not installed"

    return obstacle


assert set(ENGINES) == set(ENGINE_PARITY_SECONDS)
