"""What a format of annotations is, and what its readers make of a file: expressions, and images where the file holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Expression:
    """One referring expression.

    Attributes:
        id: unique in its data set.
        image: the image's name.
        text: what to find.
        box: the true one, (x1, y1, x2, y2) in pixels.
        width: of the image in pixels, where the annotations tell.
        height: of the image in pixels, where the annotations tell.
    """

    id: str
    image: str
    text: str
    box: Box
    width: int | None = None
    height: int | None = None


class EmbeddedImages(Protocol):
    """Images that lie in the data set."""

    def names(self) -> Sequence[str]:
        """Of all there are."""
        ...

    def read(self, image: str) -> bytes:
        """One image, encoded."""
        ...


@dataclass(frozen=True)
class Annotations:
    """A data set, or one split of it.

    Attributes:
        format: name in the table of formats.
        expressions: in the order of the file, ids unique.
        images: where the data set brings them.
    """

    format: str
    expressions: tuple[Expression, ...]
    images: EmbeddedImages | None = None


@dataclass(frozen=True)
class AnnotationFormat:
    """One row of the table of formats.

    Attributes:
        name: of the format.
        files: what its files hold, for people.
        published_by: whose format it is.
        images: where its images come from, for people.
        suffixes: of the files that make up a data set of this format, where it is a folder.
        recognizes: whether a file or folder is of this format, told by what it holds and never by its name alone.
        read: (file or folder, split or None for all of them) -> its annotations. It raises `InputError` for a row that cannot be
            used, with its number, and for a split that is not there, with those that are.
    """

    name: str
    files: str
    published_by: str
    images: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[AnnotationFile], bool]
    read: Callable[[AnnotationFile, str | None], Annotations]


class AnnotationFile:
    """A file or a folder with annotations, looked into no further than its format asks for.

    Args:
        path: of the file or folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file; nothing of a folder."""
        if self.path.is_dir():
            return b""
        with self.path.open("rb") as file:
            return file.read(_HEAD_BYTES)

    @cached_property
    def rows(self) -> list[Any]:
        """What a JSON list or JSON lines hold.

        Raises:
            InputError: it is neither.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                "is not a text in UTF-8", subject=str(self.path), hint="known formats: see docs/evaluation.md"
            ) from error
        if text.lstrip()[:1] == "[":
            try:
                return list(json.loads(text))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"is not JSON: {error.msg} in line {error.lineno}",
                    subject=str(self.path),
                    hint="get the file again",
                ) from error
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"is not JSON: {error.msg}",
                    subject=f"{self.path}, line {number}",
                    hint="get the file again",
                ) from error
        return rows

    @cached_property
    def fields(self) -> frozenset[str]:
        """Of the first row of JSON; none where it is not JSON, or its rows are no objects."""
        if self.head.lstrip()[:1] not in (b"[", b"{"):
            return frozenset()
        try:
            first = self.rows[0] if self.rows else None
        except InputError:
            return frozenset()
        return frozenset(first) if isinstance(first, dict) else frozenset()


def shown(value: object) -> str:
    """What was found, short, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
