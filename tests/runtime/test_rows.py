"""Rows of a cache that come and go: whatever others do meanwhile, a row holds what its own history says.

The reference is a session of its own for every row, whose history is fed from the beginning at every question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.errors import SessionError
from gap_export.positions import Placement, advance, extended
from gap_export.runtime import backends
from gap_export.runtime.backends import open_session
from gap_export.runtime.ort_cache import Cache
from gap_export.runtime.rows import with_rows
from tests.conftest import IMAGE_TOKEN

BuildBundle = Callable[..., Bundle]
ROWS = 3
PROMPTS = ([1, 5, 6, IMAGE_TOKEN, 7, 8, 9], [IMAGE_TOKEN, 12], [1, 16, 17, 18, 19, IMAGE_TOKEN, 21, 22])


@dataclass(frozen=True)
class Row:
    """What was fed to a row, and where it stands."""

    prompt: int
    placement: Placement
    fed: tuple[tuple[int, ...], ...] = field(default=())


def after(placement: Placement, tokens: int) -> Placement:
    """Where a row stands when so many tokens were fed to it in one call."""
    grown = extended(placement, np.array([tokens], np.int64), tokens)
    return replace(grown, image_slots=placement.image_slots)


class Independent:
    """Every history by itself."""

    def __init__(self, session: Any, pixels: NDArray[np.float32]) -> None:
        self._session, self._pixels = session, pixels

    def spliced(self, prompt: int) -> Any:
        ids = np.array([PROMPTS[prompt]], np.int64)
        visual = self._session.encode({"pixel_values": self._pixels[prompt : prompt + 1]})
        return self._session.splice(ids, visual)

    def logits(self, row: Row) -> NDArray[np.float32]:
        spliced = self.spliced(row.prompt)
        logits, placement = self._session.prefill(spliced.embeds, spliced.placement).logits, spliced.placement
        for tokens in row.fed:
            if len(tokens) == 1:
                placement = advance(placement)
                logits = self._session.step(np.array(tokens), placement).copy()
            else:
                placement = after(placement, len(tokens))
                logits = self._session.extend(np.array([tokens], np.int64), placement)
        return logits[0]


def together(rows: list[Row]) -> Placement:
    """The next token of every row."""
    each = [advance(row.placement) for row in rows]
    return Placement(
        position_ids=np.concatenate([one.position_ids for one in each], axis=-2),
        **{
            name: np.concatenate([getattr(one, name) for one in each])
            for name in ("write_index", "last_index", "next_position", "next_slot")
        },
        image_slots=None if each[0].image_slots is None else np.concatenate([e.image_slots for e in each]),
        stage_write_index=tuple(
            map(np.concatenate, zip(*(one.stage_write_index for one in each), strict=True))
        ),
        stage_next_slot=tuple(map(np.concatenate, zip(*(one.stage_next_slot for one in each), strict=True))),
    )


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(0, ROWS - 1), st.integers(0, len(PROMPTS) - 1)),
        st.tuples(st.just("extend"), st.integers(0, ROWS - 1), st.integers(2, 3)),
        st.tuples(st.just("copy"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)),
        st.tuples(st.just("clear"), st.integers(0, ROWS - 1), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, ROWS), st.just(0)),
    ),
    max_size=14,
)


def run(
    session: Any,
    alone: Independent,
    operations: list[tuple[str, int, int]],
    *,
    extends: bool,
    slots: int | None = None,
) -> int:
    """How many answers were compared; with `slots`, rows begin with so many and grow when they need more."""
    session.open_rows(ROWS, slots)

    def make_space(placement: Placement) -> None:
        if slots is not None:
            session.grow([max(int(placement.next_slot.max()), placement.position_ids.shape[-1])])

    rows: dict[int, Row] = {}
    compared = 0
    for number, (what, row, other) in enumerate(operations):
        found: dict[int, NDArray[np.float32]] = {}
        if what == "prefill":
            spliced = alone.spliced(other)
            make_space(spliced.placement)
            found[row] = session.prefill_row(row, spliced.embeds, spliced.placement).logits[0]
            rows[row] = Row(other, spliced.placement)
        elif what == "copy" and row in rows:
            session.copy_row(row, other)
            rows[other] = rows[row]
        elif what == "clear":
            session.clear_row(row)
            rows.pop(row, None)
        elif what == "extend" and row in rows and extends:
            tokens = tuple(20 + (number + place) % 30 for place in range(other))
            placement = after(rows[row].placement, other)
            make_space(placement)
            found[row] = session.extend_row(row, np.array([tokens], np.int64), placement)[0]
            rows[row] = replace(rows[row], placement=placement, fed=(*rows[row].fed, tokens))
        elif what == "step" and all(each in rows for each in range(row)):
            tokens = [(20 + (number + each) % 30,) for each in range(row)]
            placement = together([rows[each] for each in range(row)])
            make_space(placement)
            logits = session.step(np.array(tokens)[:, 0], placement).copy()
            for each in range(row):
                state = rows[each]
                rows[each] = replace(
                    state, placement=advance(state.placement), fed=(*state.fed, tokens[each])
                )
                found[each] = logits[each]
        for each, logits in found.items():
            np.testing.assert_allclose(logits, alone.logits(rows[each]), atol=2e-4)
            compared += 1
    return compared


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("staged", [False, True], ids=["one run", "stages"])
def test_rows_hold_their_own_history(
    backend: str,
    staged: bool,
    tiny_bundle: BuildBundle,
    deep_bundle: BuildBundle,
    pixels: NDArray[np.float32],
) -> None:
    bundle = deep_bundle(pruner="fastv") if staged else tiny_bundle()
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    compared = []
    with open_session(bundle, backend, threads=1) as session, open_session(bundle, threads=1) as other:
        alone = Independent(other, pixels)

        @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(OPERATIONS)
        def check(operations: list[tuple[str, int, int]]) -> None:
            compared.append(run(with_rows(session), alone, operations, extends=not staged))

        check()
        fixed = [
            ("prefill", 0, 0),
            ("prefill", 2, 1),
            ("copy", 0, 1),
            ("extend", 1, 2),
            ("step", 3, 0),
            ("prefill", 1, 2),
            ("step", 2, 0),
            ("step", 3, 0),
        ]
        compared.append(run(with_rows(session), alone, fixed, extends=not staged))
    assert compared[-1] >= 10
    assert sum(compared) > 30


LONGER = [
    ("prefill", 0, 1),
    ("prefill", 1, 0),
    *[("step", 2, 0), ("extend", 0, 3)] * 5,
    ("prefill", 2, 2),
    ("extend", 2, 3),
    ("step", 3, 0),
    ("clear", 1, 0),
    ("copy", 0, 1),
    *[("extend", 1, 3), ("step", 3, 0)] * 4,
]
"""Rows of different lengths, each beyond what it began with."""


@pytest.mark.parametrize("room", [False, True], ids=["anew", "within their memory"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_rows_that_grow_hold_what_they_held(
    backend: str, room: bool, tiny_bundle: BuildBundle, pixels: NDArray[np.float32]
) -> None:
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with (
        open_session(tiny_bundle(), backend, threads=1) as session,
        open_session(tiny_bundle(), threads=1) as other,
    ):
        rows = with_rows(session)
        if room:
            rows.open_rows(ROWS)
        assert run(rows, Independent(other, pixels), LONGER, extends=True, slots=16) > 20


@pytest.mark.parametrize("room", [False, True], ids=["anew", "within their memory"])
def test_a_row_that_is_forgotten_when_others_grow_would_show(
    room: bool, tiny_bundle: BuildBundle, pixels: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with open_session(tiny_bundle(), threads=1) as session, open_session(tiny_bundle(), threads=1) as other:
        rows = with_rows(session)
        if room:
            rows.open_rows(ROWS)
        monkeypatch.setattr(Cache, "_copy_heads", lambda *given: None)
        with pytest.raises(AssertionError):
            run(rows, Independent(other, pixels), LONGER, extends=True, slots=16)


@pytest.mark.parametrize("room", [False, True], ids=["anew", "within their memory"])
def test_without_memory_to_grow_nothing_has_changed(
    room: bool, tiny_bundle: BuildBundle, pixels: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with open_session(tiny_bundle(), threads=1) as session, open_session(tiny_bundle(), threads=1) as other:
        rows, alone = with_rows(session), Independent(other, pixels)
        if room:
            rows.open_rows(ROWS)
        rows.open_rows(ROWS, 16)
        spliced = alone.spliced(1)
        rows.prefill_row(0, spliced.embeds, spliced.placement)
        with monkeypatch.context() as patch:
            patch.setattr(session._memory, "zeros", failing_with(MemoryError()))  # type: ignore[attr-defined]
            with pytest.raises(MemoryError):
                rows.grow([40])
        placement = after(spliced.placement, 2)
        found = rows.extend_row(0, np.array([[20, 21]], np.int64), placement)[0]
        expected = alone.logits(Row(1, placement, ((20, 21),)))
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_without_memory_for_a_larger_cache_the_next_request_is_right(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with open_session(tiny_bundle(), threads=1) as session, open_session(tiny_bundle(), threads=1) as other:
        rows, alone = with_rows(session), Independent(other, pixels)
        rows.open_rows(1, 16)
        with monkeypatch.context() as patch:
            patch.setattr(session._memory, "zeros", failing_with(MemoryError()))  # type: ignore[attr-defined]
            for _ in range(2):
                with pytest.raises(MemoryError):
                    rows.open_rows(ROWS)
        rows.open_rows(ROWS)
        spliced = alone.spliced(0)
        found = rows.prefill_row(ROWS - 1, spliced.embeds, spliced.placement).logits[0]
        np.testing.assert_allclose(found, alone.logits(Row(0, spliced.placement)), atol=2e-4)


def failing_with(error: Exception) -> Callable[..., Any]:
    """What raises it, however it is called."""

    def fail(*given: object, **named: object) -> None:
        raise error

    return fail


def test_a_row_that_others_write_into_would_show(
    tiny_bundle: BuildBundle, pixels: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.resize(pixels, (len(PROMPTS), *pixels.shape[1:]))
    with open_session(tiny_bundle(), threads=1) as session, open_session(tiny_bundle(), threads=1) as other:
        alone, rows = Independent(other, pixels), with_rows(session)
        operations = [("prefill", 0, 0), ("prefill", 1, 1), ("step", 2, 0)]
        assert run(rows, alone, operations, extends=True) == 4
        monkeypatch.setattr(Cache, "row", lambda self, row: self.views(0, 1))
        with pytest.raises(AssertionError):
            run(rows, alone, operations, extends=True)


def test_what_is_not_there(tiny_bundle: BuildBundle, pixels: NDArray[np.float32]) -> None:
    with open_session(tiny_bundle(), threads=1) as session:
        rows = with_rows(session)
        with pytest.raises(SessionError, match=r"0 slots of a row: are not from 1 to"):
            rows.open_rows(2, 0)
        with pytest.raises(SessionError, match=r"slots of a row: are not from 1 to"):
            rows.open_rows(2, 10**6)
        rows.open_rows(2, 16)
        for call in (
            lambda: rows.copy_row(0, 2),
            lambda: rows.copy_row(-1, 0),
            lambda: rows.clear_row(2),
        ):
            with pytest.raises(SessionError, match=r"is not there: the cache has 2"):
                call()
        visual = session.encode({"pixel_values": pixels[:1]})
        spliced = session.splice(np.array([[*PROMPTS[0], 10, 11]], np.int64), visual)
        with pytest.raises(SessionError, match=r"row 0 of the cache: has 16 slots, and 17 are needed"):
            rows.prefill_row(0, spliced.embeds, spliced.placement)
        rows.open_rows(2)
        rows.prefill_row(0, spliced.embeds, spliced.placement)
        with pytest.raises(SessionError, match=r"row 0 of the cache: has \d+ slots"):
            rows.extend_row(0, np.full((1, 200), 20), after(spliced.placement, 200))


def test_others_say_that_they_serve_one_at_a_time(tiny_bundle: BuildBundle) -> None:
    with (
        open_session(tiny_bundle(), "torch") as session,
        pytest.raises(SessionError, match="backend torch: serves one request at a time"),
    ):
        with_rows(session)
    assert set(backends.names()) >= {"onnxruntime", "openvino", "torch"}
