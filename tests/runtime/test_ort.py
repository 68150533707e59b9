"""ONNX Runtime: one cache for past and present, nothing allocated per token, nothing left over between prompts."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import SessionError
from gap_export.graph.quantize import DECODERS
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids, advance
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.ort_graph import load_graph

BuildBundle = Callable[..., Bundle]


@pytest.fixture
def session(tiny_bundle: BuildBundle) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(tiny_bundle(), threads=1)


def answer(session: Any, pixels: NDArray[np.float32], ids: Ids, new: int = 5) -> Generation:
    return generate(
        session, of_one_size(pixels, 36), ids, max_new_tokens=new, eos_token_ids=(), keep_logits=True
    )


def same(first: Generation, second: Generation) -> bool:
    return first.tokens == second.tokens and all(
        np.array_equal(a, b) for a, b in zip(first.logits, second.logits, strict=True)
    )


def addresses(session: OnnxRuntimeSession) -> dict[str, int]:
    return {name: array.ctypes.data for name, array in session._cache.views().items()}


# The cache


def test_past_and_present_are_one_buffer(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: dict[str, set[int]] = {}
    make = session._sessions["decoder"].io_binding

    class Recording:
        def __init__(self) -> None:
            self.real = make()

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            bound.setdefault(name, set()).add(value.data_ptr())
            self.real.bind_ortvalue_input(name, value)

        bind_ortvalue_output = None

    def output(self: Recording, name: str, value: Any) -> None:
        bound.setdefault(name, set()).add(value.data_ptr())
        self.real.bind_ortvalue_output(name, value)

    Recording.bind_ortvalue_output = output  # type: ignore[assignment]
    decoder = session._sessions["decoder"]

    class Decoder:
        def io_binding(self) -> Recording:
            return Recording()

        def run_with_iobinding(self, binding: Recording) -> None:
            decoder.run_with_iobinding(binding.real)

    session._sessions["decoder"] = Decoder()
    answer(session, pixels[:1], ragged_ids[:1])
    aliased = session._bundle.manifest.graphs["decoder"].spec.aliased
    assert len(aliased) == 4
    for present, past in aliased.items():
        assert bound[present] == bound[past] == {addresses(session)[past]}
    assert len({pointer for past in aliased.values() for pointer in bound[past]}) == 4


def test_the_cache_is_written_in_place_slot_by_slot(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    visual = session.encode({"pixel_values": pixels})
    spliced = session.splice(ragged_ids, visual)
    session.prefill(spliced.embeds, spliced.placement)
    before = {name: array.copy() for name, array in session._cache.views().items()}
    longest = spliced.placement.position_ids.shape[1]
    assert all((values[:, :, longest:] == 0).all() for values in before.values())
    turn = advance(spliced.placement)
    session.step(np.array([5, 6, 7, 8]), turn)
    for name, array in session._cache.views().items():
        changed = (array != before[name]).any(axis=(1, 3))
        for row in range(4):
            assert np.flatnonzero(changed[row]).tolist() == [turn.write_index[row]], name


def test_nothing_is_allocated_per_token_or_per_prompt_of_one_batch_size(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    answer(session, pixels[:2], ragged_ids[:2])
    cache = addresses(session)
    (decode,) = session._decodes.values()
    logits = decode.logits.ctypes.data
    answer(session, pixels[2:], ragged_ids[2:])
    assert addresses(session) == cache
    assert [*session._decodes.values()] == [decode]
    assert decode.logits.ctypes.data == logits
    answer(session, pixels[:1], ragged_ids[:1])
    assert len(session._decodes) == 2


def test_bound_arrays_outlive_the_call_that_made_them(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    """ONNX Runtime reads the arrays' own memory; were they freed, decoding would read whatever comes after them."""
    right = answer(session, pixels[:2], ragged_ids[:2])
    gc.collect()
    rubbish = [np.full(size, -(2**40), np.int64) for size in (1, 2, 4, 8, 16, 64, 256) for _ in range(200)]
    assert same(answer(session, pixels[:2], ragged_ids[:2]), right)
    del rubbish


# A cache no longer than the request needs


def slots_of(session: OnnxRuntimeSession) -> set[int]:
    return {array.shape[2] for array in session._cache.views().values()}


def test_the_cache_is_as_long_as_prompt_and_answer_need_in_steps(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    shortest, longest = ragged_ids[[3], :3], ragged_ids[[0]]
    for ids, new in ((shortest, 2), (longest, 5)):
        slots = int(answer(session, pixels[[0]], ids, new).placement.next_slot.max())
        (laid_out,) = slots_of(session)
        assert slots + new <= laid_out < slots + new + 16
        assert laid_out % 16 == 0


def test_the_length_of_the_cache_changes_no_number(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    varying = OnnxRuntimeSession(tiny_bundle(), threads=1)
    static = OnnxRuntimeSession(tiny_bundle(capacity=128), threads=1)
    ours, theirs = answer(varying, pixels, ragged_ids), answer(static, pixels, ragged_ids)
    assert slots_of(static) == {128}
    assert max(slots_of(varying)) < 128
    assert ours.tokens == theirs.tokens
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)


def test_requests_of_any_length_in_any_order_leave_nothing_behind(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    """A short request uses the beginning of the memory of a long one, in another layout."""
    used = OnnxRuntimeSession(tiny_bundle(), threads=1)
    requests = [([0], 5), ([3], 2), ([1, 2], 3), ([3], 2), ([0, 1, 2, 3], 5), ([2], 4)]
    for rows, new in requests:
        length = int((ragged_ids[rows] >= 0).sum(axis=1).max())
        asked = (pixels[rows], ragged_ids[rows][:, :length], new)
        assert same(answer(used, *asked), answer(OnnxRuntimeSession(tiny_bundle(), threads=1), *asked))


def test_without_a_word_about_what_follows_there_is_room_for_all(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    spliced = session.splice(ragged_ids, session.encode({"pixel_values": pixels}))
    session.prefill(spliced.embeds, spliced.placement)
    assert slots_of(session) == set(session.capacities)


# Prompts do not see each other


def test_the_second_prompt_is_answered_as_by_a_fresh_session(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    used = OnnxRuntimeSession(tiny_bundle(), threads=1)
    answer(used, pixels[[0]], ragged_ids[[0]])
    short = ragged_ids[[3], :3]
    second = answer(used, pixels[[3]], short)
    assert same(second, answer(OnnxRuntimeSession(tiny_bundle(), threads=1), pixels[[3]], short))
    answer(used, pixels, ragged_ids)
    assert same(answer(used, pixels[[3]], short), second)


def test_batches_answer_as_single_rows_do(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    together = answer(session, pixels, ragged_ids)
    for row in range(4):
        length = int((ragged_ids[row] >= 0).sum())
        alone = answer(session, pixels[[row]], ragged_ids[[row], :length])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.kept_indices[0].tolist() == together.kept_indices[row].tolist()
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert np.abs(a[0] - b[row]).max() < 1e-4


def test_extra_padding_changes_nothing(
    session: OnnxRuntimeSession, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    padded = np.pad(ragged_ids, ((0, 0), (0, 5)), constant_values=-1)
    plain, wide = answer(session, pixels, ragged_ids), answer(session, pixels, padded)
    assert plain.tokens == wide.tokens
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(plain.logits, wide.logits, strict=True))


def test_half_precision_travels_in_half_precision(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    session = OnnxRuntimeSession(tiny_bundle(precision="fp16"), threads=1)
    generation = answer(session, pixels, ragged_ids)
    assert {array.dtype.name for array in session._cache.views().values()} == {"float16"}
    assert generation.logits[0].dtype == np.float32


# Refusals


def test_graphs_that_do_not_load_are_named(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    (bundle_copy / "embed.onnx").write_bytes(b"not onnx")
    with pytest.raises(SessionError, match="was refused by ONNX Runtime") as caught:
        OnnxRuntimeSession(bundle, threads=1)
    assert caught.value.subject.endswith("embed.onnx")


@pytest.mark.parametrize("made", ["tiny_bundle", "deep_bundle"])
def test_no_fusion_takes_ids_away(made: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In the graph as ONNX Runtime runs it, tokens are still turned by their ids, and written by their slots, as often as in the bundle."""
    bundle = request.getfixturevalue(made)(**({"pruner": "fastv"} if made == "deep_bundle" else {}))
    for name in bundle.manifest.graphs.keys() & set(DECODERS):
        optimised = tmp_path / f"{name}.onnx"

        def model_of(name: str, options: Any, optimised: Path = optimised) -> str:
            options.optimized_model_filepath = str(optimised)
            return str(bundle.graph_path(name))

        load_graph(bundle, name, 1, model_of)
        kinds = Counter(node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node)
        for kind in ("RotaryEmbedding", "TensorScatter", "Attention"):
            assert kinds[kind] == bundle.manifest.graphs[name].operators.get(kind, 0), kind
        assert kinds["RotaryEmbedding"]
        assert not kinds.keys() & {"GroupQueryAttention", "MultiHeadAttention"}


def test_weights_that_are_gone_are_an_error_of_ours(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    (bundle_copy / "model.safetensors").unlink()
    with pytest.raises(SessionError):
        OnnxRuntimeSession(bundle, threads=1)


def test_inputs_that_do_not_fit_are_an_error_of_ours(session: OnnxRuntimeSession) -> None:
    with pytest.raises(SessionError, match="failed in ONNX Runtime"):
        session.encode({"pixel_values": np.zeros((1, 3, 40, 40), np.float32)})


def test_bf16_and_unknown_backends_are_refused(tiny_bundle: BuildBundle) -> None:
    bundle = tiny_bundle()
    bf16 = Bundle(bundle.folder, bundle.manifest.model_copy(update={"precision": "bf16"}))
    for backend in ("onnxruntime", "onnxruntime@CPUExecutionProvider"):
        with pytest.raises(SessionError, match="bf16 graphs have no CPU kernels"):
            open_session(bf16, backend)
    assert open_session(bundle).backend == "onnxruntime"
    with pytest.raises(SessionError, match="unknown backend"):
        open_session(bundle, "cuda")


def test_a_bundle_may_be_moved(
    tiny_bundle: BuildBundle, tmp_path: Path, pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    moved = open_bundle(Path(shutil.copytree(tiny_bundle().folder, tmp_path / "else where")))
    here, there = (OnnxRuntimeSession(bundle, threads=1) for bundle in (tiny_bundle(), moved))
    assert same(answer(here, pixels, ragged_ids), answer(there, pixels, ragged_ids))
