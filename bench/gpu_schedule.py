"""Parts of a measurement one after the other within so many seconds: each in a process of its own, stored as soon as it ends.

A part that hangs is killed, one that dies takes nothing with it, and one that would not fit into what is left is not begun. This module
knows nothing of GPUs, and imports nothing that does: what is measured stands in the parts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, Literal

from rich.console import Console

from gap_export.errors import GapExportError

OVERRUN = 2.0
"""A part is killed after so many times its estimate: what hangs must leave time to those behind it."""
MARGIN_SECONDS = 3.0
"""Kept back of the whole, for killing the last part and for the record."""
UNFINISHED = "the run ended before this part did"

EXPECTED = (GapExportError, ImportError, MemoryError, SystemExit)
"""Whatever else a part raises is shown with a traceback."""

Missing = dict[str, str]
"""What could not be done -> why."""


class Teller:
    """How a part says what it finds, fact by fact: whatever was told is in the record, however the part ends.

    Args:
        send: takes messages, (kind, content).
        console: words go there.
    """

    def __init__(self, send: Callable[[tuple[str, Any]], None], console: Console) -> None:
        self._send, self.console = send, console

    def found(self, **facts: Any) -> None:
        """Facts by name, of what JSON knows; a later one replaces an earlier one of its name."""
        self._send(("found", facts))

    def left_out(self, what: str, reason: str) -> None:
        """Name what is not done, and why."""
        self.console.print(f"  left out, {what}: {reason}", style="yellow", highlight=False, markup=False)
        self._send(("missing", {what: reason}))

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result, or None and the reason among what was left out: one backend's trouble must not cost the others' figures."""
        began = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            self.left_out(what, _reason(error))
            if not isinstance(error, EXPECTED):
                self.console.print(traceback.format_exc(limit=-3), style="dim", highlight=False, markup=False)
            return None
        self.console.print(f"  {what}: {time.perf_counter() - began:.1f} s", highlight=False, markup=False)
        return result


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        outcome: `skipped` was not begun, `failed` raised or died, `stopped` was killed for its time; `begun` is left of a run that was killed.
        reason: of whatever is not `done`.
        seconds: it took.
        expected_seconds: its estimate.
        found: facts by name, also of a part that did not come to its end.
        missing: what it left out -> why.
    """

    outcome: Literal["begun", "done", "skipped", "failed", "stopped"]
    reason: str = ""
    seconds: float = 0.0
    expected_seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    missing: Missing = field(default_factory=dict)


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Part:
    """One piece of work.

    Attributes:
        name: unique.
        work: called with the settings and a `Teller`, in a process of its own: of a module, or a `partial` of one.
        seconds: it takes, estimated; it is killed after `OVERRUN` times as many.
        obstacle: told what came of the parts before it, why this one cannot be done; None where it can.
    """

    name: str
    work: Callable[[Any, Teller], None]
    seconds: float
    obstacle: Callable[[Outcomes], str | None] = lambda outcomes: None


def run_parts(
    parts: Sequence[Part],
    settings: Any,
    seconds: float,
    *,
    store: Callable[[Outcomes], None],
    console: Console,
) -> Outcomes:
    """All parts that fit, in their order.

    Args:
        parts: the most worth first; names distinct.
        settings: of all parts; can be pickled.
        seconds: that the whole may take, from now on.
        store: called with all outcomes so far whenever there is another, or another fact.
        console: words go there.
    """
    end = time.monotonic() + seconds - MARGIN_SECONDS
    outcomes: Outcomes = {}
    for part in parts:
        left = end - time.monotonic()
        reason = part.obstacle(outcomes)
        if reason is None and part.seconds > left:
            reason = f"time: it takes about {part.seconds:.0f} s, and {max(left, 0):.0f} s are left"
        if reason is not None:
            outcomes[part.name] = Outcome("skipped", reason, expected_seconds=part.seconds)
        else:
            console.print(
                f"{part.name}: about {part.seconds:.0f} of {left:.0f} s", style="bold", highlight=False
            )
            began, outcome = time.monotonic(), Outcome("begun", UNFINISHED, expected_seconds=part.seconds)
            outcomes[part.name] = outcome
            run_part(part, settings, outcome, min(OVERRUN * part.seconds, left), told=lambda: store(outcomes))
            outcome.seconds = round(time.monotonic() - began, 1)
        store(outcomes)
        said = outcomes[part.name]
        console.print(
            f"{part.name}: {said.outcome}{f', {said.reason}' if said.reason else f' in {said.seconds:.0f} s'}",
            style="green" if said.outcome == "done" else "yellow",
            highlight=False,
            markup=False,
        )
    return outcomes


def run_part(
    part: Part, settings: Any, outcome: Outcome, limit: float, *, told: Callable[[], None] = lambda: None
) -> None:
    """One part in a process of its own; the outcome is filled in as it tells.

    Args:
        part: what to do.
        settings: of all parts.
        outcome: to fill in.
        limit: seconds after which it is killed, with all processes that it started.
        told: called after each fact.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_in_child, args=(part.work, settings, theirs))
    child.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        while True:
            ready = wait([ours, child.sentinel], max(0.0, deadline - time.monotonic()))
            if not ready:
                outcome.outcome, outcome.reason = "stopped", f"not done after {limit:.0f} s, and killed"
                return
            try:
                if ours not in ready:
                    raise EOFError  # dead, and all that it said was read
                kind, content = ours.recv()
            except EOFError:
                child.join(1)
                outcome.outcome, outcome.reason = "failed", f"its process died{_how(child)}"
                return
            if kind == "ended":
                outcome.outcome, outcome.reason = content
                child.join(MARGIN_SECONDS / 2)  # it gives back what it holds
                return
            (outcome.found if kind == "found" else outcome.missing).update(content)
            told()
    finally:
        _kill(child)
        ours.close()


def _in_child(work: Callable[[Any, Teller], None], settings: Any, connection: Connection) -> None:
    """A part, at the head of a group of processes that can be killed as one."""
    os.setsid()
    Thread(target=_end_with_parent, daemon=True).start()
    console = Console(width=130)
    ended: tuple[str, str] = ("done", "")
    try:
        work(settings, Teller(connection.send, console))
    except (Exception, SystemExit) as error:
        ended = ("failed", _reason(error))
        if not isinstance(error, EXPECTED):
            console.print(traceback.format_exc(limit=-3), style="dim", highlight=False, markup=False)
    console.file.flush()
    connection.send(("ended", ended))


def _end_with_parent() -> None:
    """No part outlives the script, however that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _kill(child: BaseProcess) -> None:
    """The process and all that it started."""
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):  # dead with all others, or not yet at the head of a group
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join(MARGIN_SECONDS / 2)  # one that hangs in a driver is not waited for


def _how(child: BaseProcess) -> str:
    code = child.exitcode
    if code is None or code >= 0:
        return "" if code is None else f" with exit code {code}"
    hint = "; it may need more memory than there is" if code == -signal.SIGKILL else ""
    return f" of {signal.Signals(-code).name}{hint}"


def _reason(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [""]
    if isinstance(error, GapExportError | SystemExit):
        return said[0]
    return f"{type(error).__name__}: {said[0]}" if said[0] else type(error).__name__
