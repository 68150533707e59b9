"""Conversations in the TensorRT session, on the stand-in for its library: every call against ONNX Runtime on the same graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Engine
from gap_export.errors import SessionError
from gap_export.inputs.batch import of_one_size
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.runtime.conversation.cache import ConversationCache, SeenImages
from gap_export.runtime.conversation.context import Mark, text_placement
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.session import Session
from gap_export.runtime.trt import TensorRTSession
from tests.runtime.conftest import CAPACITY, MAX_TEXT, N
from tests.runtime.conversation.talking import spied
from tests.runtime.test_trt import GRAPHS, PIXELS, HostDevice, stand_in

pytestmark = pytest.mark.slow

FIRST = [2, IMAGE, 3, 5]
"""The small bundle's splice takes its image as the second token."""


@pytest.fixture
def small(tmp_path: Path, write_small_bundle: Callable[..., Bundle]) -> Bundle:
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


@pytest.fixture
def opened(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> tuple[TensorRTSession, OnnxRuntimeSession, list[Any]]:
    """The session on the stand-in, one of ONNX Runtime, and what the engines were asked to do."""
    log: list[Any] = []
    stand_in(monkeypatch, small, HostDevice(), log)  # type: ignore[arg-type]
    return TensorRTSession(small), OnnxRuntimeSession(small), log


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_text_is_appended_where_it_is_placed(opened: Any) -> None:
    ours, theirs, log = opened
    ids = np.array([[1, 4, 6, 2]])
    for session in (ours, theirs):
        session.clear([CAPACITY])
    embeds = [session.embed(ids) for session in (ours, theirs)]
    close(np.asarray(embeds[0]), embeds[1].numpy())
    log.clear()
    first, second = text_placement(Mark(0, (0,)), 3, 1), text_placement(Mark(5, (3,)), 1, 1)
    again = text_placement(Mark(2, (2,)), 4, 1)
    for placement, tokens in ((first, ids[:, :3]), (second, ids[:, 3:]), (again, ids)):
        mine, reference = (each.append(each.embed(tokens), placement) for each in (ours, theirs))
        close(mine, reference)
        assert mine.shape[0] == 1
    calls = [entry for entry in log if entry[:2] == ("decoder", "run")]
    assert calls == [
        ("decoder", "run", "prefill", (1, 3, 8)),
        ("decoder", "run", "decode", (1, 1, 8)),
        ("decoder", "run", "prefill", (1, 4, 8)),
    ]


def test_what_lies_behind_is_lost_and_what_lies_before_stays(opened: Any) -> None:
    for session in opened[:2]:
        session.clear([CAPACITY])
        begun = session.caches_begun
        after = text_placement(Mark(3, (3,)), 2, 1)
        session.append(session.embed(np.array([[1, 4, 6]])), text_placement(Mark(0, (0,)), 3, 1))
        told = session.append(session.embed(np.array([[2, 5]])), after).copy()
        session.append(session.embed(np.array([[6, 6, 1]])), text_placement(Mark(3, (3,)), 3, 1))
        session.grow([CAPACITY])
        close(session.append(session.embed(np.array([[2, 5]])), after), told)
        assert session.caches_begun == begun
        session.clear([4])
        assert session.caches_begun == begun + 1


def test_a_cache_of_fixed_length_says_what_it_has(opened: Any) -> None:
    session = opened[0]
    session.grow([CAPACITY])
    for call in (session.grow, session.clear):
        with pytest.raises(SessionError, match=rf"has {CAPACITY} slots, this call needs {CAPACITY + 1}"):
            call([CAPACITY + 1])
    session.clear([CAPACITY])
    with pytest.raises(SessionError, match="slots"):
        session.append(session.embed(np.array([[1, 2]])), text_placement(Mark(15, (15,)), 2, 1))


def seen() -> list[SeenImages]:
    return [SeenImages(of_one_size(PIXELS[:1], N))]


def talk(session: Session, bundle: Bundle, lose: Callable[[], object]) -> tuple[list[Any], list[int]]:
    """Logits of two turns and of their answers, read on and read again; where every call began."""
    cache, images = ConversationCache(session, bundle.manifest), seen()
    with spied(session) as calls:
        logits = [cache.read(FIRST, images, 3).copy(), cache.step(4).copy()]
        ids = [*FIRST, 4, 1, 6]
        logits += [cache.read(ids, images, 2).copy(), cache.step(2).copy()]
        logits.append(cache.read([*ids[:5], 3, 3], images, 2).copy())  # cut off in the middle
        lose()
        logits.append(cache.read([*ids[:5], 3, 3], images, 2).copy())
        logits.append(cache.step(5).copy())
    assert calls.count("encode") <= 1
    return logits, [int(each.write_index[0]) for each in calls.placed]


def test_a_conversation_is_read_as_by_onnx_runtime(opened: Any, small: Bundle) -> None:
    ours, theirs, _ = opened
    told = [talk(session, small, lambda each=session: each.clear([CAPACITY])) for session in (ours, theirs)]
    for mine, reference in zip(told[0][0], told[1][0], strict=True):
        assert np.isfinite(mine).all()
        close(mine, reference)
    assert told[0][1] == told[1][1] == [0, 6, 7, 9, 7, 0, 9]
    close(told[0][0][4], told[0][0][5])


def test_more_text_than_an_engine_takes_is_read_in_several_calls(opened: Any, small: Bundle) -> None:
    ours, theirs, log = opened
    logits = []
    ids = [*FIRST, *[1, 2, 3, 4, 5, 6, 1, 2, 3]]
    for session in (ours, theirs):
        cache = ConversationCache(session, small.manifest)
        logits.append(cache.read(ids, seen(), 1).copy())
        text = ConversationCache(session, small.manifest)
        logits.append(text.read([id_ for id_ in ids if id_ != IMAGE], [], 1).copy())
    close(logits[0], logits[2])
    close(logits[1], logits[3])
    taken = [entry[3][1] for entry in log if entry[0] in ("splice", "embed") and entry[1] == "run"]
    assert taken == [MAX_TEXT, 5, MAX_TEXT, 4]


def test_an_answer_of_another_takes_the_cache(opened: Any, small: Bundle) -> None:
    ours = opened[0]
    cache, images = ConversationCache(ours, small.manifest), seen()
    assert cache.lost
    told = cache.read(FIRST, images, 2).copy()
    assert not cache.lost
    other = ConversationCache(ours, small.manifest)
    other.read([1, 2, 3], [], 1)
    assert cache.lost
    assert not other.lost
    close(cache.read(FIRST, images, 2), told)
    assert other.lost
