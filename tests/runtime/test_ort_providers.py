"""Providers of ONNX Runtime: nodes that one leaves to the CPU are counted and refused, plug-ins are found by their package, options are held against
what was taken.

`AzureExecutionProvider` is built into every distribution and takes no node: what happens to any provider without kernels. A plug-in is a stand-in.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError, MissingRequirementError, SessionError, SessionWarning
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids
from gap_export.runtime import ort_providers
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import generate

BuildBundle = Callable[..., Bundle]
AZURE, CPU = "AzureExecutionProvider", "CPUExecutionProvider"


def test_a_decoder_is_not_left_to_the_cpu_without_a_word(tiny_bundle: BuildBundle) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(SessionError) as caught:
            open_session(tiny_bundle(), f"onnxruntime@{AZURE}", threads=1)
    message = str(caught.value)
    assert f"are left to the CPU by {AZURE}: " in message
    for kind in ("MatMul", "TensorScatter", "RotaryEmbedding"):
        assert kind in message
    assert message.endswith(f"or name {CPU} after it to have them computed there)")
    assert {each.category for each in said} == {SessionWarning}  # of the tower, which is read once
    assert "graph vision: " in str(said[0].message)


def test_it_is_where_that_was_asked_for(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    bundle, answers = tiny_bundle(), []
    pixels = np.resize(pixels, (len(ragged_ids), *pixels.shape[1:]))
    for backend in ("onnxruntime", f"onnxruntime@{AZURE}+{CPU}"):
        with warnings.catch_warnings(), open_session(bundle, backend, threads=1) as session:
            warnings.simplefilter("error")
            assert session.backend == backend
            images = of_one_size(pixels, 36)
            answers.append(generate(session, images, ragged_ids, max_new_tokens=3, eos_token_ids=()).tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        (f"onnxruntime@{AZURE}{{speed: high}}+{CPU}", SessionError, "provider Azure.*: has no option 'speed'"),
        (f"onnxruntime@{CPU}{{speed: high}}", SessionError, "provider CPU.*: has no option 'speed'"),
        ("onnxruntime@CUDAExecutionProvider", SessionError, "computes on a GPU, and not on cpu.*--device cuda"),
        ("onnxruntime:gpu", SessionError, "device gpu of backend onnxruntime: needs a plug-in"),
        (f"onnxruntime:npu@{AZURE}", SessionError, "device npu of backend onnxruntime: needs a plug-in"),
        ("onnxruntime@NoneExecutionProvider", MissingRequirementError, "is not built into this ONNX Runtime, which has"),
        ("onnxruntime@onnxruntime-ep-none", MissingRequirementError, "is not installed .pip install onnxruntime-ep-none"),
        ("onnxruntime@numpy", MissingRequirementError, "package numpy: is no plug-in of ONNX Runtime"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_clear_line(
    backend: str, error: type[GapExportError], message: str, tiny_bundle: BuildBundle
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SessionWarning)
        with pytest.raises(error, match=message) as caught:
            open_session(tiny_bundle(), backend, threads=1)
    assert "\n" not in str(caught.value)


# Plug-ins, with a stand-in


class PlugIns:
    """What ONNX Runtime knows of plug-ins, and what was done with it."""

    def __init__(self) -> None:
        self.registered: dict[str, str] = {}
        self.offered: list[Any] = []
        self.given: list[tuple[list[Any], dict[str, str]]] = []
        self.refuses = ""

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        if name in self.registered:
            raise RuntimeError(f"EP library is already registered under {name}")
        self.registered[name] = path

    def get_ep_devices(self) -> list[Any]:
        return self.offered if self.registered else []

    def get_available_providers(self) -> list[str]:
        return [CPU]

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.given.append((devices, options))

    def add_session_config_entry(self, name: str, value: str) -> None:
        assert (name, value) == ("session.record_ep_graph_assignment_info", "1")

    def offer(self, *kinds: str) -> None:
        self.offered = [
            SimpleNamespace(ep_name="StandInExecutionProvider", device=SimpleNamespace(type=SimpleNamespace(name=kind)))
            for kind in kinds
        ]  # fmt: skip


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlugIns]:
    """A package of a plug-in, installed as pip would, and an ONNX Runtime that knows what it brings."""
    (tmp_path / "stand_in_ep").mkdir()
    (tmp_path / "stand_in_ep" / "__init__.py").write_text(
        "def get_library_path(): return '/somewhere/libstand_in.so'\n"
        "def get_ep_names(): return ['StandInExecutionProvider']\n"
    )
    info = tmp_path / "onnxruntime_ep_stand_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-ep-stand-in\nVersion: 1.0\n")
    (info / "RECORD").write_text(
        "stand_in_ep/__init__.py,,\nonnxruntime_ep_stand_in-1.0.dist-info/METADATA,,\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    known = PlugIns()
    for name in ("register_execution_provider_library", "get_ep_devices", "get_available_providers"):
        monkeypatch.setattr(ort_providers.ort, name, getattr(known, name))
    yield known
    sys.modules.pop("stand_in_ep", None)


def added(plug_ins: PlugIns, device: str, text: str) -> list[str]:
    from gap_export.runtime.providers import providers_in

    return ort_providers.add_providers(plug_ins, providers_in(text), device)  # type: ignore[arg-type]


def test_a_plug_in_is_found_by_its_package(plug_ins: PlugIns) -> None:
    plug_ins.offer("CPU", "GPU", "GPU")
    text = "onnxruntime-ep-stand-in{streams: 2}"
    for device, number in (("cpu", 0), ("gpu", 1), ("gpu:1", 2), ("cuda:1", 2)):
        assert added(plug_ins, device, text) == ["StandInExecutionProvider"]
        assert plug_ins.given.pop() == ([plug_ins.offered[number]], {"streams": "2"})
    assert plug_ins.registered == {"onnxruntime-ep-stand-in": "/somewhere/libstand_in.so"}


def test_a_plug_in_without_the_device(plug_ins: PlugIns) -> None:
    for _ in range(2):  # a library is registered once, whether it found a device or not
        with pytest.raises(SessionError, match="stand-in: finds no device here"):
            added(plug_ins, "cpu", "onnxruntime-ep-stand-in")
    plug_ins.offer("GPU")
    for device in ("cpu", "npu", "gpu:1"):
        with pytest.raises(SessionError, match=f"finds no {device} here, only gpu"):
            added(plug_ins, device, "onnxruntime-ep-stand-in")
    assert not plug_ins.given


def test_a_plug_in_that_is_refused(plug_ins: PlugIns) -> None:
    plug_ins.refuses = "Failed to load library: undefined symbol\nmore of it"
    with pytest.raises(
        SessionError, match=r"was refused by ONNX Runtime .*undefined symbol .install a version"
    ):
        added(plug_ins, "cpu", "onnxruntime-ep-stand-in")


class Loaded:
    """A session that says where its nodes went, and which options were taken."""

    def __init__(self, taken: dict[str, dict[str, str]], left: list[str]) -> None:
        self._taken, self._left = taken, left

    def get_providers(self) -> list[str]:
        return [*self._taken, CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return self._taken

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(name: str, kinds: list[str]) -> Any:
            nodes = [SimpleNamespace(op_type=kind) for kind in kinds]
            return SimpleNamespace(ep_name=name, get_nodes=lambda: nodes)

        return [part("StandInExecutionProvider", ["MatMul", "Add"]), part(CPU, self._left)]


def checked(session: Loaded, text: str) -> None:
    from gap_export.runtime.providers import providers_in

    ort_providers.check_assignment(session, "decoder", ["StandInExecutionProvider"], providers_in(text))  # type: ignore[arg-type]


def test_where_nodes_went() -> None:
    checked(Loaded({"StandInExecutionProvider": {}}, ["Shape", "Gather", "Concat"]), "stand-in")
    with pytest.raises(SessionError, match="1 of 4 nodes are left to the CPU by stand-in: 1 TensorScatter"):
        checked(Loaded({"StandInExecutionProvider": {}}, ["Shape", "TensorScatter"]), "stand-in")
    checked(Loaded({"StandInExecutionProvider": {}}, ["TensorScatter"]), f"stand-in+{CPU}")
    with pytest.raises(SessionError, match=r"StandIn.*was left out by ONNX Runtime"):
        checked(Loaded({}, []), f"stand-in+{CPU}")


def test_options_that_were_taken() -> None:
    quiet, known = ({"StandInExecutionProvider": options} for options in ({}, {"streams": "2"}))
    checked(Loaded(quiet, []), "stand-in{streams: 2}")
    checked(Loaded(known, []), "stand-in{streams: 2}")
    with pytest.raises(SessionError, match="stand-in: has no option 'speed', only streams"):
        checked(Loaded(known, []), "stand-in{speed: 2}")
