"""`gap-export` with a fault or a delay built in, for controls and for what is too quick to be counted.

python bench/serving/altered.py leak serve BUNDLE ...     whoever counts answers keeps each of them
python bench/serving/altered.py slow serve BUNDLE ...     a step of decoding takes 100 ms longer
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gap_export.cli import main
from gap_export.errors import GapExportError
from gap_export.serving.engine import Engine
from gap_export.serving.observer import NoObserver, Observer
from gap_export.serving.work import Result

LEAKED_BYTES = 4096
"""Beside every answer."""
STEP_SECONDS = 0.1


class Keeping:
    """An observer that keeps what it is told.

    Args:
        observer: that does the work.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._kept: list[object] = []

    def refused(self, reason: str) -> None:
        """Pass it on."""
        self._observer.refused(reason)

    def answered(self, result: Result) -> None:
        """Keep it."""
        self._kept.append((result, b"." * LEAKED_BYTES))
        self._observer.answered(result)

    def failed(self, error: GapExportError) -> None:
        """Pass it on."""
        self._observer.failed(error)

    def stepped(self, seconds: float, intervals: Sequence[float]) -> None:
        """Pass it on."""
        self._observer.stepped(seconds, intervals)


def leak() -> None:
    """Have every engine of this process keep its answers."""
    before = Engine.__init__

    def opened(engine: Engine, *arguments: Any, observer: Observer | None = None, **options: Any) -> None:
        before(engine, *arguments, observer=Keeping(observer or NoObserver()), **options)

    Engine.__init__ = opened  # type: ignore[method-assign,assignment]


def slow() -> None:
    """Have every step of decoding of this process take longer."""
    before = Engine._step

    def stepped(engine: Engine) -> None:
        time.sleep(STEP_SECONDS)  # others run meanwhile, as they do while a runtime computes
        before(engine)

    Engine._step = stepped  # type: ignore[method-assign,assignment]


ALTERATIONS: dict[str, Callable[[], None]] = {"leak": leak, "slow": slow}

if __name__ == "__main__":
    ALTERATIONS[sys.argv.pop(1)]()
    sys.exit(main())
