"""What is right of how an input ended: its exit code, its words, its time and memory, and the files that it left."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gap_export.errors import GapExportError
from tests.hostile.child import UNTRACED, Ended

REFUSED, ACCEPTED, FAULT = "refused", "accepted", "fault"
NOT_ZERO = "an exit code that is not 0"

REFUSAL_S = 10.0
"""A refusal takes no longer."""
_TIMES, _MORE_S = 2.0, 1.0
"""An accepted input takes at most so many times as long as its harmless twin; a second is what machines differ by."""
_MORE_BYTES = 300 * 2**20
"""Nor more memory than the twin and this."""


def _stages() -> set[str]:
    kinds, found = [GapExportError], {"usage"}
    while kinds:
        kind = kinds.pop()
        found.add(kind.stage)
        kinds += kind.__subclasses__()
    return found


@dataclass(frozen=True)
class Entry:
    """What lay at a path: its kind, and, but for folders, what changes when it is written."""

    mode: int
    size: int
    inode: int
    written: int


Snapshot = dict[str, Entry]


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder, no link followed and nothing opened."""
    found: Snapshot = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            about = os.lstat(path)
            is_folder = stat.S_ISDIR(about.st_mode)
            contents = (0, 0, 0) if is_folder else (about.st_size, about.st_ino, about.st_mtime_ns)
            found[os.fsdecode(os.path.relpath(path, os.fsencode(folder)))] = Entry(about.st_mode, *contents)
    return found


def faults_of_files(
    before: Snapshot, after: Snapshot, *, makes: Iterable[str], rewrites: Iterable[str]
) -> list[str]:
    """What was made, changed or removed that must not be, and what was left half-written.

    Args:
        before: of the working folder.
        after: of it.
        makes: patterns of paths that may appear.
        rewrites: patterns of paths that may change or vanish.
    """
    makes, rewrites = tuple(makes), tuple(rewrites)
    found = []
    for path, entry in before.items():
        now = after.get(path)
        if now != entry and not _fits(path, rewrites):
            found.append(f"{'removed' if now is None else 'changed'} {path!a}")
    for path in after.keys() - before.keys():
        name = path.rpartition("/")[2]
        if name.endswith((".writing", ".lock")) or re.match(r"\..*\.(building|sweeping|[a-z]+-)", name):
            found.append(f"left {path!a}")
        elif not _fits(path, makes):
            found.append(f"made {path!a}")
    return sorted(found)


def _fits(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def outcome_of(ended: Ended) -> str:
    """Whether an input was refused or accepted; neither where it did not end as commands do."""
    if ended.code == 2:
        return REFUSED
    return ACCEPTED if ended.code in (0, 1) else FAULT


def faults_of_ending(ended: Ended, *, expect: str, says_so: bool = True) -> list[str]:
    """What is wrong with how a command ended.

    Args:
        ended: how it did.
        expect: `REFUSED`, `ACCEPTED`, `NOT_ZERO`, or empty where either is right.
        says_so: whether a refusal can be read: not where standard error is not.
    """
    found = []
    if ended.stopped:
        return [f"hang: {ended.stopped}"]
    if ended.signal:
        return [f"ended by signal {ended.signal}: {_last_line(ended.err)}"]
    traced = "Traceback (most recent call last)" in ended.err + ended.out
    if traced:
        found.append(f"traceback: {_last_line(ended.err)}")
    elif ended.code not in (0, 1, 2):
        found.append(f"exit code {ended.code}: {_last_line(ended.err)}")
    outcome = outcome_of(ended)
    if outcome == REFUSED and says_so and not traced:
        found += _faults_of_words(ended)
    if outcome == REFUSED and ended.seconds > REFUSAL_S:
        found.append(f"slow: a refusal took {ended.seconds:.1f} s")
    right = outcome == expect or (expect == NOT_ZERO and ended.code != 0)
    if expect and outcome != FAULT and not right and not traced and UNTRACED not in ended.err:
        found.append(f"{outcome}, {expect} is right: {_last_line(ended.err)}")
    return found


def faults_of_cost(ended: Ended, twin: Ended) -> list[str]:
    """What an input cost more than its harmless twin, beyond what is right."""
    found = []
    if outcome_of(ended) == ACCEPTED and ended.cpu_seconds > _TIMES * twin.cpu_seconds + _MORE_S:
        found.append(f"slow: {ended.cpu_seconds:.1f} s, its twin {twin.cpu_seconds:.1f} s")
    if ended.peak_bytes > twin.peak_bytes + _MORE_BYTES:
        found.append(f"memory: {ended.peak_bytes / 1e6:.0f} MB, its twin {twin.peak_bytes / 1e6:.0f} MB")
    return found


def _faults_of_words(ended: Ended) -> list[str]:
    """A refusal ends with one line that names the stage and one with a hint."""
    lines = ended.err.rstrip("\n").split("\n")
    stages = _stages()
    if len(lines) < 2 or not re.match(r"  hint: \S", lines[-1]) or lines[-2].partition(": ")[0] not in stages:
        return [f"no line of stage and hint: {ended.err[-200:]!r}"]
    if any(not character.isprintable() for line in lines for character in line):
        return [f"unprintable: {next(line for line in lines if not line.isprintable())[:200]!a}"]
    return []


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  hint: ")]
    return lines[-1][:300] if lines else ""
