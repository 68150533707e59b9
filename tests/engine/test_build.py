"""Real engines, built without a GPU, and graphs that must be refused with the right subject and hint."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.hashes import record_of
from gap_export.bundle.spec import Dim, DType, GraphSpec, TensorSpec
from gap_export.engine import build
from gap_export.engine.build import engine_from_graph, supported_compute_capabilities
from gap_export.engine.library import load_library
from gap_export.errors import EngineError, MissingRequirementError
from tests.recorded import Recorded

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
pytest.importorskip("onnx", reason="the test graphs are made with onnx")

FLOATS = TensorSpec(name="x", dtype="float32", shape=(2, 8))
RESULT = TensorSpec(name="y", dtype="float32", shape=(2, 8))


def built(graph: Path, spec: GraphSpec, *capabilities: str, **options: Any) -> Any:
    return engine_from_graph(
        graph,
        spec,
        target="tensorrt-rtx",
        compute_capabilities=capabilities or ("8.6",),
        folder=graph.parent,
        **options,
    )


def refused(graph: Path, spec: GraphSpec, *capabilities: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        built(graph, spec, *capabilities)
    assert not list(graph.parent.glob("engines/*/*")), "nothing half-made is left behind"
    return caught.value


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decoder_builds(make_decoder: Any, dtype: DType) -> None:
    graph, spec = make_decoder(dtype)
    record = built(graph, spec)
    assert record.file == "engines/tensorrt-rtx/decoder.engine"
    assert record.version == load_library("tensorrt-rtx").version
    assert record.compute_capabilities == ("8.6",)
    assert record.graph_sha256 == record_of(graph).sha256
    assert (graph.parent / record.file).read_bytes()[1:4] == b"trt"


def test_fp32_attention_needs_to_be_decomposable(make_decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_let_fp32_attention_decompose", lambda library, network: None)
    error = refused(*make_decoder("float32"))
    assert "dedicated kernel" in error.message
    assert "head sizes" in error.hint


def test_one_engine_for_several_gpus(make_decoder: Any) -> None:
    assert built(*make_decoder(), "8.6", "12.0", "8.6").compute_capabilities == ("8.6", "12.0")


def test_external_weights_behind_a_hard_link(make_decoder: Any) -> None:
    graph, spec = make_decoder(external=True)
    weights = graph.with_suffix(".weights")
    os.link(weights, graph.with_name("elsewhere"))
    weights.unlink()
    os.link(graph.with_name("elsewhere"), weights)
    assert built(graph, spec).file


def test_pruning_tower_builds(make_graph: Any) -> None:
    """TopK for the best, a second one for ascending order, a gather of the survivors."""
    batch = Dim(name="batch", minimum=1, optimum=1, maximum=2)
    inputs = [TensorSpec(name="pixel_values", dtype="float32", shape=(batch, 3, 16, 16))]
    outputs = [
        TensorSpec(name="visual_embeds", dtype="float16", shape=(batch, 4, 8)),
        TensorSpec(name="kept_indices", dtype="int64", shape=(batch, 4)),
    ]

    def fill(g: Any) -> None:
        pixels = g.cast("pixel_values", "float16")
        patches = g.op("Conv", pixels, g.weight("float16", 8, 3, 4, 4), strides=[4, 4], kernel_shape=[4, 4])
        tokens = g.op("Transpose", g.op("Reshape", patches, g.constant([0, 0, -1])), perm=[0, 2, 1])
        score = g.op("ReduceMean", tokens, g.constant([2]), keepdims=0)
        g.nodes.append(_two_outputs("TopK", [score, g.constant([4])], ["best", "unordered"], axis=1))
        g.nodes.append(
            _two_outputs("TopK", ["unordered", g.constant([4])], ["kept_indices", "rank"], axis=1, largest=0)
        )
        index = g.op("Expand", g.op("Unsqueeze", "kept_indices", g.constant([2])), g.constant([1, 1, 8]))
        g.op("GatherElements", tokens, index, to="visual_embeds", axis=1)

    assert built(*make_graph(inputs, outputs, fill)).file


def _two_outputs(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, name=f"{kind}_{outputs[1]}", **attributes)


def test_progress_is_reported(make_decoder: Any) -> None:
    recorded = Recorded()
    built(*make_decoder(), progress=recorded)
    assert recorded.messages
    steps = [re.fullmatch(r".+ (\d+)/(\d+)", message) for message in recorded.messages]
    seen = [(int(step[1]), int(step[2])) for step in steps if step]
    assert len(seen) == len(recorded.messages)
    assert all(0 <= done <= total for done, total in seen)
    assert any(done == total > 0 for done, total in seen)


def test_an_exception_in_the_progress_callback_ends_the_build(make_decoder: Any) -> None:
    def stop(recorded: Recorded) -> None:
        raise KeyboardInterrupt

    graph, spec = make_decoder()
    with pytest.raises(KeyboardInterrupt):
        built(graph, spec, progress=Recorded(stop))
    assert not list((graph.parent / "engines/tensorrt-rtx").iterdir())


def test_an_engine_is_replaced_whole_or_not_at_all(
    make_decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, spec = make_decoder()
    record = built(graph, spec)
    before = (graph.parent / record.file).read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.os, "replace", full)
    with pytest.raises(MissingRequirementError, match="No space left"):
        built(graph, spec)
    assert (graph.parent / record.file).read_bytes() == before
    assert [path.name for path in (graph.parent / "engines/tensorrt-rtx").iterdir()] == ["decoder.engine"]


def test_unknown_compute_capability(make_decoder: Any) -> None:
    error = refused(*make_decoder(), "8.6", "9.0")
    assert error.subject == "compute capability 9.0"
    assert "8.9" in error.hint
    assert "12.0" in error.hint


def test_no_compute_capability_and_current_among_others(make_decoder: Any) -> None:
    graph, spec = make_decoder()
    with pytest.raises(EngineError, match="at least one"):
        engine_from_graph(graph, spec, target="tensorrt-rtx", compute_capabilities=(), folder=graph.parent)
    assert "on its own" in refused(graph, spec, "current", "8.6").message


def test_supported_compute_capabilities() -> None:
    known = supported_compute_capabilities(load_library("tensorrt-rtx"))
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(known)


def test_bf16_attention_on_turing_is_refused_with_a_hint(make_decoder: Any) -> None:
    error = refused(*make_decoder("bfloat16"), "7.5")
    assert error.subject == "graph decoder"
    assert "7.5" in error.hint


def test_dynamic_cache_length_is_refused_from_the_spec(make_decoder: Any) -> None:
    slots = Dim(name="slots", minimum=8, optimum=32, maximum=32)
    error = refused(*make_decoder(capacity=slots))
    assert error.subject == "graph decoder, input past.0.key"
    assert "capacity" in error.hint


def test_dynamic_cache_length_is_refused_from_the_graph(make_decoder: Any) -> None:
    """The spec says static, the file does not: the importer's own complaint is translated."""
    graph, _ = make_decoder(capacity=Dim(name="slots", minimum=8, optimum=32, maximum=32))
    _, spec = _static_spec(make_decoder)
    error = refused(graph, spec)
    assert "scatter_0_key" in error.subject
    assert "static" in error.message
    assert "cudaError" not in error.message
    assert "capacity" in error.hint


def _static_spec(make_decoder: Any) -> tuple[Path, GraphSpec]:
    import onnx

    graph, spec = make_decoder()
    dynamic = onnx.load(graph)
    for value in (*dynamic.graph.input, *dynamic.graph.output):
        if ".0." in value.name:
            value.type.tensor_type.shape.dim[2].dim_param = "slots"
    onnx.save(dynamic, graph)
    return graph, spec


def test_unused_input_is_an_error(make_graph: Any) -> None:
    idle = TensorSpec(name="position_ids", dtype="int64", shape=(2, 8))
    error = refused(*make_graph([FLOATS, idle], [RESULT], lambda g: g.op("Relu", "x", to="y")))
    assert error.subject == "graph vision, input position_ids"
    assert "ignored" in error.message


def test_attention_lengths_that_tensorrt_drops_are_an_error(make_graph: Any) -> None:
    """`nonpad_kv_seqlen` parses, builds, and is not looked at."""
    tokens = [TensorSpec(name=name, dtype="float16", shape=(2, 4, 8, 16)) for name in "qkv"]
    lengths = TensorSpec(name="lengths", dtype="int64", shape=(2,))
    out = TensorSpec(name="y", dtype="float16", shape=(2, 4, 8, 16))
    graph, spec = make_graph(
        [*tokens, lengths],
        [out],
        lambda g: g.op("Attention", "q", "k", "v", "", "", "", "lengths", to="y"),
    )
    error = refused(graph, spec)
    assert error.subject.endswith("input lengths")
    assert "nonpad_kv_seqlen" in error.hint


def test_operator_without_importer(make_graph: Any) -> None:
    result = TensorSpec(
        name="y", dtype="int64", shape=(2, Dim(name="found", minimum=1, optimum=1, maximum=16))
    )
    error = refused(
        *make_graph([FLOATS], [result], lambda g: g.op("NonZero", "x", to="y", name="find_tokens"))
    )
    assert error.subject.endswith("graph.onnx, find_tokens")
    assert "(NonZero)" in error.message
    assert "onnxOpImporters.cpp" in error.message
    assert "plain ONNX" in error.hint


def test_mixed_types(make_graph: Any) -> None:
    def fill(g: Any) -> None:
        g.op("Add", "x", g.constant(np.ones(8), np.float16), to="y", name="sum")

    error = refused(*make_graph([FLOATS], [RESULT], fill))
    assert error.subject.endswith(", sum")
    assert "Half" in error.message
    assert "Cast" in error.hint


def test_top_k_beyond_the_limit(make_graph: Any) -> None:
    wide = TensorSpec(name="x", dtype="float32", shape=(1, 4000))
    best = TensorSpec(name="y", dtype="float32", shape=(1, 3841))

    def fill(g: Any) -> None:
        g.nodes.append(_two_outputs("TopK", ["x", g.constant([3841])], ["y", "index"]))

    error = refused(*make_graph([wide], [best], fill))
    assert "3840" in error.hint


def test_missing_external_weights(make_decoder: Any) -> None:
    graph, spec = make_decoder(external=True)
    graph.with_suffix(".weights").unlink()
    error = refused(graph, spec)
    assert error.subject.endswith("decoder.weights")
    assert "missing" in error.hint


def test_truncated_external_weights(make_decoder: Any) -> None:
    graph, spec = make_decoder(external=True)
    os.truncate(graph.with_suffix(".weights"), 500)
    error = refused(graph, spec)
    assert error.subject.endswith("decoder.weights")
    assert "cut short" in error.hint


def test_weights_outside_the_folder(make_decoder: Any) -> None:
    import onnx

    graph, spec = make_decoder(external=True)
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{graph.parent.name}/{entry.value}"
    graph.write_bytes(model.SerializeToString())
    error = refused(graph, spec)
    assert error.subject.endswith("decoder.weights")
    assert "hard links" in error.hint


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_truncated_graph(make_decoder: Any, kept: float) -> None:
    graph, spec = make_decoder()
    whole = graph.read_bytes()
    graph.write_bytes(whole[: int(len(whole) * kept)])
    error = refused(graph, spec)
    assert "decoder.onnx" in error.subject
    assert "build the bundle again" in error.hint


def test_a_file_of_another_kind_and_no_file(make_decoder: Any) -> None:
    graph, spec = make_decoder()
    graph.write_bytes(b"\x89PNG not a graph at all")
    assert "build the bundle again" in refused(graph, spec).hint
    graph.unlink()
    assert "check the path" in refused(graph, spec).hint


def test_graph_and_spec_that_differ(make_decoder: Any) -> None:
    graph, spec = make_decoder()
    renamed = spec.model_copy(update={"inputs": spec.inputs[:-1]})
    assert refused(graph, renamed).subject.endswith("input past.0.value")
    other = spec.inputs[0].model_copy(update={"dtype": "float32"})
    error = refused(graph, spec.model_copy(update={"inputs": (other, *spec.inputs[1:])}))
    assert error.subject.endswith("input inputs_embeds")
    assert "HALF" in error.message


def test_extents_that_contradict_the_graph(make_decoder: Any) -> None:
    graph, spec = make_decoder()
    wider = spec.inputs[0].model_copy(update={"shape": (*spec.inputs[0].shape[:2], 64)})
    error = refused(graph, spec.model_copy(update={"inputs": (wider, *spec.inputs[1:])}))
    assert error.subject == "graph decoder, inputs_embeds"
