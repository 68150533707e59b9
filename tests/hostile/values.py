"""Hostile values of options and arguments: pools for every type and meaning."""

from __future__ import annotations

import os

from tests.hostile.commands import WORK, Meaning, Parameter
from tests.hostile.judge import REFUSED

_EITHER = ""

Value = tuple[str, str]
"""What is typed, and what must come of it: `REFUSED`, or empty where either is right."""


def _refused(*values: str) -> list[Value]:
    return [(value, REFUSED) for value in values]


def _either(*values: str) -> list[Value]:
    return [(value, _EITHER) for value in values]


_NO_NUMBERS = (
    "",
    " ",
    "x",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "1_000",
    "0x10",
    "1e400",
    "1,5",
    "1 2",
    "--1",
    "½",
    "1\n2",
    "[/red]",
    "٣",
    "9" * 26,
    "-" + "9" * 26,
    "9" * 5000,
    "1e",
    "None",
    "True",
    "$(id)",
    "%s",
)
_NO_INTEGERS = ("1.5", "1e3", "-1", "-0.0", str(2**63), str(-(2**63)))
_LARGE = ("1000000", str(2**31), str(2**40))
_FLOATS = ("-1", "-0.0", "0", "1e-320", "1e300", "2", "1.0000001", "5e-1", ".5", "1e-9")

_TEXTS = (
    "",
    " ",
    "[/red]",
    "[bold",
    "[link=file:///x]y[/link]",
    ":smile:",
    "<image>",
    "<s></s><unk>",
    "{expression}",
    "{0.__class__}",
    "%s%n",
    "a" * 10_000,
    "\u202e reversed",
    "\U0001f600",
    "e\u0301",
    "\ud800",
    os.fsdecode(b"\xff\xfe"),
    "a\nb",
    "a\tb",
    "a\x1b[31mb",
    "a\x07b",
    "\\",
    "'; rm -rf x",
    "$x^2$",
    "\\alpha",
    "<script>alert(1)</script>",
    "| a | b |",
    "- --",
    "--help",
    "ﬀ",
    "NUL",
)
_NAMES = (
    "../../x",
    "..",
    ".",
    "/",
    "a/b",
    "x" * 300,
    "unc\n",
    "UNC",
    "unc,unc",
    "none",
    "None",
    "__class__",
    "gap_export",
    "~",
    "*",
)
_PARTS = (
    ",",
    ",,",
    "0.5,",
    "0.5,x",
    "0.5,nan",
    "0.5,0.5",
    "0,1",
    "0.5;0.3",
    "-1,1",
    "1e-300,1.0",
    "0.5," * 50,
)
_ADDRESSES = (
    "127.0.0.1:1",
    "x",
    "[/red]",
    "ray://",
    "ray://127.0.0.1:1",
    "auto",
    "",
    "file:///x",
    "1:2:3",
    "\x1b[0m",
)


def values_of(parameter: Parameter) -> list[Value]:
    """Values of a parameter that is no path; paths are in `nodes.py`."""
    if parameter.kind is bool:
        return []
    if parameter.kind is int:
        large = [] if parameter.flag in WORK else _either(*_LARGE)
        return _refused(*_NO_NUMBERS, *_NO_INTEGERS[:2]) + _either(*_NO_INTEGERS[2:4], "0") + large
    if parameter.kind is float:
        return _refused(*_NO_NUMBERS) + _either(*_FLOATS)
    meaning = parameter.meaning
    if meaning in (Meaning.FRACTIONS, Meaning.COUNTS):
        return _refused(*(each for each in _NO_NUMBERS if each.strip() and each != "1,5")) + _either(
            "",
            " ",
            "1,5",
            *_FLOATS,
            *_PARTS,
            *(f"{low}:{high}" for low in ("0.1", "nan", "") for high in ("1", "0", "x")),
        )
    if meaning is Meaning.NAME:
        return _either("") + _refused(*_NAMES[:9]) + _either(*_NAMES[9:], *_TEXTS)
    if meaning is Meaning.ADDRESS:
        return _either(*_ADDRESSES)
    return _either(*_TEXTS)
