"""Pickles of plain data: containers, texts and numbers.

A pickle is a program. What makes one dangerous is that it may name any function; the reader here knows none, so whatever else one asks
for is refused before anything runs. Three things take memory far beyond the file's size, and are refused too: a place in the
unpickler's memory that is numbered in billions (it is allocated up to there), a length that the file does not have, and containers that
stand in many places, or within themselves, which whoever walks over them meets again and again.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from gap_export.errors import InputError, first_line
from gap_export.evaluation.refer.json_rows import packed
from gap_export.files import read_bytes
from gap_export.files.kinds import ANNOTATIONS
from gap_export.files.read import DEEPEST

_ARGUMENT = {ord(opcode.code): None if opcode.arg is None else opcode.arg.n for opcode in pickletools.opcodes}
"""Code -> bytes of the argument: fixed, or by one of the three rules below."""
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUT, _LONG_PUT = pickle.PUT[0], pickle.LONG_BINPUT[0]
_REFUSED_LATER = {
    code[0]
    for code in (
        pickle.GLOBAL,
        pickle.INST,
        pickle.STACK_GLOBAL,
        pickle.PERSID,
        pickle.BINPERSID,
        pickle.STOP,
    )
}
"""Whatever stands behind these is not run: the unpickler refuses them, or ends."""
_LONGEST_NUMBER = 2**63


class _Refused(Exception):
    """What a pickle asked for."""


class _NothingElse(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused(f"an object from elsewhere ({str(pid)[:40]!r})")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data, of Python 2 or 3.

    Raises:
        InputError: it asks for a class or a function, takes more memory than its size explains, or is damaged.
    """
    content = read_bytes(path, ANNOTATIONS)
    packed(content[:32], path)
    try:
        _check_operations(content)
        # Texts of Python 2 are bytes; those of REFER are UTF-8.
        value = _NothingElse(io.BytesIO(content), encoding="utf-8").load()
        _check_value(value, len(content))
    except _Refused as refused:
        raise InputError(
            f"asks for {refused}: it holds more than plain data, and nothing of it was run",
            subject=str(path),
            hint="get the annotations from their authors",
        ) from refused
    except Exception as error:  # a damaged pickle raises whatever its bytes make the reader do
        raise InputError(
            f"cannot be read as a pickle: {first_line(error)}", subject=str(path), hint="get the file again"
        ) from error
    return value


def _check_operations(content: bytes) -> None:
    """Look at places in memory and at lengths, up to where the unpickler would end.

    Raises:
        ValueError: one that the size of the file does not explain, or an operation that there is not.
    """
    place, end = 0, len(content)
    while place < end:
        code = content[place]
        place += 1
        if code in _REFUSED_LATER:
            return
        if code not in _ARGUMENT:
            raise ValueError(f"{code:#04x} is no operation")
        length = _ARGUMENT[code]
        if length is None:
            continue
        start = place
        if length == pickletools.UP_TO_NEWLINE:
            place = content.find(b"\n", place) + 1
            if not place:
                raise ValueError("it is cut short")
        elif length < 0:
            count = _LENGTH_BYTES[length]
            place += count + int.from_bytes(content[place : place + count], "little")
        else:
            place += length
        if place > end:
            raise ValueError("it is cut short")
        if code == _PUT and int(content[start : place - 1][:20]) > end:
            raise ValueError("it asks for more memory than it has bytes")
        if code == _LONG_PUT and int.from_bytes(content[start:place], "little") > end:
            raise ValueError("it asks for more memory than it has bytes")
    raise ValueError("it is cut short")


def _check_value(value: Any, size: int) -> None:
    """Refuse data that is deeper, or has more containers in it, than so many bytes can spell out, and numbers that are no ids.

    Raises:
        ValueError: it is.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        level = list(itertools.islice(_within(level), size + 1))
        size -= len(level)
        if size < 0:
            raise ValueError("its lists and mappings stand within each other, in many places")
        if not level:
            return
    raise ValueError(f"it is nested too deeply: there are at most {DEEPEST} levels")


def _within(level: Iterable[Any]) -> Iterable[Any]:
    """Containers in those of a level.

    Raises:
        ValueError: a number is longer than anything that is counted.
    """
    for each in level:
        parts = itertools.chain(each.keys(), each.values()) if isinstance(each, dict) else each
        for part in parts if isinstance(each, dict | list | tuple | set | frozenset) else (each,):
            if isinstance(part, dict | list | tuple | set | frozenset):
                yield part
            elif isinstance(part, int) and not -_LONGEST_NUMBER <= part < _LONGEST_NUMBER:
                raise ValueError("it holds a number of more than 64 bits")
