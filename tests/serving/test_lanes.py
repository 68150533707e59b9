"""Where requests are computed: rows of one cache in every runtime that has them, the whole session where there are none, the same answers everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from gap_export.bundle.cache_layout import in_slot_steps
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Engine as EngineFile
from gap_export.cli import app
from gap_export.errors import InputError, SessionError
from gap_export.runtime.backends import open_session
from gap_export.runtime.model import Model, load
from gap_export.runtime.rows import RowSession
from gap_export.runtime.trt import TensorRTSession
from gap_export.serving.engine import Engine
from gap_export.serving.lanes import SharedLane, SharedRow, SingleLane, open_lane, single_because
from gap_export.serving.limits import EngineLimits
from gap_export.serving.work import Result, Work
from tests.conftest import BuildBundle
from tests.families.answers import Tiny
from tests.runtime.conversation.talking import failing
from tests.runtime.test_rows import PROMPTS, Independent, run
from tests.runtime.test_trt import HostDevice, stand_in
from tests.serving.asking import WAIT, alone, assert_empty, equal, facts, noise, scenes, talk, work_of
from tests.serving.conftest import OpenEngine

WORDS = ("the red mug", "a cat", "the small blue circle on the left", "square", "the green mug below")


def check_same(engine: Engine, model: Model, works: list[Work]) -> None:
    """Every answer is the one that its question has by itself."""
    tickets = [engine.submit(work) for work in works]
    for work, ticket in zip(works, tickets, strict=True):
        for number, outcome in enumerate(ticket.result(2 * WAIT)):
            mine, theirs = facts(outcome), alone(model, work, number)
            assert equal(mine, theirs), (work.questions[number], mine, theirs)
    assert_empty(engine)


def works_of(
    images: list[Image.Image], *, keeps: tuple[float | None, ...] = (None,), **options: Any
) -> list[Work]:
    """Requests about images, some of several questions, of answers of different length."""
    return [
        work_of(
            [image],
            *(WORDS[(number + each) % len(WORDS)] for each in range(1 + number % 3)),
            keep=keeps[number % len(keeps)],
            max_new_tokens=2 + number % 4,
            **options,
        )
        for number, image in enumerate(images)
    ]


# Every runtime


@pytest.mark.parametrize(
    ("backend", "rows"), [("onnxruntime", 3), ("onnxruntime", 20), ("openvino", 4), ("torch", 1)]
)
def test_every_runtime_answers_alike(
    backend: str, rows: int, shapes_bundle: Bundle, shapes_alone: Model, open_engine: OpenEngine
) -> None:
    engine = open_engine(shapes_bundle, backend, rows=max(rows, 2))
    assert engine.rows == rows
    if backend == "torch":
        assert engine.single_because == "caches of torch have no rows that come and go"
    else:
        assert engine.single_because is None
    works = [
        work_of([case.image], case.expression, "circle", talk("where is the circle?"), keep=keep)
        for case, keep in zip(scenes(6), (None, 0.1, 0.5, 1.0, 0.33, None), strict=True)
    ]
    check_same(engine, shapes_alone, works)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_decoders_that_drop_tokens_serve_one_at_a_time(
    backend: str, deep_bundle: BuildBundle, open_engine: OpenEngine
) -> None:
    bundle = deep_bundle(pruner="fastv")
    engine = open_engine(bundle, backend, rows=4)
    assert engine.rows == 1
    assert (
        engine.single_because
        == "fastv drops tokens inside the decoder, and every stage has a cache of its own length"
    )
    with load(bundle, threads=1) as model:
        check_same(engine, model, works_of([noise(each) for each in range(4)]))


@pytest.mark.long
def test_images_that_decide_themselves_are_served_one_at_a_time(
    tiny_bundle: BuildBundle, open_engine: OpenEngine
) -> None:
    bundle = tiny_bundle(pruner="prumerge", keep="adaptive")
    engine = open_engine(bundle, rows=4)
    assert engine.rows == 1
    assert engine.single_because == "images themselves decide how many tokens they keep"
    with load(bundle, threads=1) as model:
        check_same(engine, model, works_of([noise(each) for each in range(5)]))


@pytest.mark.long
def test_questions_that_the_pruner_tells_apart_share_nothing(
    tiny_bundle: BuildBundle, open_engine: OpenEngine
) -> None:
    bundle = tiny_bundle(pruner="cdpruner")
    engine = open_engine(bundle, rows=3)
    assert engine.single_because is None
    session, encoded = engine.model.session, []  # type: ignore[attr-defined]
    encode, copy_row = session.encode, session.copy_row
    copied: list[tuple[int, int]] = []
    copies = lambda source, target: (copied.append((source, target)), copy_row(source, target))[1]  # noqa: E731
    session.encode = lambda *given, **named: (encoded.append(1), encode(*given, **named))[1]
    session.copy_row = copies
    work = work_of([noise(1)], *WORDS[:4], WORDS[0])
    with load(bundle, threads=1) as model:
        check_same(engine, model, [work])
    assert len(encoded) == 4, "the fifth is the first again"


@pytest.mark.long
def test_images_of_different_sizes_share_a_batch(qwen: Tiny, open_engine: OpenEngine) -> None:
    """Two images to a prompt, each of a size of its own, and so every request is of another length."""
    bundle = qwen.bundle(images=2, **qwen.family.builds[2][0])
    assert bundle.manifest.spec.position_rows == 3
    engine = open_engine(bundle, rows=3)
    assert engine.single_because is None
    sizes = [(40, 30), (100, 70), (30, 90), (36, 36), (64, 48)]
    works = [
        work_of(
            [noise(number + each, *sizes[(number + each) % 5]) for each in range(2)],
            *WORDS[number % 3 : number % 3 + 1 + number % 2],
            keep=(None, 0.3, 1.0, 0.5)[number % 4],
            max_new_tokens=3 + number % 5,
            trace=True,
        )
        for number in range(7)
    ]
    with load(bundle, threads=1) as model:
        check_same(engine, model, works)
    (outcome, *_) = engine_trace(bundle, open_engine, works[1])
    assert outcome.trace is not None
    assert outcome.trace.position_ids.shape[0] == 3
    assert (outcome.trace.position_ids[1] != outcome.trace.position_ids[2]).any(), (
        "rows and columns of patches"
    )


def engine_trace(bundle: Bundle, open_engine: OpenEngine, work: Work) -> list[Result]:
    outcomes = open_engine(bundle, rows=2).submit(work).result(WAIT)
    return [each for each in outcomes if isinstance(each, Result)]


def test_a_trace_of_a_row_that_was_copied_and_moved(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    """As of the same question alone, in whatever row, after whatever others."""
    case = scenes(1)[0]
    questions = ("circle", "the large red circle", "square", talk("a circle?", "no", "and a square?"))
    together = engine_trace(
        shapes_bundle, open_engine, work_of([case.image], *questions, keep=0.3, trace=True)
    )
    for question, mine in zip(questions, together, strict=True):
        (theirs,) = engine_trace(
            shapes_bundle, open_engine, work_of([case.image], question, keep=0.3, trace=True)
        )
        assert mine.trace is not None
        assert theirs.trace is not None
        np.testing.assert_array_equal(mine.trace.position_ids, theirs.trace.position_ids)
        np.testing.assert_array_equal(mine.trace.kept_indices, theirs.trace.kept_indices)
        np.testing.assert_allclose(mine.trace.first_logits, theirs.trace.first_logits, atol=1e-3)
        for name in ("first_text_position", "next_position", "next_slot", "text_lengths"):
            assert getattr(mine.trace, name) == getattr(theirs.trace, name)
        assert mine.trace.next_position - mine.trace.next_slot == 144 - mine.kept


# TensorRT, on a stand-in that keeps device memory on the host


OpenTensorRT = Callable[..., TensorRTSession]


@pytest.fixture
def open_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenTensorRT]:
    """`open_tensorrt(bundle)`: a session over the stand-in; `bundle.manifest.engines` must not matter to others."""
    opened: list[Any] = []

    def session(bundle: Bundle, **options: Any) -> TensorRTSession:
        engines = {
            name: EngineFile(
                file=graph.file,
                target="tensorrt-rtx",
                version="1",
                compute_capabilities=("8.6",),
                graph_sha256="",
            )
            for name, graph in bundle.manifest.graphs.items()
        }
        with_engines = Bundle(
            bundle.folder, bundle.manifest.model_copy(update={"engines": {"tensorrt-rtx": engines}})
        )
        device = HostDevice()
        stand_in(monkeypatch, with_engines, device, [])
        opened.append(TensorRTSession(with_engines, **options))
        return opened[-1]

    yield session
    for each in opened:
        each.close()


@pytest.fixture
def static_bundle(tiny_bundle: BuildBundle) -> Bundle:
    """As engines want it: every row of the cache has all its slots."""
    return tiny_bundle(capacity=80)


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
def test_engines_have_rows(
    captured: bool, static_bundle: Bundle, open_tensorrt: OpenTensorRT, pixels: NDArray[np.float32]
) -> None:
    """Calls of one row are bound to where it lies, calls of several to the first; a captured call keeps its addresses."""
    session = open_tensorrt(static_bundle, cuda_graphs=captured)
    assert isinstance(session, RowSession)
    assert session.most_rows == 4, "as many as the recipe's largest batch"
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with open_session(static_bundle, threads=1) as other:
        operations = [
            ("prefill", 0, 0),
            ("prefill", 2, 1),
            ("copy", 0, 1),
            ("step", 3, 0),
            ("extend", 1, 2),
            ("step", 3, 0),
            ("step", 3, 0),
            ("prefill", 1, 2),
            ("step", 2, 0),
            ("step", 3, 0),
            ("clear", 0, 0),
            ("prefill", 0, 1),
            ("step", 1, 0),
            ("step", 3, 0),
        ]
        assert run(session, Independent(other, pixels), operations, extends=True) >= 20


@pytest.mark.slow
def test_engines_that_are_asked_for_what_is_not_there(
    static_bundle: Bundle, open_tensorrt: OpenTensorRT
) -> None:
    session = open_tensorrt(static_bundle)
    for rows in (0, 5):
        with pytest.raises(SessionError, match=f"{rows} rows of the cache: are not from 1 to 4"):
            session.open_rows(rows)
    with pytest.raises(SessionError, match="the cache: has 80 slots, this call needs 1000"):
        session.open_rows(2, 1000)
    session.open_rows(2, 10)
    for call in (
        lambda: session.copy_row(0, 4),
        lambda: session.copy_row(-1, 0),
        lambda: session.clear_row(4),
    ):
        with pytest.raises(SessionError, match="is not there: the engines were built for 4"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
def test_engines_are_served_in_batches(
    captured: bool, static_bundle: Bundle, open_tensorrt: OpenTensorRT, open_engine: OpenEngine
) -> None:
    engine = open_engine(static_bundle, session=open_tensorrt(static_bundle, cuda_graphs=captured), rows=8)
    assert engine.rows == 4, "no more than its engines take"
    assert engine.single_because is None
    works = works_of([noise(each) for each in range(7)])
    with load(static_bundle, threads=1) as model:
        check_same(engine, model, works)


@pytest.mark.slow
def test_engines_of_one_row_serve_one_at_a_time(
    static_bundle: Bundle,
    open_tensorrt: OpenTensorRT,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Built for a batch of one, or rows that would begin at no address of an engine."""
    from gap_export.runtime import trt_graph

    monkeypatch.setattr(trt_graph, "_ALIGNMENT", 10**9 + 7)
    session = open_tensorrt(static_bundle)
    assert session.most_rows == 1
    engine = open_engine(static_bundle, session=session, rows=4)
    assert (engine.rows, engine.single_because) == (
        1,
        "engines of tensorrt-rtx in this bundle take one request at a time",
    )
    with load(static_bundle, threads=1) as model:
        check_same(engine, model, works_of([noise(each) for each in range(3)]))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_an_engine_whose_cache_held_nan(
    rows: int, static_bundle: Bundle, open_tensorrt: OpenTensorRT, open_engine: OpenEngine
) -> None:
    """A masked slot that holds NaN counts; what a poisoned request leaves is gone, in rows and where there is one."""
    session: Any = open_tensorrt(static_bundle)
    engine = open_engine(static_bundle, session=session, rows=rows)
    decoder = session._graphs["decoder"]
    for name in decoder._cache_extents:
        session._device.blocks[decoder.address(name)].fill(0xFF)
    with load(static_bundle, threads=1) as model:
        check_same(engine, model, works_of([noise(each) for each in range(3)]))


# Lanes themselves


def session_of(*, rows: bool = True, most: int | None = None) -> Any:
    methods = [name for name in dir(RowSession) if name[0] != "_"] + ["__enter__", "__exit__"] if rows else []
    fake = SimpleNamespace(**dict.fromkeys(methods, print) | {"backend": "fake", "capacities": (8,)})
    if rows:
        fake.most_rows = most
        fake.opened = []
        fake.open_rows = lambda rows, slots=None: fake.opened.append((rows, slots))
    return fake


def manifest_of(**changes: Any) -> Any:
    pruning = SimpleNamespace(stages=(), finds_count=False, pruner="x")
    spec = SimpleNamespace(reads_image_slots=False, position_rows=1)
    pruning.__dict__.update(
        {name: value for name, value in changes.items() if name in ("stages", "finds_count")}
    )
    spec.__dict__.update({name: value for name, value in changes.items() if name == "reads_image_slots"})
    return SimpleNamespace(pruning=pruning, spec=spec, capacity=8)


@pytest.mark.parametrize(
    ("session", "manifest", "because"),
    [
        (session_of(), manifest_of(), None),
        (session_of(most=3), manifest_of(), None),
        (session_of(most=1), manifest_of(), "engines of fake in this bundle take one request at a time"),
        (session_of(rows=False), manifest_of(), "caches of fake have no rows that come and go"),
        (session_of(), manifest_of(stages=(1,)), "every stage has a cache of its own length"),
        (session_of(), manifest_of(finds_count=True), "decide how many tokens they keep"),
        (session_of(), manifest_of(reads_image_slots=True), "looks at where the images of a prompt are"),
    ],
)
def test_who_shares_a_cache(session: Any, manifest: Any, because: str | None) -> None:
    told = single_because(session, manifest)
    assert told == because or (because is not None and because in str(told))
    lane = open_lane(session, manifest, 5)
    assert isinstance(lane, SharedLane) == (because is None)
    if because is None:
        assert lane.rows == (session.most_rows or 5)
        assert session.opened[-1] == (lane.rows, None)
        lane.recover()
        assert session.opened[-1] == (lane.rows, 8)
    assert isinstance(open_lane(session, manifest, 1), SingleLane)


def test_a_row_is_not_stepped_by_itself(shapes_bundle: Bundle) -> None:
    with load(shapes_bundle, threads=1) as model:
        lane = open_lane(model.session, model.bundle.manifest, 2)
        row = lane.take(1)
        assert isinstance(row, SharedRow)
        with pytest.raises(ValueError, match="is not fed by a step of its own"):
            row.step(np.zeros(1, np.int64), None)  # type: ignore[arg-type]
        single = open_lane(model.session, model.bundle.manifest, 1)
        with pytest.raises(ValueError, match="has no other to copy to"):
            single.copied(row, 1)


def test_rows_are_as_long_as_the_longest_needs(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    """Short answers with a long one among them, then short ones alone."""
    engine = open_engine(shapes_bundle, rows=3)
    session, lane = engine.model.session, engine._lane  # type: ignore[attr-defined]
    slots: list[int] = []
    step = session.step
    session.step = lambda *given: (slots.append(session._cache.layout.capacities[0]), step(*given))[1]
    case = scenes(1)[0]
    works = [
        work_of([case.image], case.expression, keep=keep, max_new_tokens=tokens)
        for keep, tokens in ((0.1, 3), (0.1, 3), (0.5, 12), (0.1, 3), (0.25, 8), (0.1, 3))
    ]
    for ticket in [engine.submit(work) for work in works]:
        ticket.result(WAIT)
    longest = lane._slots
    assert max(slots) == in_slot_steps(longest) < session.capacities[0]
    for _ in range(3 * 16):  # none of which is long
        engine.submit(works[0]).result(WAIT)
    assert slots[-1] < max(slots), "and became shorter"
    with load(shapes_bundle, threads=1) as model:
        check_same(engine, model, works)
    assert slots[0] < max(slots), "they grew"


@pytest.mark.long
def test_a_session_that_fails_while_one_is_served_alone(
    deep_bundle: BuildBundle, open_engine: OpenEngine
) -> None:
    """The next question of the same request is read anew, and right."""
    bundle = deep_bundle(pruner="fastv")
    engine = open_engine(bundle)
    error = SessionError("failed", subject="x", hint="x")
    work = work_of([noise(1)], *WORDS)
    with failing(engine.model.session, "step", error, after=2):  # type: ignore[attr-defined]
        outcomes = engine.submit(work).result(WAIT)
    assert [each is error for each in outcomes] == [True, False, False, False, False]
    with load(bundle, threads=1) as model:
        for number, outcome in enumerate(outcomes):
            if number:
                assert equal(facts(outcome), alone(model, work, number))


@pytest.mark.parametrize(("backend", "waiting"), [("onnxruntime", 12), ("torch", 8)])
def test_four_requests_wait_for_each_row_that_there_is_and_eight_at_least(
    backend: str, waiting: int, shapes_bundle: Bundle
) -> None:
    """Three rows are asked for, and a runtime whose cache has none has one."""
    work = work_of([scenes(1)[0].image], "the red circle")
    with load(shapes_bundle, backend=backend, threads=1) as model:
        with Engine(model, EngineLimits(rows=3)) as engine:
            assert engine.most_waiting == waiting
            with pytest.raises(InputError, match=f"{waiting} may wait"):
                engine.submit_all([work] * (waiting + 1))
        with Engine(model, EngineLimits(rows=3, queue=7)) as engine:
            assert engine.most_waiting == 7


@pytest.mark.parametrize(("words", "queue"), [((), None), (("--queue", "7"), 7)])
def test_the_command_leaves_the_queue_to_the_rows(
    words: tuple[str, ...], queue: int | None, shapes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("gap_export.serving.serve.serve", lambda _, **options: given.update(options))
    ended = CliRunner().invoke(app, ["serve", str(shapes_bundle.folder), "--rows", "16", *words])
    assert ended.exit_code == 0, ended.output
    assert given["limits"].queue == queue
