"""Whatever the command line has and whatever kind of file is read has hostile inputs; what has none fails here, and says where to add them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer

from gap_export.cli import app
from gap_export.errors import InputError
from gap_export.files.kinds import FILE_KINDS, FileKind
from tests.hostile.calls import CALLS, UNUSED, Call
from tests.hostile.commands import commands_of, parameters_of
from tests.hostile.coverage import kinds_lacking, lacking
from tests.hostile.sources import SOURCES


def test_every_command_and_option_has_inputs() -> None:
    assert not lacking(app)


def test_every_kind_of_file_has_inputs() -> None:
    assert not kinds_lacking(FILE_KINDS)


def test_nothing_is_excused_that_is_not_there() -> None:
    flags = {name for parameter in parameters_of(app) for name in (parameter.flag, parameter.name)}
    assert flags >= UNUSED.keys()
    assert {call.command for call in CALLS} == set(commands_of(app))
    assert len({call.name for call in CALLS}) == len(CALLS)
    names = {call.name for call in CALLS}
    assert {source.call for source in SOURCES} <= names
    assert len({source.name for source in SOURCES}) == len(SOURCES)


def added(app: typer.Typer) -> typer.Typer:
    """The command line with a command more, of one option of every kind."""
    other = typer.Typer()
    other.registered_commands = list(app.registered_commands)

    @other.command()
    def later(
        source: Path,
        words: Annotated[str, typer.Option()] = "",
        count: Annotated[int, typer.Option()] = 1,
    ) -> None:
        """Comes later."""

    return other


def test_a_later_command_fails_until_it_has_inputs() -> None:
    (message,) = lacking(added(app))
    assert message.startswith("later: no harmless call")
    assert "tests/hostile/calls.py" in message


def test_later_options_fail_until_it_is_said_what_they_stand_for() -> None:
    found = lacking(added(app), (*CALLS, Call("later", ("x",))))
    assert [message.partition(":")[0] for message in found] == [
        "later",
        "later source",
        "later --words",
        "later --words",
        "later --count",
        "later --count",
    ]


def test_an_option_that_names_a_file_fails_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hostile.cases.TO_READ", ())
    found = [message for message in lacking(app) if "inputs, at least" in message]
    assert {"run --image", "eval --data", "build --model", "lint graph"} <= {
        message.partition(":")[0] for message in found
    }


def test_a_later_kind_of_file_fails_until_it_has_inputs() -> None:
    later = FileKind("a later kind", 1, InputError, "")
    (message,) = kinds_lacking((*FILE_KINDS, later))
    assert message.startswith("a later kind")
    assert "tests/hostile/sources.py" in message
