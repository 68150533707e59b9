"""The TensorRT session against ONNX Runtime on a small bundle.

Running an engine takes a GPU. Everything around it does not: with a stand-in that keeps "device" memory on the host and
executes the ONNX graph, the session's buffers, aliases, profiles and counters are put through their paces here.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import Engine
from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.engine.device import Device
from gap_export.engine.library import Library, MessageLog
from gap_export.engine.profiles import profiles_from_spec
from gap_export.errors import EngineError, MissingRequirementError, SessionError
from gap_export.inputs.batch import of_one_size
from gap_export.positions import PAD, PositionPolicy, advance
from gap_export.runtime import trt
from gap_export.runtime.generate import generate
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.trt import TensorRTSession
from gap_export.runtime.trt_graph import LoadedGraph

pytestmark = pytest.mark.slow

GRAPHS = ("vision", "splice", "embed", "decoder")
IMAGE_TOKEN, LONGEST_PROMPT = 7, 8
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
PROMPTS = np.array([[2, IMAGE_TOKEN, 3, 5, 1], [4, IMAGE_TOKEN, 6, PAD, PAD]])


class HostDevice:
    """Device memory on the host. Fresh memory is full of NaN, as memory on a GPU may be."""

    stream = 1234
    compute_capability = "8.6"

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.allocated = 0
        self.captures: list[Any] = []
        self.launches: list[int] = []
        self.living: set[int] = set()

    def allocate(self, nbytes: int) -> int:
        block = np.full(nbytes, 0xFF, np.uint8)
        self.allocated += 1
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def clear(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def upload(self, address: int, array: Any) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.blocks[address].nbytes
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Any, address: int) -> None:
        assert array.nbytes <= self.blocks[address].nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def capture(self, work: Any) -> int:
        """As a GPU does: nothing of it is executed yet."""
        self.captures.append(work)
        self.living.add(len(self.captures))
        return len(self.captures)

    def launch(self, captured: int) -> None:
        assert captured in self.living
        self.launches.append(captured)
        self.captures[captured - 1]()

    def forget(self, captured: int) -> None:
        self.living.remove(captured)

    def close(self) -> None:
        assert not self.living


class HostEngine:
    """Executes the ONNX graph on the tensors at the addresses it was given; as strict about order as TensorRT."""

    def __init__(self, path: Path, spec: GraphSpec, log: list[tuple[Any, ...]]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the stand-in does not bind the cache in place
        self.session = onnxruntime.InferenceSession(path, options)
        self.spec = spec
        self.log = log
        self.profiles = profiles_from_spec(spec)
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.given: dict[str, tuple[int, ...]] = {}

    def create_execution_context(self) -> HostEngine:
        context = copy.copy(self)
        context.shapes, context.addresses, context.given = {}, {}, {}
        return context

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == HostDevice.stream
        self.log.append((self.spec.name, "profile", self.profiles[index].name))
        self.profile = index
        self.shapes.clear()
        self.addresses.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        self.given.clear()
        return self.profiles[self.profile].ranges[name].holds(shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.given:
            return self.given[name]
        kinds = {"float32": np.float32, "int64": np.int64}
        zeros = {
            tensor.name: np.zeros(self.shapes[tensor.name], kinds[tensor.dtype])
            for tensor in self.spec.inputs
        }
        return tuple(self.session.run([name], zeros)[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        for present, past in self.spec.aliased.items():
            assert self.addresses[present] == self.addresses[past], "the cache is written in place"
        outputs = self.session.run(None, {tensor.name: self._tensor(tensor) for tensor in self.spec.inputs})
        for tensor, value in zip(self.spec.outputs, outputs, strict=True):
            self.given[tensor.name] = value.shape
            ctypes.memmove(self.addresses[tensor.name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        self.log.append(
            (self.spec.name, "run", self.profiles[self.profile].name, self.shapes[self.spec.inputs[0].name])
        )
        return True

    def _tensor(self, tensor: TensorSpec) -> Any:
        kind = {"float32": np.float32, "int64": np.int64}[tensor.dtype]
        value = np.empty(self.shapes[tensor.name], kind)
        ctypes.memmove(value.ctypes.data, self.addresses[tensor.name], value.nbytes)
        return value


@pytest.fixture
def small(tmp_path: Path, write_small_bundle: Any) -> Bundle:
    engines = {
        name: Engine(
            file=f"{name}.engine",
            target="tensorrt-rtx",
            version="1",
            compute_capabilities=("8.6",),
            graph_sha256="",
        )
        for name in GRAPHS
    }
    return write_small_bundle(tmp_path, {"tensorrt-rtx": engines})


def stand_in(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, device: HostDevice, log: list[tuple[Any, ...]]
) -> None:
    """Put the stand-in where the session looks for library, device and engines."""
    library = Library("tensorrt-rtx", SimpleNamespace(__version__="1"), MessageLog(), None)
    monkeypatch.setattr(trt, "load_library", lambda target: library)
    monkeypatch.setattr(trt, "check_engine", lambda *args, **kwargs: None)
    monkeypatch.setattr(trt, "Device", lambda: device)
    monkeypatch.setattr(
        trt,
        "open_engine",
        lambda path, library: HostEngine(path, bundle.manifest.graphs[path.stem].spec, log),
    )


@pytest.fixture
def opened(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(session on the stand-in, its device, what the engines were asked to do)."""
    device, log = HostDevice(), list[tuple[Any, ...]]()
    stand_in(monkeypatch, small, device, log)
    return TensorRTSession(small), device, log


def test_a_chosen_count_is_read_on_the_host(small: Bundle, opened: Any) -> None:
    """TensorRT wants scalars that are extents in host memory; the stand-in would read anything from anywhere."""
    spec = small.manifest.graphs["vision"].spec
    scalar = TensorSpec(
        name="keep_count",
        dtype="int64",
        shape=(),
        extent_of=Dim(name="kept", minimum=1, optimum=3, maximum=6),
    )
    session, device, _ = opened
    vision = LoadedGraph(
        spec.model_copy(update={"inputs": (*spec.inputs, scalar)}),
        CountingEngine(),
        session._graphs["vision"]._library,
        device,
    )
    for count in (2, 5):
        vision.prepare({"pixel_values": PIXELS, "keep_count": np.array(count, np.int64)})
        address = CountingEngine.addresses["keep_count"]
        assert ctypes.c_int64.from_address(address).value == count
        assert address not in device.blocks
    vision.close()


class CountingEngine:
    """Remembers addresses, runs nothing."""

    addresses: ClassVar[dict[str, int]] = {}

    def create_execution_context(self) -> CountingEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True


def test_single_tokens_are_captured_once_per_shape(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device, log = HostDevice(), list[tuple[Any, ...]]()
    stand_in(monkeypatch, small, device, log)
    session, reference = TensorRTSession(small, cuda_graphs=True), OnnxRuntimeSession(small)
    for rows, captured in ((1, [1, 1]), (1, [1, 1, 1]), (2, [2, 2]), (1, [3, 3])):
        device.launches.clear()
        ours, theirs = (
            generate(
                each,
                of_one_size(PIXELS[:rows], 36),
                PROMPTS[:rows],
                max_new_tokens=4,
                eos_token_ids=(),
                keep_logits=True,
            )
            for each in (session, reference)
        )
        assert device.launches == captured, "the first call of a shape is executed as it is"
        assert ours.tokens == theirs.tokens
        for mine, expected in zip(ours.logits, theirs.logits, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
    assert len(device.captures) == 3
    session.close()
    assert not device.living
    assert not device.blocks


@pytest.mark.parametrize("rows", [1, 2])
def test_the_session_agrees_with_onnx_runtime(opened: Any, small: Bundle, rows: int) -> None:
    """Prefill of unequal rows and decoding, through the decode loop every runtime shares."""
    results = [
        generate(
            session,
            of_one_size(PIXELS[:rows], 36),
            PROMPTS[:rows],
            max_new_tokens=4,
            eos_token_ids=(),
            keep_logits=True,
        )
        for session in (opened[0], OnnxRuntimeSession(small))
    ]
    ours, theirs = results
    assert ours.tokens == theirs.tokens
    np.testing.assert_array_equal(ours.kept_indices, theirs.kept_indices)
    np.testing.assert_array_equal(ours.placement.position_ids, theirs.placement.position_ids)
    assert len(ours.logits) == 4
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        assert np.isfinite(mine).all(), "memory that was never cleared reached the attention"
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5)


def test_prompts_that_share_their_beginning(opened: Any, small: Bundle) -> None:
    from gap_export.runtime.shared_prefix import continue_answers, prefill_shared

    rests = np.array([[3, 5], [6, PAD]])
    shared = []
    for session in (opened[0], OnnxRuntimeSession(small)):
        prefix = prefill_shared(session, of_one_size(PIXELS[:1], 36), PROMPTS[0, :2])
        for rows in (rests[:1], rests):
            shared.append(continue_answers(session, prefix, rows, max_new_tokens=3, eos_token_ids=()))
    for mine, theirs in zip(shared[:2], shared[2:], strict=True):
        assert mine.tokens == theirs.tokens
        np.testing.assert_allclose(mine.logits[0], theirs.logits[0], rtol=1e-5, atol=1e-5)


def test_an_id_that_moves_changes_the_answer(opened: Any) -> None:
    """Negative control: if position ids did not reach the device, the test above could pass on zeros."""
    session = opened[0]
    visual = session.encode({"pixel_values": PIXELS})
    spliced = session.splice(PROMPTS, visual)
    right = session.prefill(spliced.embeds, spliced.placement).logits
    moved = spliced.placement.position_ids + np.arange(spliced.placement.position_ids.shape[1])
    wrong = session.prefill(spliced.embeds, replace(spliced.placement, position_ids=moved)).logits
    assert np.abs(right - wrong).max() > 1e-3
    np.testing.assert_array_equal(session.prefill(spliced.embeds, spliced.placement).logits, right)


def test_a_prompt_after_another_starts_afresh(opened: Any) -> None:
    session = opened[0]
    first = generate(
        session,
        of_one_size(PIXELS[:1], 36),
        PROMPTS[:1],
        max_new_tokens=4,
        eos_token_ids=(),
        keep_logits=True,
    )
    generate(session, of_one_size(PIXELS, 36), PROMPTS, max_new_tokens=3, eos_token_ids=())
    again = generate(
        session,
        of_one_size(PIXELS[:1], 36),
        PROMPTS[:1],
        max_new_tokens=4,
        eos_token_ids=(),
        keep_logits=True,
    )
    np.testing.assert_array_equal(np.stack(again.logits), np.stack(first.logits))


def test_prompts_and_single_tokens_run_under_their_own_profiles(opened: Any) -> None:
    session, _, log = opened
    generate(session, of_one_size(PIXELS, 36), PROMPTS, max_new_tokens=3, eos_token_ids=())
    generate(session, of_one_size(PIXELS, 36), PROMPTS, max_new_tokens=2, eos_token_ids=())
    decoder = [entry[1:] for entry in log if entry[0] == "decoder"]
    prompt, token = ("run", "prefill", (2, 7, 8)), ("run", "decode", (2, 1, 8))
    switch = ("profile", "decode")
    assert decoder == [prompt, switch, token, token, ("profile", "prefill"), prompt, switch, token]


def test_nothing_is_allocated_per_token(opened: Any) -> None:
    session, device, _ = opened
    visual = session.encode({"pixel_values": PIXELS})
    spliced = session.splice(PROMPTS, visual)
    session.prefill(spliced.embeds, spliced.placement)
    turn = advance(spliced.placement)
    session.step(np.array([1, 2]), turn)
    before = device.allocated
    for _ in range(4):
        turn = advance(turn)
        session.step(np.array([1, 2]), turn)
    assert device.allocated == before


def test_memory_of_dropped_prompts_is_used_again(opened: Any) -> None:
    session, device, _ = opened
    for _ in range(2):
        generate(session, of_one_size(PIXELS, 36), PROMPTS, max_new_tokens=2, eos_token_ids=())
        gc.collect()
    before = device.allocated
    for rows, length in ((2, 5), (1, 4), (2, 3)):
        generate(
            session,
            of_one_size(PIXELS[:rows], 36),
            PROMPTS[:rows, :length],
            max_new_tokens=2,
            eos_token_ids=(),
        )
        gc.collect()
    assert device.allocated == before


def test_two_prompts_at_once_do_not_share_memory(opened: Any, small: Bundle) -> None:
    session = opened[0]
    one, other = session.encode({"pixel_values": PIXELS[:1]}), session.encode({"pixel_values": PIXELS[1:]})
    reference = OnnxRuntimeSession(small)
    for visual, pixels in ((one, PIXELS[:1]), (other, PIXELS[1:])):
        np.testing.assert_allclose(
            np.asarray(visual.embeds), reference.encode({"pixel_values": pixels}).embeds.numpy(), rtol=1e-6
        )


def test_embeddings_from_elsewhere_are_taken(opened: Any, small: Bundle) -> None:
    """Arrays of another runtime, so that one part can be compared at a time."""
    session = opened[0]
    visual = session.encode({"pixel_values": PIXELS})
    spliced = session.splice(PROMPTS, trt.VisualTokens(np.asarray(visual.embeds), visual.kept_indices))
    expected = session.prefill(spliced.embeds, spliced.placement).logits
    again = session.prefill(np.asarray(spliced.embeds), spliced.placement)
    np.testing.assert_array_equal(again.logits, expected)


def test_a_full_cache_is_refused(opened: Any) -> None:
    session = opened[0]
    spliced = session.splice(PROMPTS, session.encode({"pixel_values": PIXELS}))
    session.prefill(spliced.embeds, spliced.placement)
    turn = advance(spliced.placement)
    while int(turn.write_index.max()) < session.capacities[0]:
        session.step(np.array([1, 1]), turn)
        turn = advance(turn)
    with pytest.raises(SessionError, match="16 slots, this call needs 17"):
        session.step(np.array([1, 1]), turn)


def test_a_batch_or_a_prompt_beyond_the_profile_is_refused(opened: Any) -> None:
    session = opened[0]
    with pytest.raises(SessionError, match="serves") as caught:
        session.encode({"pixel_values": np.repeat(PIXELS, 2, axis=0)})
    assert caught.value.subject == "graph vision, input pixel_values"
    with pytest.raises(SessionError, match="serves") as caught:
        session.splice(np.ones((2, LONGEST_PROMPT + 1), np.int64), session.encode({"pixel_values": PIXELS}))
    assert caught.value.subject == "graph splice, input input_ids"


def test_closing_gives_everything_back(opened: Any, check_closed: Any) -> None:
    session, device, _ = opened
    visual = session.encode({"pixel_values": PIXELS})
    spliced = session.splice(PROMPTS, visual)
    session.prefill(spliced.embeds, spliced.placement)
    session.step(np.array([1, 2]), advance(spliced.placement))
    check_closed(session)
    with pytest.raises(SessionError, match="is closed"):
        np.asarray(visual.embeds)
    del visual, spliced
    gc.collect()
    assert not device.blocks


def test_an_engine_that_fails_to_open_leaves_no_memory_behind(
    opened: Any, small: Bundle, monkeypatch: Any
) -> None:
    _, device, log = opened
    held = len(device.blocks)

    def open_some(path: Path, library: Any) -> Any:
        if path.stem == "decoder":
            raise EngineError("refused", subject=str(path), hint="none")
        return HostEngine(path, small.manifest.graphs[path.stem].spec, log)

    monkeypatch.setattr(trt, "open_engine", open_some)
    with pytest.raises(EngineError, match="refused"):
        TensorRTSession(small)
    assert len(device.blocks) == held


def test_a_library_that_says_no_is_quoted(opened: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HostEngine, "set_tensor_address", lambda self, name, address: False)
        with pytest.raises(SessionError, match="did not let it take its buffer"):
            opened[0].encode({"pixel_values": PIXELS})
    monkeypatch.setattr(HostEngine, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(EngineError, match="could not run the engine"):
        opened[0].encode({"pixel_values": PIXELS})


def test_a_bundle_without_engines(tmp_path: Path, write_small_bundle: Any) -> None:
    with pytest.raises(
        SessionError, match="holds no tensorrt engine for vision, splice, embed, decoder"
    ) as caught:
        TensorRTSession(write_small_bundle(tmp_path), target="tensorrt")
    assert "--target tensorrt" in caught.value.hint


# A decoder that drops tokens: two engines over one cache


FIXED_STAGES = {"pruner": "fastv", "positions": PositionPolicy.GAP, "capacity": 80}
STAGES_OF_A_RANGE = {"pruner": "fastv", "keep": "0.15:0.25:1.0", "capacity": 80}


@pytest.fixture
def staged(request: pytest.FixtureRequest, deep_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(session on the stand-in, its device, what the engines were asked to do, the bundle)."""
    plain = deep_bundle(**getattr(request, "param", FIXED_STAGES))
    engines = {
        name: Engine(
            file=graph.file,
            target="tensorrt-rtx",
            version="1",
            compute_capabilities=("8.6",),
            graph_sha256="",
        )
        for name, graph in plain.manifest.graphs.items()
    }
    bundle = Bundle(plain.folder, plain.manifest.model_copy(update={"engines": {"tensorrt-rtx": engines}}))
    device, log = HostDevice(), list[tuple[Any, ...]]()
    stand_in(monkeypatch, bundle, device, log)
    return TensorRTSession(bundle), device, log, bundle


@pytest.mark.parametrize(
    "staged",
    [
        pytest.param(FIXED_STAGES, id="fixed"),
        pytest.param({**FIXED_STAGES, "pruner": "pyramiddrop"}, id="four", marks=pytest.mark.long),
        pytest.param(STAGES_OF_A_RANGE, id="of a range", marks=pytest.mark.long),
    ],
    indirect=True,
)
def test_a_decoder_that_drops_tokens_agrees_with_onnx_runtime(
    staged: Any, pixels: Any, questions: Any
) -> None:
    session, _, log, bundle = staged
    manifest, batch = bundle.manifest, of_one_size(pixels, 36)
    given: dict[str, Any] = {"max_new_tokens": 4, "eos_token_ids": (), "keep_logits": True}
    if manifest.pruning.stage_counts_are_told:
        given["keep_counts"] = keep_counts(manifest.pruning, manifest.spec, batch, None)
    ours, theirs = (
        generate(each, batch, questions, **given) for each in (session, OnnxRuntimeSession(bundle, threads=1))
    )
    assert ours.tokens == theirs.tokens
    for mine, reference in zip(ours.every_kept_indices, theirs.every_kept_indices, strict=True):
        np.testing.assert_array_equal(mine, reference)
    for mine, reference in zip(ours.placement.slots_of_stages, theirs.placement.slots_of_stages, strict=True):
        np.testing.assert_array_equal(mine, reference)
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-4)
    runs = [entry[0] for entry in log if entry[1] == "run"]
    assert runs == ["vision", "splice", "prefill", *["embed", "decode"] * 3]


def test_prompts_and_tokens_share_one_cache(staged: Any, pixels: Any, questions: Any) -> None:
    session, device, _, bundle = staged
    prefill, decode = session._graphs["prefill"], session._graphs["decode"]
    aliased = bundle.manifest.graphs["decode"].spec.aliased
    assert len(aliased) == 8
    for present, past in aliased.items():
        assert len({graph.address(name) for graph in (prefill, decode) for name in (present, past)}) == 1
    generate(session, of_one_size(pixels, 36), questions, max_new_tokens=2, eos_token_ids=())
    gc.collect()
    session.close()
    assert not device.blocks, "everything is given back, once"


@pytest.mark.parametrize(
    "staged",
    [
        pytest.param(FIXED_STAGES, id="fixed"),
        pytest.param({**FIXED_STAGES, "pruner": "pyramiddrop"}, id="four", marks=pytest.mark.long),
    ],
    indirect=True,
)
def test_a_full_stage_is_refused(staged: Any, pixels: Any, questions: Any) -> None:
    session = staged[0]
    spliced = session.splice(questions, session.encode({"pixel_values": pixels}))
    session.prefill(spliced.embeds, spliced.placement)
    turn = advance(spliced.placement)
    full = session.capacities[1]
    beyond = replace(
        turn, stage_write_index=(turn.stage_write_index[0] * 0 + full, *turn.stage_write_index[1:])
    )
    with pytest.raises(SessionError, match=f"has {full} slots, this call needs {full + 1}"):
        session.step(np.array([1, 1, 1, 1]), beyond)


@pytest.fixture
def real(tmp_path: Path, write_small_bundle: Any) -> Bundle:
    """The bundle with real TensorRT-RTX engines, for the GPU at hand where there is one."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    from gap_export.engine.build import engine_from_graph

    try:
        Device().close()
        capability = "current"
    except MissingRequirementError:
        capability = "8.6"
    bundle = write_small_bundle(tmp_path)
    engines = {
        name: engine_from_graph(
            bundle.graph_path(name),
            graph.spec,
            target="tensorrt-rtx",
            compute_capabilities=(capability,),
            folder=tmp_path,
        )
        for name, graph in bundle.manifest.graphs.items()
    }
    return write_small_bundle(tmp_path, {"tensorrt-rtx": engines})


def test_without_a_gpu_the_reason_is_plain(real: Bundle) -> None:
    try:
        Device().close()
    except MissingRequirementError:
        with pytest.raises(MissingRequirementError) as caught:
            TensorRTSession(real)
        assert caught.value.subject == "the GPU"
        assert "onnx target" in caught.value.hint
    else:
        pytest.skip("shows what is said where there is no GPU")


def test_an_engine_of_another_graph_is_refused_before_the_gpu_is_asked_for(real: Bundle) -> None:
    import onnx

    graph = real.graph_path("decoder")
    model = onnx.load(graph)
    model.doc_string = "changed"
    onnx.save(model, graph)
    files = real.manifest.files | {"decoder.onnx": record_of(graph)}
    write_manifest(real.folder, real.manifest.model_copy(update={"files": files}))
    with pytest.raises(EngineError, match="another graph"):
        TensorRTSession(open_bundle(real.folder))


def test_real_engines_agree_with_onnx_runtime(real: Bundle) -> None:
    try:
        session = TensorRTSession(real)
    except MissingRequirementError as reason:
        pytest.skip(f"needs a GPU: {reason.message}")
    ours, theirs = (
        generate(
            runtime, of_one_size(PIXELS, 36), PROMPTS, max_new_tokens=4, eos_token_ids=(), keep_logits=True
        )
        for runtime in (session, OnnxRuntimeSession(real))
    )
    np.testing.assert_array_equal(ours.kept_indices, theirs.kept_indices)
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-3, atol=1e-3)
    session.close()
