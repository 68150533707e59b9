"""TensorRT and TensorRT-RTX behind one door: they share a Python API, so the module's name is all that differs.

Both libraries keep the first logger of a process and ignore every later one, so the log is one per library and lives as
long as the process; `MessageLog.collecting` gives one piece of work the messages that arrived during it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gap_export.bundle.manifest import EngineTarget
from gap_export.errors import MissingRequirementError


@dataclass(frozen=True)
class Target:
    """What sets a target apart.

    Attributes:
        title: the library's name in messages.
        module: the Python module.
        extra: the optional dependencies of this package that bring it.
        ahead_of_time: whether it builds for GPUs other than the one at hand, or with none at hand.
    """

    title: str
    module: str
    extra: str
    ahead_of_time: bool


TARGETS: dict[EngineTarget, Target] = {
    "tensorrt-rtx": Target("TensorRT-RTX", "tensorrt_rtx", "rtx", ahead_of_time=True),
    "tensorrt": Target("TensorRT", "tensorrt", "tensorrt", ahead_of_time=False),
}


@dataclass(frozen=True)
class Message:
    """One line a library logged.

    Attributes:
        severity: 0 internal error, 1 error, 2 warning, as in the libraries' `Logger.Severity`.
        text: the line.
    """

    severity: int
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the library calls it an error."""
        return self.severity <= 1


@dataclass
class MessageLog:
    """Where a library's messages of warning severity and above arrive, from whichever of its threads."""

    _sink: list[Message] | None = None
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock)

    def add(self, severity: int, text: str) -> None:
        """Take one message; dropped when they are not collected."""
        if self._sink is not None and severity <= 2:
            self._sink.append(Message(severity, text))

    @contextmanager
    def collecting(self) -> Iterator[list[Message]]:
        """The messages that arrive within the block. Other threads wait: the log cannot tell whose a message is."""
        with self._one_at_a_time:
            outer, self._sink = self._sink, []
            try:
                yield self._sink
            finally:
                self._sink = outer


@dataclass(frozen=True)
class Library:
    """An imported library.

    Attributes:
        target: its name in this package.
        api: the module.
        log: where its messages arrive.
        logger: the `ILogger` to hand to builders and runtimes.
    """

    target: EngineTarget
    api: Any
    log: MessageLog
    logger: Any

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{TARGETS[self.target].title} {self.version}"

    @property
    def version(self) -> str:
        """For example `1.7.1.116`."""
        return str(self.api.__version__)


@cache
def load_library(target: EngineTarget) -> Library:
    """Import the library of a target.

    Raises:
        MissingRequirementError: it is not installed, or does not load.
    """
    wanted = TARGETS[target]
    try:
        api = importlib.import_module(wanted.module)
    except (
        ImportError,
        OSError,
    ) as error:  # OSError: the module is there, the shared libraries it loads are not
        missing = isinstance(error, ModuleNotFoundError)
        raise MissingRequirementError(
            f"{wanted.title} is not installed" if missing else f"{wanted.title} does not load: {error}",
            subject=wanted.module,
            hint=f"install it: pip install 'gap-export[{wanted.extra}]'",
        ) from error
    log = MessageLog()
    return Library(target=target, api=api, log=log, logger=_logger(api, log))


def _logger(api: Any, log: MessageLog) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]  # a C++ class without stubs
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(int(severity), message)

    return Logger()
