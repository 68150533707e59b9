"""The commands and their options as the command line has them, and what every text and path on it means.

A new command or option is seen here without being named. It fails `coverage.py` until it has a row: a command and an option in `CALLS`
(`calls.py`), an option that takes a text or a path in `MEANINGS`.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import typer


class Meaning(Enum):
    """What a text or a path on the command line stands for."""

    TEXT = auto()
    NAME = auto()
    FRACTIONS = auto()
    COUNTS = auto()
    ADDRESS = auto()
    READ_FILE = auto()
    READ_FOLDER = auto()
    WRITTEN_FILE = auto()
    WRITTEN_FOLDER = auto()


MEANINGS: dict[str, Meaning] = {
    "build --model": Meaning.READ_FILE,
    "build --output": Meaning.WRITTEN_FOLDER,
    "build --keep": Meaning.FRACTIONS,
    "build --base": Meaning.READ_FOLDER,
    "build --vision-tower": Meaning.READ_FOLDER,
    "build --ranges": Meaning.READ_FILE,
    "build --calibration": Meaning.READ_FILE,
    "build --weights": Meaning.NAME,
    "build --pruner": Meaning.NAME,
    "build --positions": Meaning.NAME,
    "build --merged-id": Meaning.NAME,
    "build --precision": Meaning.NAME,
    "build --target": Meaning.NAME,
    "calibrate --output": Meaning.WRITTEN_FILE,
    "validate --text": Meaning.READ_FILE,
    "run --image": Meaning.READ_FILE,
    "run --refer": Meaning.TEXT,
    "run --draw": Meaning.WRITTEN_FILE,
    "ask question": Meaning.TEXT,
    "ask --image": Meaning.READ_FILE,
    "ask --system": Meaning.TEXT,
    "ask --focus": Meaning.TEXT,
    "ask --stop": Meaning.TEXT,
    "ask --draw": Meaning.WRITTEN_FILE,
    "bench bundles": Meaning.READ_FOLDER,
    "bench --backend": Meaning.NAME,
    "bench --against": Meaning.NAME,
    "bench --keep": Meaning.FRACTIONS,
    "bench --batch": Meaning.COUNTS,
    "sweep --model": Meaning.READ_FILE,
    "sweep --pruners": Meaning.NAME,
    "sweep --keep": Meaning.FRACTIONS,
    "sweep --positions": Meaning.NAME,
    "sweep --output": Meaning.WRITTEN_FOLDER,
    "eval --predictions": Meaning.READ_FILE,
    "eval --family": Meaning.NAME,
    "eval --output": Meaning.WRITTEN_FOLDER,
    "compare reference": Meaning.READ_FOLDER,
    "compare subject": Meaning.READ_FOLDER,
    "recommend --keep": Meaning.FRACTIONS,
    "recommend --model": Meaning.READ_FILE,
    "recommend --pruners": Meaning.NAME,
    "recommend --output": Meaning.WRITTEN_FOLDER,
    "report runs": Meaning.READ_FOLDER,
    "report --output": Meaning.WRITTEN_FILE,
    "serve --host": Meaning.ADDRESS,
    "serve --name": Meaning.TEXT,
    "serve --alias": Meaning.TEXT,
    "serve --api-keys": Meaning.READ_FILE,
    "serve --allow-domain": Meaning.ADDRESS,
    "serve --adapt": Meaning.FRACTIONS,
    "check-receipt receipt": Meaning.READ_FILE,
    "check-receipt images": Meaning.READ_FILE,
    "check-receipt --refer": Meaning.TEXT,
    "check-receipt --messages": Meaning.READ_FILE,
    "lint graph": Meaning.READ_FILE,
    "lint --kind": Meaning.NAME,
    "lint --ids-input": Meaning.TEXT,
    # The same in all commands that have them:
    "bundle": Meaning.READ_FOLDER,
    "--data": Meaning.READ_FILE,
    "--images": Meaning.READ_FOLDER,
    "--checkpoint": Meaning.READ_FOLDER,
    "--text-tower": Meaning.READ_FOLDER,
    "--backend": Meaning.NAME,
    "--device": Meaning.NAME,
    "--precision-hint": Meaning.NAME,
    "--provider": Meaning.NAME,
    "--protocol": Meaning.NAME,
    "--box-format": Meaning.NAME,
    "--split": Meaning.TEXT,
    "--ray-address": Meaning.ADDRESS,
}
"""`COMMAND OPTION`, or an option that means the same wherever it is -> what it stands for."""

WORK = {"--limit", "--requests", "--new-tokens", "--drawn", "--worst"}
"""Counts of how much is to be done: a large one is no attack, but what was asked for."""


@dataclass(frozen=True)
class Parameter:
    """An option or argument.

    Attributes:
        command: it is of.
        flag: as typed; an argument's name.
        kind: type of its value: bool for a switch.
        is_argument: whether it goes by its place.
    """

    command: str
    flag: str
    kind: type
    is_argument: bool

    @property
    def name(self) -> str:
        """Of both, for `MEANINGS` and messages."""
        return f"{self.command} {self.flag}"

    @property
    def meaning(self) -> Meaning | None:
        """Of a text or a path; None for numbers and switches, and where nothing is said of it."""
        return MEANINGS.get(self.name, MEANINGS.get(self.flag)) if self.needs_meaning else None

    @property
    def needs_meaning(self) -> bool:
        """Whether its type alone does not say what stands there."""
        return self.kind in (str, Path)

    @property
    def names_a_file(self) -> bool:
        """Whether a file or folder stands there."""
        return self.kind is Path or self.meaning in _FILES


_FILES = (Meaning.READ_FILE, Meaning.READ_FOLDER, Meaning.WRITTEN_FILE, Meaning.WRITTEN_FOLDER)


def commands_of(app: typer.Typer) -> tuple[str, ...]:
    """Names of all commands."""
    return tuple(_group(app).commands)


def parameters_of(app: typer.Typer) -> tuple[Parameter, ...]:
    """Every option and argument of every command."""
    found = []
    for name, command in _group(app).commands.items():
        hints = typing.get_type_hints(command.callback)
        for each in command.params:
            if each.name != "help":
                is_argument = each.param_type_name == "argument"
                flag = each.name if is_argument else each.opts[0]
                found.append(Parameter(name, flag, _value_type(hints[each.name]), is_argument))
    return tuple(found)


def _group(app: typer.Typer) -> Any:
    return typer.main.get_command(app)


def _value_type(hint: Any) -> type:
    """Of `list[int] | None`, int."""
    while (inner := typing.get_args(hint)) and typing.get_origin(hint) in (
        list,
        typing.Union,
        types.UnionType,
    ):
        hint = next(each for each in inner if each is not type(None))
    return hint
