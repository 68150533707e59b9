"""Which library a target needs, and the log they all write to."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import pytest

from gap_export.engine.library import MessageLog, load_library
from gap_export.errors import MissingRequirementError


@pytest.mark.parametrize(("target", "extra"), [("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")])
def test_a_missing_library_names_the_extra(target: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingRequirementError, match="not installed") as caught:
        load_library.__wrapped__(target)
    assert f"gap-export[{extra}]" in caught.value.hint


def test_a_library_whose_shared_objects_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingRequirementError, match=r"does not load: libnvinfer\.so\.11"):
        load_library.__wrapped__("tensorrt")


def test_messages_go_to_whoever_is_collecting() -> None:
    log = MessageLog()
    log.add(1, "nobody listens")
    with log.collecting() as outer:
        log.add(1, "first")
        with log.collecting() as inner:
            log.add(0, "second")
        log.add(2, "third")
        log.add(3, "chatter")
    assert [message.text for message in outer] == ["first", "third"]
    assert [message.is_error for message in outer] == [True, False]
    assert [message.text for message in inner] == ["second"]


def test_collecting_from_another_thread_waits() -> None:
    log = MessageLog()
    seen: list[list[str]] = []

    def work() -> None:
        with log.collecting() as messages:
            log.add(1, "theirs")
        seen.append([message.text for message in messages])

    with log.collecting() as mine:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=0.05)
        assert thread.is_alive()
        log.add(1, "mine")
    thread.join(timeout=5)
    assert [message.text for message in mine] == ["mine"]
    assert seen == [["theirs"]]


def test_the_logger_of_a_library_feeds_its_log() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    library = load_library("tensorrt-rtx")
    assert library.version == trt.__version__
    assert load_library("tensorrt-rtx") is library
    with library.log.collecting() as messages:
        library.logger.log(trt.Logger.Severity.WARNING, "words")
    assert [(message.severity, message.text) for message in messages] == [(2, "words")]
