"""Runs inputs one after the other, holds each against its twin, and counts how they ended."""

from __future__ import annotations

import json
import resource
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.calls import Call
from tests.hostile.cases import Case
from tests.hostile.child import Ended, run_alone
from tests.hostile.judge import (
    ACCEPTED,
    FAULT,
    faults_of_cost,
    faults_of_ending,
    faults_of_files,
    outcome_of,
    snapshot,
)
from tests.hostile.surroundings import may_mount
from tests.hostile.world import World

_AGAIN = ("slow: ", "hang: ", "memory: ")
"""Faults of a busy machine: what shows them is run once more."""
_TRACED = 12
"""One in so many inputs is traced where its graphs are new, for as long as that takes."""
_LONGEST_S, _HANGS_S = 120.0, 45.0
_NOT_OURS = (".cache", ".ses")
"""In the home and the temporary folder: ONNX Runtime keeps a number of the machine there, matplotlib its fonts."""
_PLAINLY_LITTLE = 150 * 2**20
"""More bytes than this process has taken: any command takes half as much."""
NOT_HERE = "not here"
"""What this machine does not let anybody make."""


@dataclass(frozen=True)
class Result:
    """How one input ended."""

    case: Case
    outcome: str
    faults: tuple[str, ...]
    seconds: float


@dataclass
class Outcomes:
    """Counts by command and kind, and what was wrong."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    wrong: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, result: Result) -> None:
        """Count one."""
        row = self.counts.setdefault((result.case.twin.command, result.case.kind), Counter())
        row["inputs"] += result.outcome != NOT_HERE
        row[FAULT if result.faults else result.outcome] += 1
        if result.faults:
            self.wrong.append(result)

    @property
    def inputs(self) -> int:
        """All that ran."""
        return sum(row["inputs"] for row in self.counts.values())

    def table(self) -> str:
        """Rows of text: command, kind, inputs, refused, accepted, faults."""
        columns = ("inputs", "refused", ACCEPTED, FAULT, NOT_HERE)
        lines = [f"{'command':<10} {'kind':<26}" + "".join(f"{name:>10}" for name in columns)]
        total = Counter[str]()
        for (command, kind), row in sorted(self.counts.items()):
            lines.append(f"{command:<10} {kind:<26}" + "".join(f"{row[name]:>10}" for name in columns))
            total += row
        lines.append(f"{'all':<10} {'':<26}" + "".join(f"{total[name]:>10}" for name in columns))
        return "\n".join(lines)

    def as_json(self) -> str:
        """The same, for programs."""
        rows = [
            {"command": command, "kind": kind, **row} for (command, kind), row in sorted(self.counts.items())
        ]
        wrong = [{"input": each.case.id, "faults": each.faults} for each in self.wrong]
        return json.dumps({"seconds": round(self.seconds, 1), "rows": rows, "faults": wrong}, indent=1)


class Campaign:
    """Runs inputs.

    Args:
        world: the harmless files.
        folder: for the folders that inputs run in; each is removed afterwards.
        compares: whether what is accepted is held against its harmless twin, which is run for that.
    """

    def __init__(self, world: World, folder: Path, *, compares: bool = True) -> None:
        self._world, self._folder, self._compares = world, folder, compares
        self._twins: dict[str, Ended] = {}
        self._faults_of_twins: list[str] = []
        self._mounts: bool | None = None
        self._most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _PLAINLY_LITTLE

    def run(self, cases: Iterable[Case], told: Callable[[Result], None] = lambda _: None) -> Outcomes:
        """All of them, one after the other."""
        outcomes, began = Outcomes(), time.monotonic()
        for case in cases:
            result = self.result(case)
            outcomes.add(result)
            told(result)
        outcomes.seconds = time.monotonic() - began
        return outcomes

    def twin(self, call: Call) -> Ended:
        """How a harmless call ends; it must be accepted."""
        if call.name not in self._twins:
            # What is traced is kept: where that was done, the second time is the one to compare with.
            for _ in range(2 if call.builds else 1):
                ended, faults = self._run(Case("twin", "", "", call, call), traces=True)
            assert ended is not None
            assert ended.code in (0, 1), f"{call.name}: {ended.err}"
            self._twins[call.name] = ended
            self._faults_of_twins += [f"harmless {call.name}: {fault}" for fault in faults]
        return self._twins[call.name]

    def result(self, case: Case) -> Result:
        """Run one input, and once more where its time or memory was wrong."""
        if case.environment.needs_mount and not self._may_mount():
            return Result(case, NOT_HERE, (), 0.0)
        if self._compares and case.twin.builds:
            self.twin(case.twin)  # so that its graphs are traced already
        for attempt in range(2):
            ended, faults = self._run(case, traces=self._is_traced(case))
            if ended is None:
                return Result(case, NOT_HERE, (), 0.0)
            if self._is_compared(case, ended):
                faults += faults_of_cost(ended, self.twin(case.twin))
            if attempt or not any(fault.startswith(_AGAIN) for fault in faults):
                break
        faults += self._faults_of_twins
        self._faults_of_twins = []
        return Result(case, outcome_of(ended), tuple(faults), ended.seconds)

    def _is_compared(self, case: Case, ended: Ended) -> bool:
        """Of most refusals it is plain that they cost no more than what is harmless: that need not run then."""
        costs = outcome_of(ended) == ACCEPTED or ended.peak_bytes > self._most
        return self._compares and costs and not self._is_traced(case)

    def _is_traced(self, case: Case) -> bool:
        return zlib.crc32(ascii(case.id).encode()) % _TRACED == 0

    def _run(self, case: Case, *, traces: bool) -> tuple[Ended | None, list[str]]:
        place = self._folder / "place"
        work = place / "work"
        work.mkdir(parents=True)
        try:
            self._world.copy(case.twin.needs, work)
            try:
                if not case.make(work):
                    return None, []
            except Exception as error:
                raise RuntimeError(f"the generator could not make {case.id}") from error
            before = snapshot(work)
            ended = run_alone(
                case.call.line,
                place,
                seconds=_LONGEST_S if traces else _HANGS_S,
                caches=self._world.caches,
                environment=case.environment,
                traces=traces,
            )
            faults = faults_of_ending(ended, expect=case.expect, says_so=case.says_so)
            if work.is_dir():
                makes, rewrites = case.call.makes, case.call.rewrites
                faults += faults_of_files(before, snapshot(work), makes=makes, rewrites=rewrites)
            for name in ("home", "tmp"):
                left = (path for path in snapshot(place / name) if not path.startswith(_NOT_OURS))
                faults += [f"left in {name}: {path!a}" for path in left]
            return ended, faults
        finally:
            shutil.rmtree(place)

    def _may_mount(self) -> bool:
        if self._mounts is None:
            tried = self._folder / "mounts"
            tried.mkdir(parents=True)
            self._mounts = may_mount(tried)
            shutil.rmtree(tried)
        return self._mounts
