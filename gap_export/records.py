"""The base of everything that is written to disk and read back.

A record is immutable and refuses keys that it does not know, so that a file of another version is noticed and never half
understood. What a file or a mapping has wrong is said in one place, `explain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gap_export.errors import GapExportError, InputError, in_one_line
from gap_export.files import FileKind, parse_json, read_bytes, write_atomically
from gap_export.files.kinds import REPORT

_LONGEST_SHOWN = 80
"""Characters of a value that is repeated in a message."""

_WORDS = (
    ("Value error, ", ""),
    ("Field required", "is missing"),
    ("Extra inputs are not permitted", "is not a field here"),
    ("Input should be ", "must be "),
    ("Input should have ", "must have "),
    ("a valid integer, unable to parse string as an integer", "a whole number"),
    ("a valid integer, got a number with a fractional part", "a whole number"),
    ("a valid integer", "a whole number"),
    ("a valid number, unable to parse string as a number", "a number"),
    ("a valid number", "a number"),
    ("a valid string", "text"),
    ("a valid boolean", "true or false"),
    ("a valid tuple", "a list"),
    ("a valid list", "a list"),
    ("a valid dictionary", "an object"),
    ("a dictionary or an instance of ", "an object of fields of "),
    ("String should match pattern", "must be as in"),
    ("String should have", "must have"),
    ("Tuple should have", "must have"),
)
"""Of pydantic's messages -> what is said in their place."""

Share = Annotated[float, Field(ge=0, le=1, strict=True)]
"""Of a whole: an accuracy, an overlap, a probability. Here and below, a number in quotes is none."""
Change = Annotated[float, Field(ge=-1, le=1, strict=True)]
"""One share less another."""
Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
"""How many; the bound is that of whole numbers in JSON."""
Amount = Annotated[float, Field(ge=0, strict=True)]
"""Of time, or of whatever else cannot be less than nothing."""
Number = Annotated[float, Field(strict=True)]
"""Any that is finite."""
Flag = Annotated[bool, Field(strict=True)]
"""Whether; a 1 is no `true`."""
Text = Annotated[str, Field(min_length=1)]
"""With something in it: an id, a name."""


class Record(BaseModel):
    """Base of everything that is written to disk: immutable, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(
        cls, path: Path, *, hint: str, error: type[GapExportError] = InputError, kind: FileKind = REPORT
    ) -> Self:
        """Read a JSON file that `write` wrote.

        Args:
            path: of the file.
            hint: what to do where it cannot be read.
            error: what is raised then.
            kind: of the file, for how large it may be.

        Raises:
            GapExportError: of that type: the file is missing, no file, too large, damaged, or of another version.
        """
        content = read_bytes(path, replace(kind, hint=hint, error=error))
        return cls.parse(content, subject=str(path), hint=hint, error=error)

    @classmethod
    def parse(
        cls,
        content: bytes,
        *,
        subject: str,
        hint: str,
        error: type[GapExportError] = InputError,
        strict: bool | None = None,
    ) -> Self:
        """Read a record from JSON.

        Args:
            content: UTF-8.
            subject: where it is from, for the message.
            hint: what to do where it cannot be read.
            error: what is raised then.
            strict: whether every value must be of the very type that it is written as: no number in quotes.

        Raises:
            GapExportError: of that type.
        """
        try:
            record = cls.model_validate_json(content, strict=strict)
        except ValidationError as reason:
            raise error(f"cannot be read: {explain(reason)}", subject=subject, hint=hint) from reason
        parse_json(
            content, subject, replace(REPORT, hint=hint, error=error)
        )  # keys stand once, or say the same
        return record

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
        write_atomically(path, self.text())

    def text(self) -> str:
        """What `write` writes."""
        return self.model_dump_json(indent=2) + "\n"


def _in_words(message: str) -> str:
    """What pydantic says, as one would say it of a file."""
    for theirs, ours in _WORDS:
        message = message.replace(theirs, ours)
    return message


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with a record: the field, the value if it is short, and why it cannot be."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    given = first["input"]
    message = _in_words(first["msg"])
    if not field:
        return in_one_line(message)
    if len(field) > _LONGEST_SHOWN:
        field = field[:_LONGEST_SHOWN] + "..."
    short = isinstance(given, str | int | float) and len(repr(given)) <= _LONGEST_SHOWN
    return in_one_line(f"{field} {given!r}: {message}" if short else f"{field}: {message}")
