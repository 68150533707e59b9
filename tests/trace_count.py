"""How many graphs a run of the tests traced, and how many it took from the trace cache: printed at its end, for all its workers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

TRACED, TAKEN, SECONDS = "traced", "taken", "seconds"


class TraceCount(logging.Handler):
    """A plugin that listens to `graph/trace.py` and `graph/trace_cache.py`. What commands trace in processes of their own is not
    counted."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.counts: dict[str, float] = {TRACED: 0, TAKEN: 0, SECONDS: 0.0}
        for module in ("trace", "trace_cache"):
            logger = logging.getLogger(f"gap_export.graph.{module}")
            logger.setLevel(logging.INFO)
            logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.endswith("trace_cache"):
            self.counts[TAKEN] += 1
        else:
            assert isinstance(record.args, tuple)
            seconds = record.args[1]
            assert isinstance(seconds, float)
            self.counts[TRACED] += 1
            self.counts[SECONDS] += seconds

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker hands its counts over."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["traces"] = self.counts

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has finished; one that crashed has no counts."""
        for what, count in getattr(node, "workeroutput", {}).get("traces", {}).items():
            self.counts[what] += count

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.counts[TRACED] or self.counts[TAKEN]:
            terminalreporter.write_line(
                f"graphs: {self.counts[TRACED]:.0f} traced in {self.counts[SECONDS]:.0f} s of processor time, "
                f"{self.counts[TAKEN]:.0f} taken from the trace cache"
            )
