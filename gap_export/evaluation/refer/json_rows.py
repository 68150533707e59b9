"""Rows of a JSON file, a list or JSON lines, each with the place where it stands.

Files come from everywhere. A byte order mark and blank lines are passed over; lines end at a line feed alone, so that other separators
(U+2028, U+2029, NEL) may stand inside a string. What is not UTF-8, or not JSON, is an error that names the file and the line.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import InputError

_MARK = "\ufeff"


@dataclass(frozen=True)
class JsonRow:
    """One row.

    Attributes:
        where: the file and the place in it, for messages.
        value: of the row.
    """

    where: str
    value: Any


def json_rows(
    path: Path,
    *,
    hint: str = "get the file again",
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[JsonRow]:
    """Read a JSON list, JSON lines, or one JSON object.

    Args:
        path: of the file.
        hint: what to do about a line that cannot be used.
        around: a context for every line, which may let an unusable one pass.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or not JSON.
    """
    content = _content(path)
    start = content.lstrip()[:1]
    if start == b"[":
        rows = json_value(_decoded(content, path, hint), str(path), hint)
        return [JsonRow(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
    if start == b"{" and (value := _one_object(content)) is not None:
        return [JsonRow(f"{path}, row 1", value)]
    found: list[JsonRow] = []
    for number, line in _lines(content):
        with around():
            where = f"{path}, row {len(found) + 1} (line {number})"
            text = _decoded(line, path, hint, first_line=number).strip().removeprefix(_MARK)
            if text:
                found.append(JsonRow(where, json_value(text, f"{path}, line {number}", hint)))
    return found


def json_document(path: Path, *, hint: str = "get the file again") -> Any:
    """Read a file that is one JSON value.

    Raises:
        InputError: it cannot be read, is not UTF-8 or not JSON.
    """
    return json_value(_decoded(_content(path), path, hint), str(path), hint)


def json_value(text: str, where: str, hint: str) -> Any:
    """Parse JSON.

    Args:
        text: one JSON value.
        where: it is from, for the message.
        hint: what to do where it cannot be parsed.

    Raises:
        InputError: it is not JSON, or no Python value can be made of it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # (A message about one line names it already; a document's own line is worth naming.)
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise InputError(f"is not JSON: {error.msg}", subject=place, hint=hint) from error
    except RecursionError as error:
        raise InputError("is nested too deeply", subject=where, hint=hint) from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"cannot be read: {error}", subject=where, hint=hint) from error


def escaped(text: str) -> str:
    r"""The text with lone surrogates, which no file in UTF-8 can hold, written as escapes (`\ud83d`)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _content(path: Path) -> bytes:
    """All bytes without the byte order mark.

    Raises:
        InputError: the file cannot be read, or is plainly of another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", subject=str(path), hint="give a file that can be read"
        ) from error
    packed(content, path)
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise InputError("is UTF-16 or UTF-32, not UTF-8", subject=f"{path}, line 1", hint="save it as UTF-8")
    return content.removeprefix(BOM_UTF8)


_PACKED = {
    b"version https://git-lfs": ("is the pointer of Git LFS to a file, not the file", "git lfs pull"),
    b"\x1f\x8b": ("is compressed (gzip)", "unpack it first"),
    b"PK\x03\x04": ("is an archive (zip)", "unpack it first, and give what is in it"),
    b"\xfd7zXZ": ("is compressed (xz)", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("is compressed (zstd)", "unpack it first"),
}
"""First bytes of files that stand for others -> what is wrong, and what to do."""


def packed(content: bytes, path: Path) -> None:
    """Refuse a file that stands for another one.

    Args:
        content: its first bytes, or all.
        path: of the file.

    Raises:
        InputError: it is compressed, or a pointer of Git LFS.
    """
    for start, (message, hint) in _PACKED.items():
        if content.startswith(start):
            raise InputError(message, subject=str(path), hint=hint)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, line


def _decoded(content: bytes, path: Path, hint: str, *, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = first_line + before.count(b"\n")
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise InputError(
            f"is not UTF-8: byte {content[error.start]:#04x} at column {column}",
            subject=f"{path}, line {line}",
            hint=f"save it as UTF-8, or {hint}",
        ) from error


def _one_object(content: bytes) -> dict[str, Any] | None:
    """The object that stands on several lines; None where lines are values of their own, or nothing is JSON."""
    _, first = next(_lines(content))
    if _parsed(first) is not None:
        return None
    value = _parsed(content)
    return value if isinstance(value, dict) else None


def _parsed(content: bytes) -> Any:
    """A JSON value; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
