"""Headers, versions and hashes of engines; facts from the manifest without a GPU, from the engine with one."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gap_export.bundle.manifest import Engine
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.build import engine_from_graph
from gap_export.engine.device import Device
from gap_export.engine.inspect import check_engine, engine_facts, facts_of_opened, read_header
from gap_export.engine.library import Library, MessageLog, load_library
from gap_export.errors import EngineError, MissingRequirementError

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
pytest.importorskip("onnx", reason="the test graphs are made with onnx")


@pytest.fixture
def made(make_decoder: Any) -> tuple[Path, Engine, GraphSpec]:
    """A real engine: path, record, spec."""
    graph, spec = make_decoder()
    record = engine_from_graph(
        graph, spec, target="tensorrt-rtx", compute_capabilities=("8.6",), folder=graph.parent
    )
    return graph.parent / record.file, record, spec


def library(version: str = "1.7.1.116", target: Any = "tensorrt-rtx") -> Library:
    return Library(target=target, api=SimpleNamespace(__version__=version), log=MessageLog(), logger=None)


def has_gpu() -> bool:
    try:
        Device().close()
    except MissingRequirementError:
        return False
    return True


def test_the_header_tells_version_and_size(made: Any) -> None:
    path, record, _ = made
    header = read_header(path)
    assert ".".join(map(str, header.version)) == record.version == load_library("tensorrt-rtx").version
    assert header.nbytes == path.stat().st_size


def test_files_that_are_no_engines(made: Any, tmp_path: Path) -> None:
    path, _, _ = made
    other = tmp_path / "other.engine"
    for content in (b"", b"short", b"x" * 500):
        other.write_bytes(content)
        with pytest.raises(EngineError, match="is not a TensorRT engine"):
            read_header(other)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(EngineError, match="cut short"):
        read_header(path)
    path.unlink()
    with pytest.raises(EngineError, match="missing"):
        read_header(path)


def test_an_engine_of_the_full_tensorrt_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "made.engine"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([11, 5, 0, 5]) + bytes(100))
    assert read_header(path).version == (11, 5, 0, 5)
    assert read_header(path).nbytes == 128


def test_an_engine_that_fits_is_accepted(made: Any) -> None:
    path, record, _ = made
    check_engine(path, record, graph_sha256=record.graph_sha256, library=load_library("tensorrt-rtx"))


def test_another_library_version_is_refused_by_both_names(made: Any) -> None:
    path, record, _ = made
    with pytest.raises(EngineError) as caught:
        check_engine(path, record, graph_sha256=record.graph_sha256, library=library("1.8.0.3"))
    assert record.version in caught.value.message
    assert "1.8.0.3" in caught.value.message
    assert record.version in caught.value.hint


def test_a_record_that_lies_about_the_version_is_noticed(made: Any) -> None:
    path, record, _ = made
    forged = record.model_copy(update={"version": "1.8.0.3"})
    with pytest.raises(EngineError, match=record.version.replace(".", r"\.")):
        check_engine(path, forged, graph_sha256=record.graph_sha256, library=library("1.8.0.3"))


def test_another_graph_is_refused(made: Any) -> None:
    path, record, _ = made
    with pytest.raises(EngineError, match="another graph") as caught:
        check_engine(path, record, graph_sha256="f" * 64, library=library(record.version))
    assert record.graph_sha256[:12] in caught.value.message
    assert "ffffffffffff" in caught.value.message


def test_another_target_is_refused(made: Any) -> None:
    path, record, _ = made
    with pytest.raises(EngineError, match="not for TensorRT") as caught:
        check_engine(
            path, record, graph_sha256=record.graph_sha256, library=library(record.version, "tensorrt")
        )
    assert "--target tensorrt" in caught.value.hint


def test_facts_say_where_they_come_from(made: Any) -> None:
    path, record, spec = made
    facts = engine_facts(path, record, spec)
    json.dumps(facts)
    assert facts["bytes"] == path.stat().st_size
    assert facts["built_by"] == record.version
    assert [tensor["name"] for tensor in facts["inputs"]] == [tensor.name for tensor in spec.inputs]
    assert facts["aliased"] == {"present.0.key": "past.0.key", "present.0.value": "past.0.value"}
    if facts["read_from"] == "manifest":
        assert facts["layers"] is None
        assert "GPU" in facts["layers_missing"]
        assert [profile["name"] for profile in facts["profiles"]] == ["prefill", "decode"]
        assert facts["profiles"][1]["inputs"]["position_ids"] == [[1, 1], [1, 1], [2, 1]]
        assert facts["inputs"][1] == {
            "name": "position_ids",
            "dtype": "int64",
            "shape": ["batch", "sequence"],
        }


@pytest.mark.skipif(has_gpu(), reason="shows what is said where there is no GPU")
def test_no_gpu_is_told_plainly(made: Any) -> None:
    path, record, spec = made
    assert engine_facts(path, record, spec)["layers_missing"].startswith("the GPU: cannot be used")
    from gap_export.engine.inspect import open_engine

    with pytest.raises(MissingRequirementError, match="CUDA driver"):
        open_engine(path, load_library("tensorrt-rtx"))


def test_facts_of_an_opened_engine() -> None:
    """The deserialized engine's side of the API, with a stand-in: opening a real one takes a GPU."""

    class Mode(Enum):
        INPUT, OUTPUT = 1, 2

    class Opened:
        num_io_tensors, num_optimization_profiles, device_memory_size_v2 = 2, 1, 4096

        def get_tensor_name(self, index: int) -> str:
            return ("past.0.key", "present.0.key")[index]

        def get_tensor_mode(self, name: str) -> Mode:
            return Mode.INPUT if name.startswith("past") else Mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name="HALF")

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (-1, 4, 32, 16)

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            assert name.startswith("past"), "outputs have no profile"
            return [(1, 4, 32, 16)] * 3

        def get_aliased_input_tensor(self, name: str) -> str | None:
            return "past.0.key"

        def create_engine_inspector(self) -> Any:
            return SimpleNamespace(get_engine_information=lambda layout: '{"Layers": ["attention_0"]}')

    api = SimpleNamespace(
        TensorIOMode=Mode, LayerInformationFormat=SimpleNamespace(JSON="json"), __version__="1"
    )
    facts = facts_of_opened(Library("tensorrt-rtx", api, MessageLog(), None), Opened())
    assert facts["inputs"] == [{"name": "past.0.key", "dtype": "half", "shape": [-1, 4, 32, 16]}]
    assert facts["aliased"] == {"present.0.key": "past.0.key"}
    assert facts["profiles"][0]["inputs"] == {"past.0.key": [[1, 4, 32, 16]] * 3}
    assert (facts["layers"], facts["read_from"]) == (["attention_0"], "engine")
