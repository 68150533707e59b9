"""Annotations and answers of people who do not mean well, or whose files were damaged on the way: read, or refused in one line."""

from __future__ import annotations

import collections
import copy
import io
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.refer import tables
from gap_export.evaluation.refer.annotations import Expression, plain_pickle, read_annotations
from gap_export.evaluation.refer.annotations.plain_pickle import read_plain_pickle
from gap_export.evaluation.refer.predictions import read_predictions
from gap_export.evaluation.refer.tables import Table
from gap_export.files.kinds import ANNOTATION_TABLE, RESULTS

VALUES: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", " ", "x" * 20_000, "\ud83d", "\0", "[/red]", "../../x", "/etc/hosts",
    [], [[]], [None] * 4, {}, {"a": {"b": 1}},
]  # fmt: skip
"""What is put in the place of every value of a file."""


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested containers stand, containers too."""
    if path:
        yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places_in(child, (*path, key))


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy with another value in one place; without it where that is `changed` itself."""
    value = copy.deepcopy(value)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if to is changed:
        del parent[place[-1]]
    else:
        parent[place[-1]] = to
    return value


class Outcomes:
    """How inputs ended: read, or refused in one line that says where."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def of(self, read: Callable[[], object], *named: str) -> None:
        try:
            read()
        except InputError as error:
            refused = error
        else:
            self.counts["read"] += 1
            return
        self.counts["refused"] += 1
        assert "\n" not in str(refused)
        assert refused.hint
        assert any(name in refused.subject for name in named), (refused.subject, named)


@pytest.mark.parametrize("some", [3, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["minigpt4", "shikra", "internvl", "mdetr", "refer", "instances"])
def test_every_value_of_every_text_format(
    name: str, some: int | None, few: list[Expression], writer: Any, tmp_path: Path
) -> None:
    """Every value is replaced by some others, drawn by a fixed seed, or (long) by all of them."""
    data = writer("refer" if name == "instances" else name, few[:2], tmp_path)
    target = {"refer": tmp_path / "refs(unc).p", "instances": tmp_path / "instances.json"}.get(name, data)
    lines, pickled = target.suffix == ".jsonl", target.suffix == ".p"
    content = target.read_bytes()
    given = (
        pickle.loads(content)
        if pickled
        else [json.loads(line) for line in content.splitlines()]
        if lines
        else json.loads(content)
    )
    outcomes, draw, values = Outcomes(), random.Random(0), [*VALUES, changed]
    for place in places_in(given):
        for value in draw.sample(values, some or len(values)):
            new = changed(given, place, value)
            written = (
                pickle.dumps(new, protocol=2)
                if pickled
                else "\n".join(map(json.dumps, new)).encode()
                if lines
                else json.dumps(new).encode()
            )
            target.write_bytes(written)
            for skip in (False, True):
                outcomes.of(lambda skip=skip: read_annotations(data, skip_bad_rows=skip), str(tmp_path))
    print(name, dict(outcomes.counts))
    assert outcomes.counts["refused"] >= 40
    assert outcomes.counts["read"] >= 2


@pytest.mark.parametrize("name", ["shikra", "mdetr", "refer", "parquet"])
def test_damaged_bytes(name: str, few: list[Expression], writer: Any, tmp_path: Path) -> None:
    data = writer(name, few, tmp_path)
    target = next(
        path for path in sorted(tmp_path.iterdir()) if path.is_file() and path.name != "instances.json"
    )
    content, draw, outcomes = target.read_bytes(), random.Random(0), Outcomes()
    for number in range(60):
        damaged = bytearray(content)
        if number < 30:
            damaged = damaged[: draw.randrange(len(content))]
        else:
            for _ in range(draw.choice([1, 1, 5])):
                damaged[draw.randrange(len(content))] = draw.randrange(256)
        target.write_bytes(damaged)
        outcomes.of(lambda: read_annotations(data), str(tmp_path))
    print(name, dict(outcomes.counts))
    assert outcomes.counts["refused"] >= 20


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _locked(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("who runs this may read everything")


@pytest.mark.parametrize("name", ["rec.jsonl", "refs(unc).p", "val.parquet", "data.json"])
@pytest.mark.parametrize("make", [_pipe, Path.mkdir, _locked, Path.touch], ids=lambda make: make.__name__)
def test_what_is_no_file_with_something_in_it(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError) as refused:
        read_annotations(path)
    assert str(path) in refused.value.subject
    with pytest.raises(InputError):
        read_predictions(path, [], None) or read_annotations(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_annotations(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------
# Pickles that are more than their bytes


def shared(levels: int) -> list[Any]:
    """2^levels lists, in a few bytes."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


PICKLES = {
    "a place in memory by 4 bytes": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a place in memory by digits": b"(lp2000000000\n.",
    "more digits": b"(lp" + b"9" * 100 + b"\n.",
    "a text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "an array that is not there": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"].",
    "lists in many places": pickle.dumps(shared(20), protocol=2),
    "lists in more places": pickle.dumps(shared(60), protocol=4),
    "a list in itself": pickle.dumps(endless(), protocol=2),
    "a mapping in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "deeply nested": pickle.dumps(deep(80), protocol=2),
    "a long number": pickle.dumps([10**400], protocol=2),
    "a longer number": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "digits without end": b"(lL" + b"9" * 10**6 + b"L\na.",
    "an operation that there is not": b"\x80\x02\xff.",
    "no end": b"\x80\x02]",
    "a name": b"cos\nsystem\n.",
    "a name by its parts": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an instance": b"(ios\nsystem\n.",
    "a registered name": b"\x80\x02\x82\x01.",
    "an object from elsewhere": b"Pnumber\n.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "a call without a function": b"\x80\x02]N\x85R.",
    "a state without an object": b"\x80\x02]}b.",
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
def test_pickles_that_are_more_than_their_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"cannot be read as a pickle|nothing of it was run") as refused:
            read_plain_pickle(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.subject == str(path)
    assert peak < 40e6
    assert time.monotonic() - began < 5


def test_without_the_guard_a_few_bytes_become_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "_check_operations", lambda content: None)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02]r\x00\x00\x40\x00.")  # 4 million places, of 16 bytes each
    tracemalloc.start()
    try:
        read_plain_pickle(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 40e6


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(protocol: int, tmp_path: Path) -> None:
    row = {"a": [1, -2.5, None, True, "caf\u00e9", ("x", 2**40)], "b": {"c": []}}
    value = [row, {"again": row["a"]}, *({"n": number} for number in range(300))]
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_plain_pickle(path) == value


# ------------------------------------------------------------------------------------------------------------
# Tables that are more than their bytes


def parquet_of(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content, **options)
    return content.getvalue()


TABLES: dict[str, Callable[[], bytes]] = {
    "one row a million times": lambda: parquet_of({"id": ["a"] * 10**6}),
    "nothing, a million times": lambda: parquet_of({"id": [None] * 10**6}),
    "zeros": lambda: parquet_of(
        {"id": ["a"], "x": ["\0" * 7 * 10**7]}, compression="zstd", use_dictionary=False
    ),
}


@pytest.mark.parametrize("kind", [RESULTS, ANNOTATION_TABLE], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_declare_more_than_they_can_hold(name: str, kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(TABLES[name]())
    with pytest.raises(InputError, match="declares"):
        Table(path, kind)


def test_a_large_text_in_every_row_is_not_unpacked_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary has it once; the size that the file declares says nothing of the rows."""
    path = tmp_path / "table.parquet"
    text = random.Random(0).randbytes(50_000).hex()
    path.write_bytes(parquet_of({"id": [text] * 3000}))
    monkeypatch.setattr(tables, "_MOST_BYTES", 10**7)
    monkeypatch.setattr(tables, "_PIECE_BYTES", 10**6)
    table = Table(path, RESULTS)
    with pytest.raises(InputError, match="unpacks to more than"):
        for _ in table.rows(["id"]):
            pass
    assert table._rows_of_a_piece(0, ["id"]) < 3000, "all rows would be one piece"


def test_tables_are_read(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    path = next(writer("parquet", few, tmp_path).glob("*.parquet"))
    for kind in (RESULTS, ANNOTATION_TABLE):
        table = Table(path, kind)
        assert [row["question_id"] for row in table.rows(["question_id"])] == ["1", "2", "3"]
        assert [row["question_id"] for row in table.rows(["question_id"], groups=[1])] == ["3"]


@pytest.mark.parametrize("column", ["question_id", "answer", "bbox", "file_name", "image"])
def test_columns_of_other_types(column: str, few: list[Expression], writer: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    data = writer("parquet", few, tmp_path)
    path = next(data.glob("*.parquet"))
    table, outcomes = parquet.read_table(path), Outcomes()
    count = len(table)
    others: list[Any] = [
        [None] * count, [1] * count, [1.5] * count, [True] * count, ["x" * 20_000] * count, [b"\xff"] * count, [[]] * count,
        [[None]] * count, [[float("nan")] * 4] * count, [{"a": 1}] * count, pyarrow.nulls(count), [""] * count,
    ]  # fmt: skip
    place = table.column_names.index(column)
    variants = [table.set_column(place, column, pyarrow.array(other)) for other in others]
    variants += [table.remove_column(place), table.append_column("bbox2", table["bbox"])]
    for variant in variants:
        parquet.write_table(variant, path)
        for skip in (False, True):

            def read(skip: bool = skip) -> None:
                annotations = read_annotations(data, skip_bad_rows=skip)
                for name in annotations.images.names() if annotations.images else ():
                    annotations.images.read(name)  # type: ignore[union-attr]

            outcomes.of(read, str(tmp_path))
    print(column, dict(outcomes.counts))
    assert outcomes.counts["refused"]
    assert outcomes.counts["read"]


# ------------------------------------------------------------------------------------------------------------
# Lines


def line(image: str) -> bytes:
    return json.dumps({"image": image, "sent": "mug", "bbox": [1, 2, 3, 4]}).encode()


@pytest.mark.parametrize("cut", range(1, len(line("a.jpg"))))
def test_a_line_cut_short_does_not_move_the_ids_of_others(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_bytes(b"\n".join([line("a.jpg"), line("a.jpg")[:-cut], line("b.jpg"), line("a.jpg")]))
    read = read_annotations(path, skip_bad_rows=True)
    names_its_image = b'"a.jpg"' in line("a.jpg")[:-cut]
    third = "a.jpg.2" if names_its_image else "a.jpg.1"
    assert [each.id for each in read.expressions] == ["a.jpg.0", "b.jpg.0", third]
    assert [row.ids for row in read.skipped] == [("a.jpg.1",) if names_its_image else ()]


def test_every_value_of_a_file_of_answers(tmp_path: Path) -> None:
    asked = [Expression(f"e{number}", "a.jpg", "mug", (0.0, 0.0, 1.0, 1.0), 8, 8) for number in range(2)]
    given = [{"id": each.id, "answer": "[0.1, 0.2, 0.3, 0.4]"} for each in asked]
    path, outcomes = tmp_path / "answers.jsonl", Outcomes()
    for place in places_in(given):
        for value in [*VALUES, changed]:
            path.write_text("\n".join(map(json.dumps, changed(given, place, value))))
            outcomes.of(lambda: read_predictions(path, asked, None), str(path))
    print(dict(outcomes.counts))
    assert outcomes.counts["refused"] > 50
