"""What the command line and the table of kinds have, and the generator has not: each is named with the place where inputs of it are added."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import typer

from gap_export.files.kinds import FileKind
from tests.hostile.calls import CALLS, UNUSED, Call
from tests.hostile.cases import of_parameter, of_surroundings
from tests.hostile.commands import commands_of, parameters_of
from tests.hostile.sources import SOURCES, Source
from tests.hostile.surroundings import ENVIRONMENTS

MIN_OF_PARAMETER, MIN_OF_PATH = 3, 30
"""Inputs of every option and argument; of those that name a file or a folder."""


def lacking(app: typer.Typer, calls: Collection[Call] = CALLS) -> list[str]:
    """What is wrong with the inputs of a command line.

    Args:
        app: the commands.
        calls: harmless ones.
    """
    found = []
    for command in commands_of(app):
        if not any(call.command == command for call in calls):
            found.append(f"{command}: no harmless call: add one to CALLS in tests/hostile/calls.py")
        elif len(list(of_surroundings(command))) < len(ENVIRONMENTS):
            found.append(f"{command}: not tried in every environment: see tests/hostile/surroundings.py")
    for parameter in parameters_of(app):
        if not any(call.command == parameter.command for call in calls):
            continue
        excused = parameter.flag in UNUSED or parameter.name in UNUSED
        used = (
            excused
            or parameter.is_argument
            or any(
                parameter.flag in call.options or f"--no-{parameter.flag[2:]}" in call.options
                for call in calls
                if call.command == parameter.command
            )
        )
        if not used:
            found.append(
                f"{parameter.name}: in no harmless call: add it to one of CALLS in tests/hostile/calls.py"
            )
        if parameter.needs_meaning and parameter.meaning is None:
            found.append(f"{parameter.name}: say what it stands for in MEANINGS of tests/hostile/commands.py")
            continue
        least = MIN_OF_PATH if parameter.names_a_file else 1 if parameter.is_argument else MIN_OF_PARAMETER
        inputs = len(list(of_parameter(parameter)))
        if inputs < least:
            found.append(
                f"{parameter.name}: {inputs} inputs, at least {least}: see of_parameter in tests/hostile/cases.py"
            )
    return found


def kinds_lacking(kinds: Iterable[FileKind], sources: Collection[Source] = SOURCES) -> list[str]:
    """Kinds of files that are read, and damaged nowhere."""
    return [
        f"{kind.name}: no file of this kind is damaged: add one to SOURCES in tests/hostile/sources.py"
        for kind in kinds
        if not any(source.kind is kind for source in sources)
    ]
