"""What is there: the GPU, the libraries and whether they serve it, and what it can do at best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from gpu_schedule import Teller
from gpu_settings import Settings

from gap_export.bundle.manifest import EngineTarget
from gap_export.engine.build import supported_compute_capabilities
from gap_export.engine.library import load_library
from gap_export.environment import cpu_name
from gap_export.errors import MissingRequirementError
from gap_export.evaluation.latency.record import Device

ENGINES: tuple[EngineTarget, ...] = ("tensorrt-rtx", "tensorrt")
PLUGINS = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12")
"""Packages of TensorRT-RTX as a provider of ONNX Runtime."""
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt", *PLUGINS)
SIDES = {"cuda": 8192, "cpu": 512}
COPIED = {"cuda": 2**31, "cpu": 2**24}
"""Of the matrices that are multiplied, and bytes that are copied, for the roofline."""
_REPEATS = 10


def look_around(settings: Settings, tell: Teller) -> None:
    """Facts `gpu`, `packages`, `providers`, `plugins`, `served`, `not_served` and `roofline`.

    Raises:
        MissingRequirementError: there is no GPU.
    """
    found = device_facts(settings)
    tell.console.print(found)
    tell.found(gpu=found)
    there = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    tell.console.print(there)
    tell.found(packages=there, plugins=[name for name in PLUGINS if name in there])
    providers = tell.attempt("providers of ONNX Runtime", _providers)
    if providers is not None:
        tell.found(providers=providers)
    served, not_served = [], {}
    for target in ENGINES:
        loaded = tell.attempt(target, lambda target=target: load_library(target))
        if loaded is not None:
            reason = _not_served(loaded, found["compute_capability"])
            if reason is None:
                served.append(target)
            else:
                not_served[target] = reason
                tell.left_out(target, reason)
    tell.found(served=served, not_served=not_served)
    peak = roofline(settings.device)
    tell.console.print(
        f"  roofline: {peak.flops_per_second / 1e12:.2f} TFLOP/s, {peak.bytes_per_second / 1e12:.3f} TB/s",
        highlight=False,
    )
    tell.found(roofline=peak.model_dump(mode="json"))


def device_facts(settings: Settings) -> dict[str, Any]:
    """Name, compute capability (None of a CPU), memory in bytes.

    Raises:
        MissingRequirementError: torch sees no GPU.
    """
    if settings.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"name": cpu_name(), "compute_capability": None, "memory_bytes": memory, "cuda": None}
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            "is not there: torch.cuda.is_available() is false",
            subject="an NVIDIA GPU",
            hint=f"torch {torch.__version__} is made for CUDA {torch.version.cuda}; see bench/README.md",
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def roofline(device: str) -> Device:
    """Peak of a large product (half precision on a GPU), and bandwidth of a large copy; the best of ten."""
    side, size = SIDES[device], COPIED[device]
    dtype = torch.float32 if device == "cpu" else torch.float16
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiplied = _best(lambda: one @ other, device)
    copied = _best(lambda: target.copy_(source), device)
    # A copy is read once and written once.
    return Device(flops_per_second=2 * side**3 / multiplied, bytes_per_second=2 * size / copied, threads=0)


def _best(work: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(_REPEATS):
        _synchronise(device)
        began = time.perf_counter()
        work()
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _not_served(library: Any, capability: str | None) -> str | None:
    """Why a library builds no engines for the device; None where it does."""
    if capability is None:
        return "a CPU has no compute capability"
    known = supported_compute_capabilities(library)
    if known and capability not in known:
        return f"compute capability {capability} is not served: {library.title} builds for {', '.join(known)}"
    return None


def _providers() -> list[str]:
    from gap_export.runtime.onnxruntime_package import ort

    return list(ort.get_available_providers())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
