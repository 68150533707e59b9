"""Tasks in worker processes: results, errors of all kinds, and that no worker outlives its caller."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gap_export import errors
from gap_export.errors import GapExportError, InputError, LintError, MissingRequirementError
from gap_export.parallel.local import results_of
from tests.recorded import Recorded

# Workers start afresh and import what they are made of by name, so it must lie where they look.
MODULE = """
import os
import time
from gap_export.errors import LintError

class Doubling:
    def __init__(self):
        self.tasks_done = 0

    def __call__(self, task, progress):
        if task == "killed":
            os.kill(os.getpid(), 9)
        if task == "sleeps":
            print(os.getpid(), flush=True)
            time.sleep(600)
        if task == "refuses":
            raise LintError("does not survive", subject="a [graph]", hint="mend it")
        if task == "bug":
            raise ZeroDivisionError
        self.tasks_done += 1
        progress.stage(f"doubling {task}")
        progress.advance(task)
        yield task, 2 * task
        yield os.getpid(), self.tasks_done

def refused():
    raise LintError("cannot start", subject="worker", hint="mend it")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "doubling_for_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import doubling_for_tests  # type: ignore[import-not-found]

    return doubling_for_tests


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_results_do_not_depend_on_the_number_of_workers(workers: int, module: Any) -> None:
    recorded = Recorded()
    results = list(results_of(module.Doubling, [1, 2, 3], workers=workers, progress=recorded))
    assert sorted(pair for pair in results if pair[0] in (1, 2, 3)) == [(1, 2), (2, 4), (3, 6)]
    assert sorted(recorded.counts) == [1, 2, 3]
    assert sorted(recorded.messages) == ["doubling 1", "doubling 2", "doubling 3"]
    counts = dict(pair for pair in results if pair[0] not in (1, 2, 3))
    assert sum(counts.values()) == 3, "a worker is made once per process and keeps what it knows"
    assert 1 <= len(counts) <= min(workers, 3)
    assert (os.getpid() in counts) == (workers == 1)


def test_nothing_to_do(module: Any) -> None:
    assert list(results_of(module.Doubling, [], workers=2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_ours_come_across_whole(workers: int, module: Any) -> None:
    with pytest.raises(LintError, match="does not survive") as caught:
        list(results_of(module.Doubling, ["refuses", "refuses"], workers=workers))
    assert (caught.value.subject, caught.value.hint) == ("a [graph]", "mend it")
    with pytest.raises(LintError, match="cannot start"):
        list(results_of(module.refused, [1, 2], workers=workers))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("task", "words"), [("killed", "was killed .SIGKILL."), ("bug", "ended with exit code 1")]
)
def test_a_worker_that_breaks_down_is_noticed(
    task: str, words: str, module: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingRequirementError, match=words) as caught:
        list(results_of(module.Doubling, [task, task], workers=2))
    assert "--workers 1" in caught.value.hint
    assert not multiprocessing.active_children()
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (task == "bug")


def test_a_caller_that_stops_early_ends_the_workers(module: Any) -> None:
    results = results_of(module.Doubling, [1, "sleeps", "sleeps"], workers=2)
    assert next(results) == (1, 2)
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_caller_that_is_killed_leaves_no_worker_behind(module: Any, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "if __name__ == '__main__':\n"
        "    import doubling_for_tests; from gap_export.parallel.local import results_of\n"
        "    list(results_of(doubling_for_tests.Doubling, ['sleeps', 'sleeps'], workers=2))\n"
    )
    (tmp_path / "program.py").write_text(program)
    caller = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True
    )
    assert caller.stdout is not None
    for _ in range(2):
        assert int(caller.stdout.readline())
    caller.send_signal(signal.SIGKILL)
    # The workers sleep for minutes and hold the pipe open: it ends when they do.
    assert caller.communicate(timeout=60)[0] == ""


def test_no_workers_at_all(module: Any) -> None:
    with pytest.raises(InputError, match="at least 1"):
        list(results_of(module.Doubling, [1], workers=0))


@pytest.mark.parametrize(
    "kind",
    [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, GapExportError)],
)
def test_errors_can_be_pickled(kind: type[GapExportError]) -> None:
    again = pickle.loads(pickle.dumps(kind("broke", subject="a thing", hint="mend it")))
    assert type(again) is kind
    assert str(again) == str(kind("broke", subject="a thing", hint="mend it"))
