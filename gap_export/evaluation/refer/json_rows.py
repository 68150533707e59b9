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
from gap_export.files import FileKind, parse_json, read_bytes
from gap_export.files.kinds import ANNOTATIONS


@dataclass(frozen=True)
class JsonRow:
    """One row.

    Attributes:
        where: the file and the place in it, for messages.
        value: of the row; `Damaged` where it is no JSON, and was let pass.
    """

    where: str
    value: Any


@dataclass(frozen=True)
class Damaged:
    """A line that cannot be read.

    Attributes:
        content: of the line.
    """

    content: bytes


def json_rows(
    path: Path,
    kind: FileKind = ANNOTATIONS,
    *,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[JsonRow]:
    """Read a JSON list, JSON lines, or one JSON object.

    Args:
        path: of the file.
        kind: of the file.
        around: a context for every line, which may let an unusable one pass.

    Raises:
        GapExportError: of the kind's type: the file cannot be read, is not UTF-8 or not JSON.
    """
    content = _content(path, kind)
    start = content.lstrip()[:1]
    if start == b"[":
        rows = parse_json(content, str(path), kind, as_python=True)
        return [JsonRow(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
    if start == b"{" and _is_one_object(content):
        return [JsonRow(f"{path}, row 1", parse_json(content, str(path), kind, as_python=True))]
    found: list[JsonRow] = []
    read = 0
    for number, line in _lines(content):
        row = JsonRow(f"{path}, line {number}", Damaged(line))
        with around():
            value = parse_json(
                line.strip().removeprefix(BOM_UTF8), str(path), kind, line=number, as_python=True
            )
            read += 1
            row = JsonRow(f"{path}, row {read} (line {number})", value)
        found.append(row)
    return found


def json_document(path: Path, kind: FileKind = ANNOTATIONS) -> Any:
    """Read a file that is one JSON value.

    Raises:
        GapExportError: of the kind's type: it cannot be read, is not UTF-8 or not JSON.
    """
    return parse_json(_content(path, kind), str(path), kind, as_python=True)


def escaped(text: str) -> str:
    r"""The text with lone surrogates, which no file in UTF-8 can hold, written as escapes (`\ud83d`)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _content(path: Path, kind: FileKind) -> bytes:
    """All bytes without the byte order mark.

    Raises:
        GapExportError: the file cannot be read, or is plainly of another encoding.
    """
    content = read_bytes(path, kind)
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
        if line.strip().removeprefix(BOM_UTF8):
            yield number, line


def _is_one_object(content: bytes) -> bool:
    """Whether it is an object that stands on several lines; False where lines are values of their own, or nothing is JSON."""
    _, first = next(_lines(content))
    return not _is_json(first) and _is_json(content)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
