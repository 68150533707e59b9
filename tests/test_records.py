"""Records: what is written is read, and what cannot be read is said in one way, as the error that the reader wants."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from gap_export.errors import BundleError, InputError, RecipeError
from gap_export.records import Record


class Inner(Record):
    share: float = Field(ge=0, le=1)


class Outer(Record):
    name: str
    inner: Inner


RECORD = Outer(name="x", inner=Inner(share=0.5))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "deep" / "record.json")
    assert Outer.read(tmp_path / "deep" / "record.json", hint="") == RECORD
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read: Invalid JSON"),
        (b"\xff\xfe", "cannot be read: "),
        (b"[]", "cannot be read: "),
        (b'{"name": "x"}', "inner: is missing"),
        (b'{"name": "x", "inner": {"share": 2}}', "inner.share 2: must be less than or equal to 1"),
        (b'{"name": "x", "inner": {"share": 0.5}, "more": 1}', "more 1: is not a field here"),
    ],
)
def test_what_cannot_be_read_is_said(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Outer.read(path, hint="mend it", error=BundleError)
    assert words in caught.value.message
    assert (caught.value.subject, caught.value.hint) == (str(path), "mend it")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Outer.read(tmp_path / "none.json", hint="make it")


def test_values_of_a_user() -> None:
    assert Outer.checked({"name": "x", "inner": {"share": 0.5}}, subject="here", hint="") == RECORD
    with pytest.raises(RecipeError, match=r"here: inner\.share 7: "):
        Outer.checked({"name": "x", "inner": {"share": 7}}, subject="here", hint="", error=RecipeError)


def test_long_values_are_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        Outer.checked({"name": "x", "inner": {"share": "9" * 500}}, subject="here", hint="")
    assert len(caught.value.message) < 200


def test_records_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RECORD.name = "y"  # type: ignore[misc]
