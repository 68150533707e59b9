"""What all parts of the measurement share: the bundle, the cores, requests and their answers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.process import ServerProcess, cores

ROWS = 8
IMAGES = 8


@dataclass(frozen=True)
class Setup:
    """Of one run.

    Attributes:
        bundle: that is served.
        scratch: folder for bundles and artefacts.
        rounds: how often times are measured.
        seconds: of a load; None for the part's own.
        clients: of a load; None for the part's own.
        images: that the requests of a load show; 25 requests for each.
        minutes: of the measurement of memory.
        control_minutes: of its control.
        server_options: further ones of the server, as they are written on a command line.
        chosen: fractions of visual tokens that a server with `--adapt` may choose.
        aiperf: the program.
        pin: whether server and clients have a core each, where there are two: what is counted alone does not need it.
        console: that is told of what is done.
    """

    bundle: Path
    scratch: Path
    rounds: int = 5
    seconds: float | None = None
    clients: int | None = None
    images: int = IMAGES
    minutes: float = 30.0
    control_minutes: float = 5.0
    server_options: tuple[str, ...] = ()
    chosen: tuple[float, ...] = ()
    aiperf: Path | None = None
    pin: bool = True
    console: Console = field(default_factory=Console)

    def server(self, *options: str, **named: Any) -> ServerProcess:
        """A server with one thread of the runtime, as many connections as are asked for, on its core.

        Args:
            options: further ones of the command.
            named: of `ServerProcess`.
        """
        both = cores() if self.pin else None
        named.setdefault("core", None if both is None else both[0])
        common = ("--threads", "1", "--rows", str(ROWS), "--max-connections", "0", *self.server_options)
        return ServerProcess(self.bundle, *common, *options, **named)


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        name: what is measured.
        measured: its value; None where it could not be measured.
        limit: to be reached.
        least: whether the value must be at least that, and not at most.
    """

    name: str
    measured: float | None
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is reached. What could not be measured is not missed."""
        if self.measured is None:
            return True
        return self.measured >= self.limit if self.least else self.measured <= self.limit

    @property
    def told(self) -> dict[str, Any]:
        """As it is recorded."""
        word = "at_least" if self.least else "at_most"
        return {"measured": self.measured, word: self.limit, "met": self.met}


@dataclass(frozen=True)
class Outcome:
    """Of one part.

    Attributes:
        facts: as they are recorded.
        targets: of it.
    """

    facts: dict[str, Any]
    targets: tuple[Target, ...]

    @property
    def ok(self) -> bool:
        """Whether all targets are reached."""
        return all(target.met for target in self.targets)

    @property
    def told(self) -> dict[str, Any]:
        """As it is recorded."""
        return {"targets": {target.name: target.told for target in self.targets}, **self.facts}


Part = Callable[[Setup], Outcome]


@contextmanager
def child_on(core: int | None) -> Iterator[ProcessPoolExecutor]:
    """A process on a core of its own, for what is measured without a server.

    Args:
        core: that it runs on; None for all.
    """
    pool = ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_pin, initargs=(core,)
    )
    with pool:
        yield pool


def _pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values does not exceed.

    Args:
        values: at least one.
        share: 0..1.
    """
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]
