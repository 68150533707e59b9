"""Graphs from the cache: the same as traced anew, to the last byte, or not taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from gap_export.graph import trace, trace_cache
from gap_export.graph.trace_cache import Traced, Tracer
from gap_export.graph.trace_folder import TraceFolder
from gap_export.graph.trace_key import key_of
from gap_export.modeling.components import Component
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import Recipe
from tests.recorded import Recorded

Lookup = Callable[..., Component]
TRACING, TAKING = "tracing embed", "taking the graph of embed from the trace cache"


def bytes_of(traced: Traced) -> bytes:
    content: bytes = ir.to_proto(traced.model).SerializeToString(deterministic=True)
    return content


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings of what was traced; the graph is an empty one."""
    traced: list[Any] = []

    def graph(component: Component, *_: object, **__: object) -> ir.Model:
        traced.append(component.settings)
        inputs = [ir.Value(name=tensor.name) for tensor in component.spec.inputs]
        return ir.Model(ir.Graph(inputs, inputs, nodes=(), opset_imports={"": 24}), ir_version=11)

    monkeypatch.setattr(trace, "graph_from_component", graph)
    return traced


def test_a_tracer_forgets_what_was_not_asked_for_longest(counted: list[Any], lookup: Lookup) -> None:
    tracer = Tracer(None, remembered=2)
    models = [tracer(lookup(settings)).model for settings in "abacab"]
    assert counted == ["a", "b", "c", "b"]
    assert len({id(model) for model in models}) == len(models), "everyone gets a model of its own"
    for _ in range(2):  # nothing said: never taken for the same
        tracer(lookup())
    assert len(counted) == 6


def test_a_folder_remembers_for_other_processes(counted: list[Any], lookup: Lookup, tmp_path: Path) -> None:
    told = Recorded()
    traced = [Tracer(TraceFolder(tmp_path))(lookup(settings), told) for settings in "aab"]
    assert counted == ["a", "b"]
    assert [each.cached for each in traced] == [False, True, False]
    assert told.messages == [TRACING, TAKING, TRACING]
    Tracer(TraceFolder(tmp_path))(lookup())
    assert len(list(tmp_path.iterdir())) == 2, "nothing is kept of what cannot be told from others"


def test_a_process_remembers_what_it_ran(
    counted: list[Any], lookup: Lookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the sources meanwhile; the folder, which others read, then gets nothing."""
    monkeypatch.setattr(trace_cache, "key_of", lambda component: None)
    tracer = Tracer(TraceFolder(tmp_path))
    assert [tracer(lookup("a")).cached for _ in range(2)] == [False, True]
    assert counted == ["a"]
    assert not list(tmp_path.iterdir())


def test_a_graph_from_the_cache_is_the_graph(lookup: Lookup, tmp_path: Path) -> None:
    anew, kept, alone = (
        Tracer(folder)(lookup("a")) for folder in (TraceFolder(tmp_path), TraceFolder(tmp_path), None)
    )
    assert (anew.cached, kept.cached, alone.cached) == (False, True, False)
    assert bytes_of(anew) == bytes_of(kept) == bytes_of(alone)
    (table,) = kept.model.graph.initializers.values()
    assert trace.is_fake(table.const_value)
    assert (table.shape, table.dtype) == (ir.Shape([8, 4]), ir.DataType.FLOAT)
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_size < 1000
    assert b".py" not in entry.read_bytes(), "no path of the builder"


def external(model: onnx.ModelProto) -> None:
    (tensor,) = model.graph.initializer
    tensor.external_data[0].value = "../../another file"


def external_in_a_node(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(model.graph.initializer[0])
    attribute.t.external_data[0].value = "another file"


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "other"


def no_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


@pytest.mark.parametrize("spoil", [external, external_in_a_node, another_input, no_output])
def test_an_entry_that_is_not_this_graph_is_replaced(
    spoil: Callable[[onnx.ModelProto], None], lookup: Lookup, tmp_path: Path
) -> None:
    """With a checksum that is right: whoever can write to the folder can make one."""
    folder, component = TraceFolder(tmp_path), lookup("a")
    key = key_of(component)
    assert key is not None
    right = bytes_of(Tracer(folder)(component))
    model = onnx.ModelProto.FromString(folder.read(key) or b"")
    spoil(model)
    folder.write(key, model.SerializeToString())
    assert bytes_of(Tracer(folder)(component)) == right
    assert Tracer(folder)(component).cached


@pytest.mark.parametrize("content", [b"", b"no protobuf", bytes(1000), b"\x0a" * 99])
def test_an_entry_that_is_no_graph_is_replaced(
    content: bytes, counted: list[Any], lookup: Lookup, tmp_path: Path
) -> None:
    folder, component = TraceFolder(tmp_path), lookup("a")
    key = key_of(component)
    assert key is not None
    folder.write(key, content)
    assert not Tracer(folder)(component).cached
    assert Tracer(folder)(component).cached
    assert counted == ["a"]


def test_a_folder_that_cannot_be_written_to_is_said_once(
    counted: list[Any], lookup: Lookup, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    told = Recorded()
    tracer = Tracer(TraceFolder(tmp_path / "file"))
    for settings in "aba":
        tracer(lookup(settings), told)
    assert counted == ["a", "b"], "remembered all the same"
    (refusal,) = (message for message in told.messages if message not in (TRACING, TAKING))
    assert refusal.startswith(f"the trace cache {tmp_path / 'file'} cannot be written to: ")


@pytest.mark.slow
def test_a_bundle_is_the_same_with_and_without_the_cache(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of it, to the last byte."""
    recipe = Recipe.model_validate({**tiny_options, "precision": "fp16"})
    contents, words = [], []
    for name, where in (("off", "off"), ("first", tmp_path / "traces"), ("second", tmp_path / "traces")):
        monkeypatch.setenv("GAP_EXPORT_TRACE_CACHE", str(where))
        told = Recorded()
        built = build(recipe, tmp_path / name, golden=False, progress=told)
        files = [path for path in built.bundle.folder.rglob("*") if path.is_file()]
        contents.append({path.relative_to(built.bundle.folder): path.read_bytes() for path in files})
        words.append((built.cached, [message for message in told.messages if "cache" in message]))
    assert contents[0] == contents[1] == contents[2]
    names = ("vision", "splice", "embed", "decoder")
    assert words == [
        ((), []),
        ((), []),
        (names, [f"taking the graph of {name} from the trace cache" for name in names]),
    ]
