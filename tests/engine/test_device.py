"""The CUDA calls: what is said where something is missing, and a round trip where there is a GPU."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import pytest

from gap_export.engine import device
from gap_export.engine.device import Device
from gap_export.errors import MissingRequirementError, SessionError


class Runtime:
    """Stands in for libcudart: every call gives the status it was told to."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.cudaGetErrorString = self._words

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._called(name, arguments)

    def _called(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "cudaGetDeviceCount":
            arguments[0]._obj.value = 1
        return self.statuses.get(name, 0)

    @staticmethod
    def _words(status: ctypes.c_int) -> bytes:
        return f"status {status.value} in words".encode()


def with_runtime(monkeypatch: pytest.MonkeyPatch, **statuses: int) -> None:
    monkeypatch.setattr(device, "_load_runtime", lambda: Runtime(**statuses))


def test_no_usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, cudaGetDeviceCount=100)
    with pytest.raises(MissingRequirementError, match=r"status 100 in words \(CUDA error 100\)") as caught:
        Device()
    assert caught.value.subject == "the GPU"


def test_one_of_several_gpus() -> None:
    """Every thread has a current GPU of its own: it is chosen for each allocation."""
    chosen: list[int] = []
    runtime = Runtime()
    runtime.cudaSetDevice = lambda number: chosen.append(number.value) or 0
    Device(0, runtime).allocate(8)
    assert chosen == [0, 0]
    with pytest.raises(MissingRequirementError, match="GPU 1: is not there: CUDA finds 1, counted from 0"):
        Device(1, runtime)


def test_out_of_memory_says_how_much_was_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, cudaMalloc=2)
    with pytest.raises(MissingRequirementError, match="has not 3 MiB free") as caught:
        Device().allocate(3 * 2**20)
    assert "max_batch" in caught.value.hint


def test_a_failed_kernel_shows_when_results_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, cudaStreamSynchronize=700)
    with pytest.raises(SessionError, match="running the engine: status 700"):
        Device().download(np.zeros(3, np.float32), 0x1000)


def test_polygraphy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(MissingRequirementError, match="not installed") as caught:
        Device()
    assert "gap-export[rtx]" in caught.value.hint


def test_cuda_runtime_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pytest.importorskip("polygraphy.cuda", reason="polygraphy is not installed")

    def absent() -> Any:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(cuda, "wrapper", absent)
    with pytest.raises(MissingRequirementError, match="libcudart") as caught:
        Device()
    assert "nvidia-cuda-runtime" in caught.value.hint


def test_round_trip() -> None:
    try:
        gpu = Device()
    except MissingRequirementError as reason:
        pytest.skip(f"needs a GPU: {reason.message}")
    sent = np.arange(1000, dtype=np.float32)
    received = np.empty_like(sent)
    address = gpu.allocate(sent.nbytes)
    gpu.upload(address, sent)
    gpu.download(received, address)
    np.testing.assert_array_equal(received, sent)
    gpu.clear(address, sent.nbytes)
    gpu.download(received, address)
    assert not received.any()
    assert gpu.compute_capability.count(".") == 1
    gpu.free(address)
    gpu.close()
