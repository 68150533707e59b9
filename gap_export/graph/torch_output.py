"""What torch writes while it exports: held back, and kept for a log file where an export fails."""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from typing_extensions import override


class TorchOutput:
    """Everything that torch wrote, as text."""

    def __init__(self) -> None:
        self._buffer = io.StringIO()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back what this thread writes and what torch logs. What other threads write, a progress display, is let through."""
        handler = logging.StreamHandler(self._buffer)
        handlers = {logger: logger.handlers for logger in _loggers_of_torch()}
        for logger in handlers:
            logger.handlers = [handler]
        out, err = (_OfThisThread(self._buffer, stream) for stream in (sys.stdout, sys.stderr))
        try:
            with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, own in handlers.items():
                logger.handlers = own

    def write_log(self, subject: str, error: BaseException) -> Path:
        """A file of its own among the temporary ones, with all that torch wrote and where the error was raised."""
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"gap-export-{subject}-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(self._buffer.getvalue())
            log.write("\n" + "".join(traceback.format_exception(error)))
        return Path(log.name)


def _loggers_of_torch() -> list[logging.Logger]:
    """Those that write by themselves: torch gives handlers of their own to some of its packages."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    return [logging.getLogger("torch"), *(each for each in map(logging.getLogger, names) if each.handlers)]


class _OfThisThread(io.TextIOBase):
    """Takes what the thread that made it writes; what others write goes where it would have gone."""

    def __init__(self, taken: TextIO, others: TextIO) -> None:
        self._taken, self._others, self._thread = taken, others, threading.get_ident()

    @override
    def write(self, text: str) -> int:
        mine = threading.get_ident() == self._thread
        return (self._taken if mine else self._others).write(text)

    @override
    def flush(self) -> None:
        if threading.get_ident() != self._thread:
            self._others.flush()

    @override
    def isatty(self) -> bool:
        return self._others.isatty()
