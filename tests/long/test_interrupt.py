"""Ctrl-C at any time, as a terminal sends it: to the command and all its workers. The same command afterwards finishes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.recipe.recipe import Recipe

pytestmark = pytest.mark.long

ROUNDS = 4
LONGEST_S = 25
"""Until an interrupted command has ended: workers are given some seconds to do so in order."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gap_export", *arguments]


def interrupted(line: list[str], after: float, again: float | None) -> subprocess.CompletedProcess[str]:
    """Run a command, and press Ctrl-C after so many seconds; once more, so many seconds later."""
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for pause in (after, again):
            if pause is None:
                break
            time.sleep(pause)
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"does not end after Ctrl-C: {err}")
    deadline = time.monotonic() + 10  # the tracker of multiprocessing ends after the last of them
    while (left := workers_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "workers are left"
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def workers_of(session: int) -> list[int]:
    """Processes that the command started and that still run."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(each.name)) == session and "zombie" not in (each / "status").read_text():
                found.append(int(each.name))
    return found


@pytest.mark.parametrize("name", ["eval", "sweep"])
def test_the_same_command_finishes(
    name: str, tiny_bundle: Callable[..., Bundle], tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(Recipe.model_validate(tiny_options).model_dump_json(exclude_none=True))
    out = tmp_path / "outputs" / "out"
    lines = {
        "eval": ["eval", str(tiny_bundle().folder), "--data", "scenes:3", "--limit", "900", "--threads", "1"],
        "sweep": ["sweep", "--model", str(recipe), "--pruners", "random,divprune", "--keep", "0.5,0.25",
                  "--limit", "40", "--no-plot"],
    }  # fmt: skip
    line = command(*lines[name], "--json", "-o", str(out))
    began = time.monotonic()
    whole = subprocess.run(command(*lines[name], "--json", "-o", str(tmp_path / "whole")), capture_output=True, text=True, check=True)  # fmt: skip
    lasts = time.monotonic() - began
    rng = random.Random(3)
    for round_ in range(ROUNDS):
        twice = rng.uniform(0.05, 0.6) if round_ % 2 else None
        done = interrupted(line, rng.uniform(0.2, 0.9) * lasts, twice)
        assert done.returncode in (0, 130, -signal.SIGINT), done.stderr
        assert "Traceback" not in done.stderr or done.returncode == -signal.SIGINT, done.stderr
    last = subprocess.run(line, capture_output=True, text=True, timeout=4 * lasts + 60, check=False)
    assert last.returncode == 0, last.stderr
    first, second = (json.loads(each.stdout.splitlines()[-1]) for each in (whole, last))
    assert first == second
    assert [path.name for path in out.parent.iterdir()] == ["out"]
