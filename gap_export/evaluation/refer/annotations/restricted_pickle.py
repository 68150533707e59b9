"""Pickles that hold nothing but containers, texts and numbers. Whatever else one asks for is refused before anything runs.

A pickle is a program. What makes one dangerous is that it may name any function; this reader knows none.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from gap_export.errors import InputError


class _NothingElse(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused(f"an object from elsewhere ({pid!r})")


class _Refused(Exception):
    """What a pickle asked for."""


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain data, of Python 2 or 3.

    Raises:
        InputError: it asks for a class or a function, or is damaged.
    """
    try:
        with path.open("rb") as file:
            # Texts of Python 2 are bytes; those of REFER are UTF-8.
            return _NothingElse(file, encoding="utf-8").load()
    except _Refused as refused:
        raise InputError(
            f"asks for {refused}: it holds more than plain data, and nothing of it was run",
            subject=str(path),
            hint="get the annotations from their authors",
        ) from refused
    except Exception as error:  # a damaged pickle raises whatever its bytes make the reader do
        raise InputError(
            f"cannot be read as a pickle: {error}", subject=str(path), hint="get the file again"
        ) from error
