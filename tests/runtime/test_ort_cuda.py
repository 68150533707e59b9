"""ONNX Runtime with cache and embeddings on a GPU: answers are those on the host, and per token only ids go in and logits come out.

There is no GPU here. A stand-in keeps the "device" memory on the host and counts what crosses; ONNX Runtime computes there with its CPU kernels, on
the addresses that the session binds. What it cannot show is the CUDA provider itself: `bench/gpu.py` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.engine.device import Device
from gap_export.errors import MissingRequirementError
from gap_export.positions import PAD, Ids, advance, extended
from gap_export.runtime import ort as ort_session
from gap_export.runtime import ort_graph, ort_memory
from gap_export.runtime.backends import open_session
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort import OnnxRuntimeSession
from tests.runtime.test_openvino import BUNDLES, KINDS, answer, told

BuildBundle = Callable[..., Bundle]
Floats = NDArray[np.float32]


@dataclass
class Crossings:
    """Bytes of every copy.

    Attributes:
        uploads: from the host, by the session.
        downloads: to the host, by the session.
        others: what went around the device: arrays of the host given to a call, outputs read on the host.
        waiting: whether work on the stream is not waited for yet.
    """

    uploads: list[int] = field(default_factory=list)
    downloads: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    waiting: bool = False

    def forget(self) -> None:
        for each in (self.uploads, self.downloads, self.others):
            each.clear()


class CountingDevice:
    """Device memory on the host, full of NaN when it is fresh."""

    crossings = Crossings()
    living = 0

    def __init__(self, number: int | None = None, runtime: Any = None) -> None:
        self.number = number
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, nbytes: int) -> int:
        block = np.full(nbytes, 0xFF, np.uint8)
        self._blocks[block.ctypes.data] = block
        CountingDevice.living += 1
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self._blocks[address]
        CountingDevice.living -= 1

    def clear(self, address: int, nbytes: int) -> None:
        self._inside(address, nbytes)
        ctypes.memset(address, 0, nbytes)
        self.crossings.waiting = True

    def upload(self, address: int, array: Any) -> None:
        self._inside(address, array.nbytes)
        self.crossings.uploads.append(array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self.crossings.waiting = True

    def download(self, array: Any, address: int) -> None:
        self._inside(address, array.nbytes)
        self.crossings.downloads.append(array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self.crossings.waiting = False

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._inside(to, nbytes)
        ctypes.memmove(to, source, nbytes)
        self.crossings.waiting = True

    def synchronize(self) -> None:
        self.crossings.waiting = False

    def close(self) -> None:
        pass

    def _inside(self, address: int, nbytes: int) -> None:
        """Every copy goes into memory that was asked for."""
        assert any(
            start <= address and address + nbytes <= start + block.nbytes
            for start, block in self._blocks.items()
        )


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> Crossings:
    """Of sessions opened on the stand-in."""
    counted = CountingDevice.crossings = Crossings()
    CountingDevice.living = 0
    monkeypatch.setattr(ort_memory, "Device", CountingDevice)
    monkeypatch.setattr(ort_memory.CudaMemory, "device", "cpu")  # what ONNX Runtime is told of the addresses
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_graph, "add_providers", lambda *_: [])  # its CPU kernels compute
    read, value_of = ort.OrtValue.numpy, ort_session.ort_value
    execute = OnnxRuntimeSession._execute

    def numpy(value: Any) -> Any:
        if value.element_type() not in (7, 9):  # ids and truth values are for the host
            counted.others.append(f"read {value.shape()}")
        return read(value)

    def ort_value(array: Any, dtype: str) -> Any:
        counted.others.append(f"gave {array.shape} {array.dtype}")
        return value_of(array, dtype)  # type: ignore[arg-type]

    def executed(session: Any, name: str, binding: Any) -> None:
        assert not counted.waiting, "a call that does not wait for a copy"
        execute(session, name, binding)

    monkeypatch.setattr(ort.OrtValue, "numpy", numpy)
    monkeypatch.setattr(ort_session, "ort_value", ort_value)
    monkeypatch.setattr(OnnxRuntimeSession, "_execute", executed)
    return counted


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_on_the_host(
    kind: str, request: pytest.FixtureRequest, pixels: Floats, ragged_ids: Ids, crossings: Crossings
) -> None:
    fixture, changes, options = BUNDLES[kind]
    bundle = request.getfixturevalue(fixture)(**changes)
    rows = len(ragged_ids)
    pixels = np.resize(pixels, (rows, *pixels.shape[1:]))
    with (
        open_session(bundle, threads=1) as true,
        open_session(bundle, "onnxruntime:cuda:1", threads=1) as session,
    ):
        assert session.backend == "onnxruntime:cuda:1"
        for some in (slice(0, 1), slice(0, rows), slice(0, 1)):
            given = {**options, **told(bundle, pixels[some])}
            expected = answer(true, pixels[some], ragged_ids[some], **given)
            mine = answer(session, pixels[some], ragged_ids[some], **given)
            assert mine.tokens == expected.tokens
            for one, other in zip(mine.logits, expected.logits, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
            for kept, wanted in zip(mine.every_kept_indices, expected.every_kept_indices, strict=True):
                np.testing.assert_array_equal(kept[:, : wanted.shape[1]], wanted)
                assert (kept[:, wanted.shape[1] :] == PAD).all()  # which stays where images differ
    del session
    assert CountingDevice.living == 0


def test_per_token_only_ids_go_in_and_logits_come_out(
    tiny_bundle: BuildBundle, pixels: Floats, ragged_ids: Ids, crossings: Crossings
) -> None:
    bundle, rows = tiny_bundle(), len(ragged_ids)
    pixels = np.resize(pixels, (rows, *pixels.shape[1:]))
    with open_session(bundle, "onnxruntime:cuda", threads=1) as session:
        spliced = session.splice(ragged_ids, session.encode({"pixel_values": pixels}))
        placement = spliced.placement
        session.prefill(spliced.embeds, placement)
        crossings_of_prompt = [each for each in crossings.others if "float" in each]
        assert crossings_of_prompt == [
            f"gave {pixels.shape} float32"
        ]  # the embeddings never came to the host
        for turn in range(4):
            crossings.forget()
            placement = advance(placement)
            logits = session.step(np.full(rows, 5 + turn), placement)
            assert crossings.downloads == [logits.nbytes]
            ids = bundle.manifest.graphs["decoder"].spec.inputs
            numbers = [each for each in ids if each.dtype == "int64"]
            assert len(crossings.uploads) == 1 + len(numbers)
            assert sum(crossings.uploads) == 8 * rows * (1 + len(numbers))
            assert crossings.others == []


def test_rows_and_shared_beginnings(
    tiny_bundle: BuildBundle, pixels: Floats, ragged_ids: Ids, crossings: Crossings
) -> None:
    """Copied, cleared and extended on the device: a cache never crosses."""
    answers = []
    for backend in ("onnxruntime", "onnxruntime:cuda"):
        with open_session(tiny_bundle(), backend, threads=1) as session:
            assert isinstance(session, OnnxRuntimeSession)
            spliced = session.splice(ragged_ids[:1], session.encode({"pixel_values": pixels[:1]}))
            session.open_rows(3)
            session.prefill_row(2, spliced.embeds, spliced.placement)
            crossings.forget()
            session.copy_row(2, 0)
            session.clear_row(2)
            assert not crossings.uploads
            assert not crossings.downloads
            longer = extended(spliced.placement, np.array([2], np.int64), 2)
            found = [session.extend_row(0, np.array([[5, 6]]), longer).copy()]
            session.prefill(spliced.embeds, spliced.placement)
            session.fork(2)
            spliced = session.splice(ragged_ids[:2], session.encode({"pixel_values": pixels[[0, 0]]}))
            both = extended(spliced.placement, np.array([2, 2], np.int64), 2)
            found.append(session.extend(np.array([[5, 6], [7, 8]]), both).copy())
            answers.append(found)
    for mine, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_images_of_several_calls_are_put_together_on_the_device(
    tiny_bundle: BuildBundle, pixels: Floats, crossings: Crossings
) -> None:
    found = []
    for backend in ("onnxruntime", "onnxruntime:cuda"):
        with open_session(tiny_bundle(), backend, threads=1) as session:
            assert isinstance(session, OnnxRuntimeSession)
            seen = [session.encode({"pixel_values": pixels[n : n + 1]}) for n in range(3)]
            kept = seen[0].kept_indices.shape[1]
            crossings.forget()
            whole = session.embeds_together([[seen[0].embeds, seen[1].embeds], [seen[2].embeds]], 2 * kept)
            assert backend == "onnxruntime" or crossings == Crossings()
            found.append(session._memory.read(whole))
    np.testing.assert_array_equal(*found)
    assert (found[0][1, kept:] == 0).all()


def test_bfloat16_crosses_as_sixteen_bits(crossings: Crossings) -> None:
    """Written, bound and read: NumPy has no such type, ONNX Runtime gives no array of it."""
    memory, values = ort_memory.CudaMemory(0), np.array([[1.0, -2.5, 3.14159]], np.float32)
    rounded = np.array([[1.0, -2.5, 3.140625]], np.float32)
    region = memory.of(values, "bfloat16")
    np.testing.assert_array_equal(memory.read(region), rounded)
    assert crossings.uploads == crossings.downloads == [6]
    assert region.nbytes == 6
    host = ort_memory.HostMemory()
    value = ort_memory.ort_value(values, "bfloat16")
    assert value.data_type() == "tensor(bfloat16)"
    np.testing.assert_array_equal(host.of(value, "bfloat16"), memory_words(rounded))
    again = ort_memory.ort_value(host.of(value, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(host.of(again, "bfloat16"), memory_words(rounded))


def memory_words(values: Floats) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_what_is_missing_is_one_clear_line(tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(
            MissingRequirementError, match=r"is not built into this ONNX Runtime.*gap-export\[gpu\]"
        ):
            open_session(tiny_bundle(), "onnxruntime:cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_memory, "Device", lambda number, _: Device(number, NoGpu()))
    with pytest.raises(MissingRequirementError, match="the GPU: cannot be used: no CUDA device is visible"):
        open_session(tiny_bundle(), "onnxruntime:cuda")


class NoGpu:
    """A CUDA runtime that finds none."""

    def cudaGetDeviceCount(self, count: Any) -> int:
        return 0
