"""The base of everything that is written to disk and read back.

A record is immutable and refuses keys that it does not know, so that a file of another version is noticed and never half
understood. What a file or a mapping has wrong is said in one place, `explain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gap_export.errors import GapExportError, InputError
from gap_export.files import write_atomically

_LONGEST_SHOWN = 80
"""Characters of a value that is repeated in a message."""


class Record(BaseModel):
    """Base of everything that is written to disk: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path, *, hint: str, error: type[GapExportError] = InputError) -> Self:
        """Read a JSON file that `write` wrote.

        Args:
            path: of the file.
            hint: what to do where it cannot be read.
            error: what is raised then.

        Raises:
            GapExportError: of that type: the file is missing, damaged, or of another version.
        """
        try:
            content = path.read_bytes()
        except OSError as reason:
            raise error(f"cannot be read: {reason.strerror}", subject=str(path), hint=hint) from reason
        return cls.parse(content, subject=str(path), hint=hint, error=error)

    @classmethod
    def parse(
        cls, content: bytes, *, subject: str, hint: str, error: type[GapExportError] = InputError
    ) -> Self:
        """Read a record from JSON.

        Args:
            content: UTF-8.
            subject: where it is from, for the message.
            hint: what to do where it cannot be read.
            error: what is raised then.

        Raises:
            GapExportError: of that type.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as reason:
            raise error(f"cannot be read: {explain(reason)}", subject=subject, hint=hint) from reason

    @classmethod
    def checked(
        cls, values: Mapping[str, Any], *, subject: str, hint: str, error: type[GapExportError] = InputError
    ) -> Self:
        """A record from values that a user gave.

        Args:
            values: field -> value.
            subject: where they are from, for the message.
            hint: what to do where one cannot be used.
            error: what is raised then.

        Raises:
            GapExportError: of that type.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as reason:
            raise error(explain(reason), subject=subject, hint=hint) from reason

    def write(self, path: Path) -> None:
        """Write the record as indented JSON; readers see the old file or the new one, never a part.

        Raises:
            BundleError: it cannot be written.
        """
        write_atomically(path, self.model_dump_json(indent=2) + "\n")


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with a record: the field, the value if it is short, and why it cannot be."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    given = first["input"]
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return message
    short = isinstance(given, str | int | float) and len(repr(given)) <= _LONGEST_SHOWN
    return f"{field} {given!r}: {message}" if short else f"{field}: {message}"
