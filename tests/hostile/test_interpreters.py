"""Commands in processes of their own, started in ways that a forked child cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.calls import call
from tests.hostile.child import Ended
from tests.hostile.judge import ACCEPTED, REFUSED, faults_of_ending
from tests.hostile.world import World

pytestmark = pytest.mark.long

PLAIN = [sys.executable]
STARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": (PLAIN, {}),
    "without assertions": ([*PLAIN, "-O"], {}),
    "without assertions and docstrings": ([*PLAIN, "-OO"], {}),
    "ASCII": (PLAIN, {"PYTHONIOENCODING": "ascii"}),
    "Latin-1": (PLAIN, {"PYTHONIOENCODING": "latin-1"}),
    "UTF-16": (PLAIN, {"PYTHONIOENCODING": "utf-16"}),
    "the C locale": ([*PLAIN, "-X", "utf8=0"], {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0"}),
    "unbuffered": ([*PLAIN, "-u"], {}),
    "hashes at random": (PLAIN, {"PYTHONHASHSEED": "random"}),
}
NAMES = ("run --json", "inspect", "compare", "lint", "models", "eval --predictions")


def ended(start: str, line: tuple[str, ...], work: Path, encoding: str = "utf-8") -> Ended:
    """A command in a process that is started so."""
    python, variables = STARTS[start]
    done = subprocess.run(
        [*python, "-m", "gap_export", *line],
        cwd=work,
        env={**os.environ, "HOME": str(work), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **variables},
        capture_output=True,
        timeout=60,
        check=False,
    )
    out, err = (text.decode(encoding, "backslashreplace") for text in (done.stdout, done.stderr))
    return Ended(done.returncode, 0, out, err, 0.0, 0.0, 0)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_harmless_is_accepted(start: str, name: str, world: World, tmp_path: Path) -> None:
    asked = call(name)
    world.copy(asked.needs, tmp_path)
    assert not faults_of_ending(ended(start, asked.line, tmp_path), expect=ACCEPTED)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_not_is_refused(start: str, tmp_path: Path) -> None:
    odd = os.fsdecode("ünï\U0001f600".encode() + b"\xff")
    encoding = "utf-16" if start == "UTF-16" else "utf-8"
    assert not faults_of_ending(ended(start, ("inspect", odd), tmp_path, encoding), expect=REFUSED)


@pytest.mark.parametrize("name", ["models", "models --json", "inspect"])
def test_a_reader_that_goes_away(name: str, world: World, tmp_path: Path) -> None:
    asked = call(name)
    world.copy(asked.needs, tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gap_export", *asked.line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
