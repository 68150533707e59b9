"""Parts in processes of their own: their order, their time, and what is left of those that raise, hang or die."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

BENCH = str(Path(__file__).parents[2] / "bench")


def finds(settings: dict[str, Any], tell: Any) -> None:
    tell.found(answer=settings["answer"], half=1)
    tell.attempt("what is broken", lambda: 1 / 0)
    tell.found(half=2)


def raises(settings: dict[str, Any], tell: Any) -> None:
    tell.found(before=True)
    raise ValueError("no such thing\nand more")


def gives_up(settings: dict[str, Any], tell: Any) -> None:
    raise SystemExit("no space on the disk")


def dies(settings: dict[str, Any], tell: Any) -> None:
    tell.found(before=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(settings: dict[str, Any], tell: Any) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell.found(helper=helper.pid)
    time.sleep(600)


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu_schedule")


@pytest.fixture
def run(schedule: ModuleType) -> Callable[..., Any]:
    def run(*parts: Any, seconds: float = 100.0, **options: Any) -> Any:
        quiet = Console(quiet=True)
        options.setdefault("store", lambda outcomes: None)
        return schedule.run_parts(parts, {"answer": 42}, seconds, console=quiet, **options)

    return run


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for nothing but its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_parts_that_raise_die_or_hang_are_named_and_the_others_done(
    schedule: ModuleType, run: Callable[..., Any]
) -> None:
    stored: list[dict[str, Any]] = []

    def store(outcomes: dict[str, Any]) -> None:
        stored.append({name: replace(each, found=dict(each.found)) for name, each in outcomes.items()})

    works = {"raises": raises, "gives up": gives_up, "dies": dies, "finds": finds}
    parts = [schedule.Part(name, work, 20.0) for name, work in works.items()]
    parts.insert(0, schedule.Part("hangs", hangs, 3.0))  # long enough to start Python twice
    outcomes = run(*parts, store=store)
    assert list(outcomes) == ["hangs", *works]
    found = {name: (each.outcome, each.reason) for name, each in outcomes.items()}
    assert found == {
        "hangs": ("stopped", "not done after 6 s, and killed"),
        "raises": ("failed", "ValueError: no such thing"),
        "gives up": ("failed", "no space on the disk"),
        "dies": ("failed", "its process died of SIGKILL; it may need more memory than there is"),
        "finds": ("done", ""),
    }
    assert outcomes["raises"].found == outcomes["dies"].found == {"before": True}
    assert outcomes["finds"].found == {"answer": 42, "half": 2}
    assert outcomes["finds"].missing == {"what is broken": "ZeroDivisionError: division by zero"}
    assert ended(outcomes["hangs"].found["helper"])
    # A fact was stored when it was told, as of a part that had not ended; every outcome when there was one.
    told = [each["hangs"] for each in stored if each["hangs"].found]
    assert (told[0].outcome, told[0].reason) == ("begun", schedule.UNFINISHED)
    assert {len(each) for each in stored} == {1, 2, 3, 4, 5}


def test_a_part_is_begun_only_if_it_fits(schedule: ModuleType, run: Callable[..., Any]) -> None:
    outcomes = run(
        schedule.Part("long", finds, 99.0),
        schedule.Part("impossible", finds, 1.0, lambda outcomes: f"it needs {', '.join(outcomes)}"),
        schedule.Part("short", finds, 10.0),
    )
    assert outcomes["long"].outcome == "skipped"
    assert outcomes["long"].reason == "time: it takes about 99 s, and 97 s are left"
    assert (outcomes["impossible"].outcome, outcomes["impossible"].reason) == ("skipped", "it needs long")
    assert outcomes["short"].outcome == "done"


def test_the_last_part_ends_with_the_whole(schedule: ModuleType, run: Callable[..., Any]) -> None:
    began = time.monotonic()
    outcomes = run(schedule.Part("hangs", hangs, 2.9), seconds=schedule.MARGIN_SECONDS + 3.0)
    assert outcomes["hangs"].outcome == "stopped"
    assert outcomes["hangs"].reason == "not done after 3 s, and killed"
    assert time.monotonic() - began < schedule.MARGIN_SECONDS + 3.0


def test_no_part_outlives_the_script(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, time
sys.path.insert(0, {BENCH!r})
import os, subprocess
from pathlib import Path
from rich.console import Console
from gpu_schedule import Part, run_parts

def hangs(settings, tell):
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path({str(pids)!r} + ".new").write_text(f"{{os.getpid()}} {{helper.pid}}")
    os.replace({str(pids)!r} + ".new", {str(pids)!r})
    time.sleep(600)

if __name__ == "__main__":
    run_parts([Part("hangs", hangs, 100.0)], None, 300.0, store=lambda outcomes: None, console=Console())
"""
    )
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    try:
        wait_for(pids.exists)
    finally:
        child.kill()
        child.wait()
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: ended(pid))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
