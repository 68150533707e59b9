"""Controls: a command that behaves badly is caught, whatever it does; one that behaves is not."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export import cli
from tests.hostile import campaign as campaigns
from tests.hostile import judge
from tests.hostile.calls import Call
from tests.hostile.campaign import Campaign
from tests.hostile.cases import Case
from tests.hostile.judge import ACCEPTED, REFUSED

OUTPUTS = ("made", "made/*")
SAID = "input: x: cannot be used\n  hint: give another\n"


def refuses(text: str = SAID) -> Callable[[], None]:
    def main() -> None:
        sys.stderr.write(text)
        sys.exit(2)

    return main


def accepts(*does: Callable[[], Any]) -> Callable[[], None]:
    def main() -> None:
        for each in does:
            each()
        sys.exit(0)

    return main


def raises() -> None:
    raise ValueError("a bug")


def takes_memory() -> None:
    held = bytearray(400 * 2**20)
    for place in range(0, len(held), 4096):
        held[place] = 1


def takes_time() -> None:
    began = time.process_time()
    while time.process_time() - began < 0.5:
        pass


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


BAD: dict[str, tuple[Callable[[], None], str, str]] = {
    "a traceback": (raises, "", "traceback: ValueError: a bug"),
    "a signal": (kills_itself, "", "ended by signal 11"),
    "another exit code": (lambda: sys.exit(3), "", "exit code 3"),
    "no words": (refuses(""), "", "no line of stage and hint"),
    "no hint": (refuses("input: x: cannot be used\n"), "", "no line of stage and hint"),
    "an unknown stage": (refuses("odd: x: cannot be used\n  hint: y\n"), "", "no line of stage and hint"),
    "two lines": (refuses("input: x\ny: no\n  hint: y\n"), "", "no line of stage and hint"),
    "a control character": (refuses("input: \x1b[31m: no\n  hint: y\n"), "", "unprintable"),
    "accepted": (accepts(), REFUSED, "accepted, refused is right"),
    "refused": (refuses(), ACCEPTED, "refused, accepted is right"),
    "a hang": (lambda: time.sleep(60), "", "hang: was not done"),
    "memory": (accepts(takes_memory), "", "memory: "),
    "time": (accepts(takes_time), "", "slow: "),
    "a file changed": (accepts(lambda: Path("theirs").write_text("mine")), "", "changed 'theirs'"),
    "a file replaced": (
        accepts(lambda: Path("made").write_text("theirs"), lambda: Path("made").replace("theirs")),
        "",
        "changed 'theirs'",
    ),
    "a file removed": (accepts(lambda: Path("theirs").unlink()), "", "removed 'theirs'"),
    "a folder removed": (accepts(lambda: Path("their folder").rmdir()), "", "removed 'their folder'"),
    "a mode changed": (accepts(lambda: Path("theirs").chmod(0o600)), "", "changed 'theirs'"),
    "a file made": (accepts(lambda: Path("other").touch()), "", "made 'other'"),
    "half a file": (
        accepts(lambda: Path("made").mkdir(), lambda: Path("made/.x.writing").touch()),
        "",
        "left ",
    ),
    "a lock": (accepts(lambda: Path(".made.lock").touch()), "", "left '.made.lock'"),
    "a scratch folder": (accepts(lambda: Path(".made.building-x").mkdir()), "", "left '.made.building-x'"),
    "in the temporary folder": (
        accepts(lambda: Path(os.environ["TMPDIR"], "x").touch()),
        "",
        "left in tmp: 'x'",
    ),
    "in the home folder": (accepts(lambda: Path("~/x").expanduser().touch()), "", "left in home: 'x'"),
    "outside": (accepts(lambda: Path("../../outside").touch()), "", "WrittenOutsideError"),
}


class Prepared:
    """Somebody's file and folder."""

    caches = Path("absent")

    def copy(self, _: object, target: Path) -> None:
        (target / "theirs").write_text("theirs")
        (target / "theirs").chmod(0o644)
        (target / "their folder").mkdir()


def faults(
    main: Callable[[], None], expect: str, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = ""
) -> str:
    """Of a command that does that; its twin does nothing."""
    monkeypatch.setattr(campaigns, "_HANGS_S", 2 if name == "a hang" else 60)
    monkeypatch.setattr(judge, "_MORE_S", 0.2)
    monkeypatch.setattr(campaigns, "_TRACED", 2**40)
    call = Call("inspect", makes=OUTPUTS)
    running = Campaign(Prepared(), folder)  # type: ignore[arg-type]
    monkeypatch.setattr(cli, "main", accepts())
    running.twin(call)
    monkeypatch.setattr(cli, "main", main)
    return "; ".join(running.result(Case("", "", "", call, call, expect=expect)).faults)


@pytest.mark.parametrize("name", BAD)
def test_bad_behaviour_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, expect, words = BAD[name]
    assert words in faults(main, expect, tmp_path, monkeypatch, name)


@pytest.mark.parametrize(
    ("main", "expect"),
    [
        (refuses(), REFUSED),
        (refuses("warning: odd\n" + SAID), REFUSED),
        (accepts(), ACCEPTED),
        (lambda: sys.exit(1), ACCEPTED),
        (accepts(lambda: Path("made").mkdir(), lambda: Path("made/x").touch()), ""),
        (accepts(lambda: Path("theirs").read_text()), ""),
    ],
)
def test_good_behaviour_is_not(
    main: Callable[[], None], expect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not faults(main, expect, tmp_path, monkeypatch)
