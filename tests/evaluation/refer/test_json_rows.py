"""Files as they come: marks, separators, encodings, damage. What can be read is read; the rest is an error with file and line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression, read_annotations
from gap_export.evaluation.refer.json_rows import escaped, json_document, json_rows
from gap_export.evaluation.refer.predictions import read_predictions

ROW = {"image": "a.jpg", "sent": "mug", "bbox": [1, 2, 3, 4], "width": 8, "height": 8}
ANSWER = {"id": "a.jpg.0", "answer": "[0.1, 0.2, 0.3, 0.4]"}


def line(row: dict[str, object], **changes: object) -> bytes:
    return json.dumps({**row, **changes}, ensure_ascii=False).encode("utf-8", "surrogatepass")


READ_RIGHT = {
    "mark": codecs.BOM_UTF8 + b"%s\n",
    "blank lines": b"\n  \n%s\n\n \t\n",
    "carriage returns": b"%s\r\n\r\n",
    "no end of line": b"%s",
    "a list": b"[%s]",
    "a list with a mark": codecs.BOM_UTF8 + b" [\n%s\n]\n",
    "a mark in front of the line": b"\n" + codecs.BOM_UTF8 + b"%s\n",
}
"""What stands around a row without changing it."""


@pytest.mark.parametrize("around", READ_RIGHT.values(), ids=READ_RIGHT.keys())
def test_what_stands_around_rows_is_passed_over(around: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(around.replace(b"%s", line(ROW)))
    assert [each.text for each in read_annotations(path).expressions] == ["mug"]
    path.write_bytes(around.replace(b"%s", line(ANSWER)))
    asked = read_annotations_of(tmp_path)
    assert [row.answer for row in read_predictions(path, asked, None)] == [ANSWER["answer"]]


def read_annotations_of(folder: Path) -> tuple[Expression, ...]:
    path = folder / "asked.jsonl"
    path.write_bytes(line(ROW))
    return read_annotations(path).expressions


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_separators_inside_a_string_end_no_line(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    content = line(ROW, sent=f"a{separator}mug")
    if ord(separator) < 32:  # control characters must be escaped in JSON
        content = json.dumps({**ROW, "sent": f"a{separator}mug"}).encode()
    path.write_bytes(content + b"\n" + line(ROW))
    assert [each.text for each in read_annotations(path).expressions] == ["a mug", "mug"]
    path.write_text(json.dumps({**ANSWER, "answer": f"a{separator}b"}, ensure_ascii=True))
    (row,) = read_predictions(path, read_annotations_of(tmp_path), None)
    assert row.answer == f"a{separator}b"


DAMAGED = {
    "Latin-1": (
        b"%s\n" + '{"id": "caf\u00e9"}'.encode("latin-1"),
        "is not UTF-8: byte 0xe9 at column 12",
        "line 2",
    ),
    "UTF-16": ("\ufeff{}".encode("utf-16-le"), "UTF-16", "line 1"),
    "UTF-16, big end first": ("\ufeff{}".encode("utf-16-be"), "UTF-16", "line 1"),
    "UTF-16 without a mark": ("{}".encode("utf-16-le"), "UTF-16", "line 1"),
    "UTF-32": ("{}".encode("utf-32"), "UTF-16 or UTF-32", "line 1"),
    "a raw NUL": (b'%s\n{"a": "\0"}', "is not JSON: Invalid control", "line 2"),
    "cut short": (b'%s\n\n{"a": 1', "is not JSON", "line 3"),
    "nested": (b"%s\n" + b'{"a":' * 100_000, "nested too deeply", "line 2"),
    "a number without end": (b'%s\n{"a": ' + b"9" * 5000 + b"}", "cannot be read", "line 2"),
    "two on a line": (b"%s %s", "is not JSON: Extra data", "line 1"),
    "old line ends": (b"%s\r%s", "is not JSON: Extra data", "line 1"),
    "a list that is cut short": (b"[%s,\n%s", "is not JSON", "line 2"),
    "a list not in UTF-8": (b'[%s,\n"\xff"]', "is not UTF-8", "line 2"),
}


@pytest.mark.parametrize(("content", "message", "place"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named_with_its_line(content: bytes, message: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    asked = read_annotations_of(tmp_path)
    for row, read in (
        (ROW, lambda: read_annotations(path)),
        (ANSWER, lambda: read_predictions(path, asked, None)),
    ):
        path.write_bytes(content.replace(b"%s", line(row)))
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert str(path) in caught.value.subject
        assert place in caught.value.subject


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_of_one_line_or_of_many(mark: bytes, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(mark + json.dumps({"a": [1, {"b": 2}]}, indent=indent).encode())
    assert [row.value for row in json_rows(path)] == [json_document(path)] == [{"a": [1, {"b": 2}]}]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, not annotations"):
        json_rows(tmp_path)


def test_half_a_character(tmp_path: Path) -> None:
    """In an answer it is kept as an escape; an expression that holds one is no question."""
    assert escaped("a \ud83d b \U0001f600") == r"a \ud83d b " + "\U0001f600"
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({**ANSWER, "answer": "\ud83d [0.1, 0.2, 0.3, 0.4]"}))
    (row,) = read_predictions(path, read_annotations_of(tmp_path), None)
    assert row.answer == r"\ud83d [0.1, 0.2, 0.3, 0.4]"
    row.model_dump_json()
    for field in ("sent", "image"):
        path.write_text(json.dumps({**ROW, field: "a \ud83d"}))
        with pytest.raises(InputError, match="half a character") as caught:
            read_annotations(path)
        assert "line 1" in caught.value.subject
        str(caught.value).encode()
    path.write_text(json.dumps({**ANSWER, "id": "\ud83d"}))
    with pytest.raises(InputError, match="does not have") as caught:
        read_predictions(path, read_annotations_of(tmp_path), None)
    str(caught.value).encode()


@pytest.mark.parametrize("identity", [1.0, None, True, ["a.jpg.0"], {"a": 1}])
def test_ids_are_texts_or_whole_numbers(identity: object, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({**ANSWER, "id": identity}))
    with pytest.raises(InputError, match="neither a text nor a whole number"):
        read_predictions(path, read_annotations_of(tmp_path), None)


def test_answers_to_what_is_not_asked_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(line(ANSWER) + b"\n" + line(ANSWER, id="other"))
    asked = read_annotations_of(tmp_path)
    assert len(read_predictions(path, asked, None, not_asked=["other"])) == 1
    with pytest.raises(InputError, match="answers other, which the data set does not have"):
        read_predictions(path, asked, None)
