"""Six formats, one list of expressions; and what is refused, with the row that is to blame."""

from __future__ import annotations

import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression, read_annotations


def content(expressions: Any) -> list[tuple[str, Any]]:
    """What formats agree on: text and box (ids and names of images are their own)."""
    return [(each.text, tuple(round(edge, 6) for edge in each.box)) for each in expressions]


def test_every_format_gives_the_same(
    format_name: str, few: list[Expression], writer: Any, tmp_path: Path
) -> None:
    read = read_annotations(writer(format_name, few, tmp_path), split="val")
    assert read.format == format_name
    assert content(read.expressions) == content(few)
    assert len({each.id for each in read.expressions}) == len(few)
    if format_name != "parquet":
        assert [each.image for each in read.expressions] == [each.image for each in few]
        assert [(each.width, each.height) for each in read.expressions] == [
            (each.width, each.height) for each in few
        ]


def test_images_inside_a_table(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    from gap_export.evaluation.refer.image_source import Embedded

    read = read_annotations(writer("parquet", few, tmp_path), split="val")
    assert read.images is not None
    source = Embedded(read.images)
    sizes = [source.open(each.image).size for each in read.expressions]
    assert sizes == [(each.width, each.height) for each in few]
    assert not source.has("another.jpg")


def test_images_of_a_table_are_read_one_group_at_a_time(
    few: list[Expression], writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    read_pieces, asked = parquet.ParquetFile.iter_batches, []

    def watched(self: Any, count: int, *, row_groups: list[int], columns: list[str]) -> Any:
        asked.extend((group, tuple(columns)) for group in row_groups)
        return read_pieces(self, count, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watched)
    read = read_annotations(writer("parquet", few, tmp_path), split="val")
    assert all("image" not in columns for _, columns in asked), "images were read with the annotations"
    asked.clear()
    assert read.images is not None
    for name in read.images.names():
        read.images.read(name)
    assert asked == [(0, ("image",)), (1, ("image",))]


def test_real_annotations(refcoco: Path, writer: Any, tmp_path: Path) -> None:
    real = read_annotations(refcoco, split="val")
    assert real.format == "minigpt4"
    assert len(real.expressions) == 10834
    assert len({each.image for each in real.expressions}) == 1500
    assert len({each.id.rpartition(".")[0] for each in real.expressions}) == 3811
    for name in ("shikra", "internvl"):
        again = read_annotations(writer(name, real.expressions, tmp_path / name))
        assert content(again.expressions) == content(real.expressions)
    refer = read_annotations(writer("refer", real.expressions, tmp_path / "refer"), split="val")
    assert sorted(content(refer.expressions)) == sorted(content(real.expressions))


GOOD = {"img_path": "a.jpg", "expression": "mug", "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, "not four finite numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "not four finite numbers"),
        ({"bbox": [1, 2, "x", 4]}, "not four finite numbers"),
        ({"bbox": [3, 2, 1, 4]}, "has no area"),
        ({"bbox": [1, 2, 1, 4]}, "has no area"),
        ({"bbox": [700, 2, 800, 4], "width": 640, "height": 480}, "outside of the image"),
        ({"bbox": [-9, -9, -1, 4]}, "outside of the image"),
        ({"expression": "  "}, "not a text"),
        ({"expression": 7}, "not a text"),
        ({"bbox": "1234"}, "not four finite numbers"),
        ({"bbox": {"1": 1, "2": 2, "3": 3, "4": 4}}, "not four finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "not four finite numbers"),
        ({"width": 0}, "not a number of pixels"),
        ({"img_path": None}, "not a text"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **changes}) + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path)
    assert "row 2" in caught.value.subject


def test_a_box_that_sticks_out_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_text(json.dumps({**GOOD, "bbox": [600, 2, 641.3, 4], "width": 640, "height": 480}))
    assert read_annotations(path).expressions[0].box == (600, 2, 641.3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no expressions"),
        ("[]", "holds no expressions"),
        ("{not json", "is not JSON"),
        ('[{"img_id": "a"', "is not JSON"),
        ('{"images": [], "annotations": []}', "COCO's instances"),
        ('{"id": "a", "answer": "b"}', "file of answers"),
        ('{"question": "what?"}', r'no known format: its first row has \["question"\]'),
        ("[1, 2]", "no known format"),
        (json.dumps(GOOD) + "\n7", "not an object"),
        (json.dumps(GOOD) + '\n{"img_path": "a.jpg", "bbox": [1, 2, 3, 4]}', "has no expression"),
    ],
    ids=range(10),
)
def test_files_of_another_kind(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path)
    assert caught.value.hint


def test_ids_that_come_twice(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    folder = writer("refer", few, tmp_path)
    with (folder / "refs(unc).p").open("rb") as file:
        references = pickle.load(file)
    references[1]["sentences"][0]["sent_id"] = 0
    with (folder / "refs(unc).p").open("wb") as file:
        pickle.dump(references, file)
    with pytest.raises(InputError, match="come twice: 0"):
        read_annotations(folder, split="val")


class Bomb:
    """What a malicious file would hold."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": Bomb(target)}], protocol=protocol))
    with pytest.raises(InputError, match=r"asks for .*open.* nothing of it was run"):
        read_annotations(path)
    assert not target.exists()


@pytest.mark.parametrize("damage", [b"\x80\x02", b"(lp0", b"\x80\x04garbage", b""])
def test_a_damaged_pickle(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(damage)
    with pytest.raises(InputError, match="cannot be read as a pickle"):
        read_annotations(path)


def test_splits(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    for name in ("refer", "parquet"):
        folder = writer(name, few, tmp_path / name)
        with pytest.raises(InputError, match="is not there; there are val"):
            read_annotations(folder, split="testA")
        assert len(read_annotations(folder).expressions) == len(few)


def test_refer_without_its_instances(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    folder = writer("refer", few, tmp_path)
    instances = json.loads((folder / "instances.json").read_text())
    (folder / "instances.json").write_text(json.dumps({**instances, "annotations": []}))
    with pytest.raises(InputError, match="does not hold annotation 1"):
        read_annotations(folder)
    (folder / "instances.json").unlink()
    with pytest.raises(InputError, match="is not there"):
        read_annotations(folder)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"but notes\.txt"):
        read_annotations(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_annotations(tmp_path / "absent.json")


def good(number: int, **changes: Any) -> dict[str, Any]:
    return {**GOOD, "img_path": f"{number}.jpg", **changes}


def test_bad_rows_are_refused_or_skipped_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    rows = [good(1, expression=" "), good(1), good(2, bbox=[1]), good(2), 7]
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines[:2], b"", b"\xff", b"{", *lines[2:]]))
    with pytest.raises(InputError) as caught:
        read_annotations(path)
    assert "--skip-bad-rows" in caught.value.hint
    read = read_annotations(path, skip_bad_rows=True)
    # Ids are those that the rows have in the whole file, so that answers still belong to them.
    assert [each.id for each in read.expressions] == ["1.jpg.1", "2.jpg.1"]
    assert [(row.ids, row.why) for row in read.skipped] == [
        ((), "is not UTF-8: byte 0xff at column 1"),
        ((), "is not JSON: Expecting property name enclosed in double quotes"),
        (("1.jpg.0",), 'expression is " ", not a text'),
        (("2.jpg.0",), "bbox is [1], not four finite numbers"),
        ((), "is 7, not an object"),
    ]
    assert [row.where.removeprefix(f"{path}, ") for row in read.skipped] == [
        "line 4",
        "line 5",
        "row 1 (line 1)",
        "row 3 (line 6)",
        "row 5 (line 8)",
    ]


def test_nothing_is_left_when_all_rows_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_text(json.dumps(good(1, bbox=[])))
    with pytest.raises(InputError, match="no expression that can be used: 1 rows were skipped"):
        read_annotations(path, skip_bad_rows=True)


def test_skipping_in_every_format(
    format_name: str, few: list[Expression], writer: Any, tmp_path: Path
) -> None:
    bad = replace(few[1], text=" ")
    data = writer(format_name, [few[0], bad, *few[2:]], tmp_path)
    with pytest.raises(InputError, match="not a text") as caught:
        read_annotations(data, split="val")
    assert "--skip-bad-rows" in caught.value.hint
    read = read_annotations(data, split="val", skip_bad_rows=True)
    assert content(read.expressions) == content([few[0], *few[2:]])
    assert len(read.skipped) == 1
    assert read.skipped[0].ids
    whole = read_annotations(writer(format_name, few, tmp_path / "whole"), split="val")
    assert [each.id for each in read.expressions] == [
        each.id for each in whole.expressions if each.id not in read.skipped[0].ids
    ]


def edited(folder: Path, change: Any) -> Path:
    path = folder / "refs(unc).p"
    references = pickle.loads(path.read_bytes())
    change(references)
    path.write_bytes(pickle.dumps(references, protocol=2))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ann_id": [1, 2]}, "several objects or none"),
        ({"ann_id": [-1]}, "several objects or none"),
        ({"ann_id": []}, "several objects or none"),
        ({"ann_id": [[1]]}, "not an id"),
        ({"ann_id": 1.5}, "not an id"),
        ({"ann_id": {"a": 1}}, "not an id"),
        ({"image_id": None}, "not an id"),
        ({"image_id": 99}, "does not hold image 99"),
        ({"sentences": "mug"}, "not a list"),
        ({"sentences": [None]}, "not an object"),
        ({"sentences": [{"sent": "mug"}]}, "has no sent_id"),
        ({"sentences": [{"sent_id": [1], "sent": "mug"}]}, "not an id"),
    ],
    ids=str,
)
def test_references_that_cannot_be_used(
    changes: dict[str, Any], message: str, few: list[Expression], writer: Any, tmp_path: Path
) -> None:
    folder = edited(writer("refer", few, tmp_path), lambda references: references[0].update(changes))
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(folder)
    assert "row 1" in caught.value.subject
    assert read_annotations(folder, skip_bad_rows=True).skipped


def test_a_list_of_one_id_is_that_id(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    folder = writer("refer", few, tmp_path)

    def listed(references: Any) -> None:
        for each in references:
            each["ann_id"] = [each["ann_id"]]

    before = read_annotations(folder).expressions
    assert read_annotations(edited(folder, listed)).expressions == before


def test_grefcoco_is_told_by_its_fields(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    folder = edited(
        writer("refer", few, tmp_path),
        lambda references: references[0].update(ann_id=[1, 2], no_target=False),
    )
    references = pickle.loads((folder / "refs(unc).p").read_bytes())
    (folder / "refs(unc).p").rename(folder / "grefs(unc).p")
    with pytest.raises(InputError, match="several objects"):
        read_annotations(folder)
    path = tmp_path / "grefs(unc).json"
    path.write_text(json.dumps(references))
    with pytest.raises(InputError, match="several objects"):
        read_annotations(path)


def test_mdetr_of_several_objects_or_none(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    path = writer("mdetr", few, tmp_path)
    file = json.loads(path.read_text())
    for count in (0, 2):
        objects = [file["annotations"][0]] * count + file["annotations"][1:]
        path.write_text(json.dumps({**file, "annotations": objects}, indent=1))
        with pytest.raises(InputError, match=f"has {count} objects") as caught:
            read_annotations(path)
        assert "image 1" in caught.value.subject
        assert len(read_annotations(path, skip_bad_rows=True).expressions) == len(few) - 1
    path.write_text(json.dumps({**file, "annotations": {"1": 2}}))
    with pytest.raises(InputError, match="not a list"):
        read_annotations(path)


def test_answers_to_skipped_rows_are_passed_over(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    # A reference, or an object of a table, has several expressions.
    for format_name in ("refer", "parquet"):
        folder = tmp_path / format_name
        folder.mkdir()
        data = writer(format_name, few, folder)
        whole = [each.id for each in read_annotations(data).expressions]
        if format_name == "refer":
            edited(data, lambda references: references[0].update(ann_id=[1, 2]))
        else:
            table = next(data.rglob("*.parquet"))
            rows = parquet.read_table(table).to_pylist()
            rows[0]["bbox"] = [1.0, 1.0, 0.0, 5.0]
            parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        read = read_annotations(data, skip_bad_rows=True)
        (skipped,) = read.skipped
        assert skipped.ids
        assert sorted([*skipped.ids, *(each.id for each in read.expressions)]) == sorted(whole)


def test_references_in_json_are_those_of_the_pickle(
    few: list[Expression], writer: Any, tmp_path: Path
) -> None:
    folder = writer("refer", few, tmp_path)
    pickled = read_annotations(folder).expressions
    path = folder / "refs(unc).p"
    (folder / "refs(unc).json").write_text(json.dumps(pickle.loads(path.read_bytes())))
    assert read_annotations(folder / "refs(unc).json").expressions == pickled
    path.unlink()
    assert read_annotations(folder, split="val").expressions == pickled


@pytest.mark.parametrize("name", ["rec.jsonl", "refs(unc).p", "val.parquet"])
@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", "git lfs pull"),
        (gzip.compress(b"{}"), "gzip", "unpack"),
        (b"PK\x03\x04" + bytes(40), "zip", "unpack"),
    ],
    ids=["lfs", "gzip", "zip"],
)
def test_files_that_stand_for_others(
    name: str, content: bytes, message: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path) if not name.endswith("l") else (tmp_path / name,):
        with pytest.raises(InputError, match=message) as caught:
            read_annotations(path)
        assert hint in caught.value.hint


def test_whole_numbers_of_pixels_may_be_floats(tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_text(json.dumps(good(1, width=640.0, height=480.0)))
    (read,) = read_annotations(path).expressions
    assert (read.width, read.height) == (640, 480)
    assert isinstance(read.width, int)
