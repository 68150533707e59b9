"""The one reader of files from outside: regular files alone, of bounded size; strict UTF-8; JSON and YAML of bounded depth.

Opening a pipe waits for ever, a device does something, and a parser takes what it is given: many times a file's bytes as memory, the depth
of its brackets as stack. Everything that is read goes through `opened` (or `check_readable`, where a library opens the file itself).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gap_export.errors import GapExportError
from gap_export.files.file import readable_size
from gap_export.files.kinds import FileKind

DEEPEST = 64
"""Lists and mappings within each other, of JSON and YAML; real files have fewer than 20."""
LONGEST_NUMBER = 1000
"""Digits; more would take seconds to convert, or be refused by Python with a message of its own."""

_PIECE_BYTES = 2**16
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

_OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_file(path: Path) -> bool:
    """Whether a regular file is there, also through a link; False for names that no file can have."""
    return _mode(path) == stat.S_IFREG


def is_folder(path: Path) -> bool:
    """Whether a folder is there, also through a link; False for names that no folder can have."""
    return _mode(path) == stat.S_IFDIR


def check_readable(path: Path, kind: FileKind) -> None:
    """Refuse what is no regular file, too large, or not readable, before a library opens it by its name.

    Raises:
        GapExportError: of the kind's type.
    """
    with opened(path, kind):
        pass


@contextmanager
def opened(path: Path, kind: FileKind) -> Iterator[BinaryIO]:
    """Open a regular file of at most so many bytes as its kind may have.

    Errors of reading inside the block are the file's too.

    Raises:
        GapExportError: of the kind's type: nothing there, no regular file, too large, not readable.
    """
    try:
        # Looked at before it is opened, because opening a device may do something; and after, because another may lie there then.
        _check_mode(path, os.stat(path).st_mode, kind)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            _check_mode(path, found.st_mode, kind)
            if kind.largest is not None and found.st_size > kind.largest:
                raise kind.error(
                    f"has {readable_size(found.st_size)}: {kind.name} has at most {readable_size(kind.largest)}",
                    subject=str(path),
                    hint="give the file that is meant",
                )
            yield file
    except OSError as error:
        raise kind.error(
            f"cannot be read: {error.strerror or error}", subject=str(path), hint=kind.hint
        ) from error
    except ValueError as error:
        if "null byte" not in str(error):  # of the path; another is the reader's own
            raise
        raise kind.error(f"cannot be read: {error}", subject=str(path), hint=kind.hint) from error


def read_bytes(path: Path, kind: FileKind) -> bytes:
    """All bytes of a file.

    Raises:
        GapExportError: of the kind's type: nothing there, no regular file, too large, not readable.
    """
    with opened(path, kind) as file:
        # Room is made for what is asked for, so no more is asked for than there is; a file of /proc has no size until it is read.
        asked, content = os.fstat(file.fileno()).st_size + 1, b""
        while piece := file.read(max(asked, _PIECE_BYTES)):
            content += piece
            if kind.largest is not None and len(content) > kind.largest:
                raise kind.error("is too large", subject=str(path), hint="give the file that is meant")
        return content


def read_text(path: Path, kind: FileKind) -> str:
    """A file in UTF-8, without its byte order mark.

    Raises:
        GapExportError: of the kind's type: it cannot be read, or is not UTF-8, with the line.
    """
    return decoded(read_bytes(path, kind), str(path), kind)


def decoded(content: bytes, subject: str, kind: FileKind, *, line: int | None = None) -> str:
    """Bytes in UTF-8 as text, without a byte order mark.

    Args:
        content: of a file.
        subject: where it is from, for the message.
        kind: of the file.
        line: number of the first line, where the content is a part of a file that can do without it.

    Raises:
        GapExportError: of the kind's type, with the line.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        number = before.count(b"\n") + (line or 1)
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise kind.error(
            f"is not UTF-8: byte {content[error.start]:#04x} at column {column}",
            subject=f"{subject}, line {number}",
            hint="save it as UTF-8" if line is None else f"save it as UTF-8, or {kind.hint}",
        ) from error


def read_json(path: Path, kind: FileKind) -> Any:
    """A file that is one JSON value, whose keys stand once and whose numbers are finite.

    Raises:
        GapExportError: of the kind's type: it cannot be read, or is not such JSON.
    """
    return parse_json(read_text(path, kind), str(path), kind)


def parse_json(
    text: str | bytes, subject: str, kind: FileKind, *, line: int | None = None, as_python: bool = False
) -> Any:
    """Parse JSON as its standard has it: no NaN, no infinity, no key twice in an object with different values.

    Args:
        text: one JSON value.
        subject: where it is from, for the message.
        kind: of the file.
        line: its number in the file, where it is one of many.
        as_python: take what Python writes too: NaN and infinity, where a table has no number, and halves of surrogate pairs, where an
            answer was cut off.

    Raises:
        GapExportError: of the kind's type.
    """
    if isinstance(text, bytes):
        text = decoded(text, subject, kind, line=line)
    place = subject if line is None else f"{subject}, line {line}"
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_int,
            parse_constant=None if as_python else _no_number,
            parse_float=None if as_python else _float,
        )
    except json.JSONDecodeError as error:
        raise kind.error(
            f"is not JSON: {error.msg}",
            subject=f"{subject}, line {error.lineno + (line or 1) - 1}",
            hint=kind.hint,
        ) from error
    except RecursionError as error:
        raise _too_deep(place, kind) from error
    except ValueError as error:
        raise kind.error(f"cannot be read as JSON: {error}", subject=place, hint=kind.hint) from error
    check_depth(value, place, kind)
    if not as_python and _HALF_PAIR.search(text):
        _check_unicode(value, place, kind)
    return value


def read_yaml(path: Path, kind: FileKind) -> Any:
    """A YAML file of plain values: no aliases (of which a kilobyte makes gigabytes), no merge keys, no key twice, no tags of types.

    Raises:
        GapExportError: of the kind's type: it cannot be read, or is not such YAML.
    """
    import yaml

    text = read_text(path, kind)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise kind.error(
                    f"has an alias (*{event.anchor})",
                    subject=_line_of(path, event.start_mark),
                    hint="write the value out",
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _too_deep(_line_of(path, event.start_mark), kind)
        return yaml.load(text, Loader=_unique_keys())
    except yaml.YAMLError as error:
        place = _line_of(path, getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise kind.error(f"is not YAML: {problem}", subject=place, hint=kind.hint) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, dates that do not exist
        raise kind.error(f"cannot be read as YAML: {error}", subject=str(path), hint=kind.hint) from error


def check_depth(value: Any, subject: str, kind: FileKind) -> None:
    """Refuse lists and mappings that lie too deep within each other: whatever walks over them would exhaust the stack.

    Raises:
        GapExportError: of the kind's type.
    """
    if is_deeper(value, DEEPEST):
        raise _too_deep(subject, kind)


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and mappings lie more than so many within each other; told without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _line_of(path: Path, mark: Any) -> str:
    """A place of YAML; the file alone where the parser tells none."""
    return str(path) if mark is None else f"{path}, line {mark.line + 1}"


def _check_unicode(value: Any, subject: str, kind: FileKind) -> None:
    """Refuse text with half of a surrogate pair, which JSON can write and nothing else can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise kind.error("has text that is not Unicode", subject=subject, hint=kind.hint) from error


def _unique_keys() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, where YAML's own loader takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = key.value if isinstance(key.value, str) else None
                if name == "<<" or name is None:
                    raise yaml.constructor.ConstructorError(
                        None, None, "has a key that is no plain text", key.start_mark
                    )
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name} stands twice", key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep=deep)

    return Loader


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise ValueError(f"{_short(key)} stands twice, with different values")
    return made


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _int(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{_short(digits)} is larger than any number")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _too_deep(subject: str, kind: FileKind) -> GapExportError:
    return kind.error(
        f"is nested too deeply: {kind.name} has at most {DEEPEST} levels", subject=subject, hint=kind.hint
    )


def _check_mode(path: Path, mode: int, kind: FileKind) -> None:
    other = _OTHERS.get(stat.S_IFMT(mode))
    if other is not None:
        raise kind.error(f"is {other}, not {kind.name}", subject=str(path), hint="give a file")


def _mode(path: Path) -> int | None:
    """Type of what is there; None for nothing, and for names that nothing can have."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return None
