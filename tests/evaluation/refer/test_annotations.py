"""Five formats, one list of expressions; and what is refused, with the row that is to blame."""

from __future__ import annotations

import json
import pickle
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

    read_group, asked = parquet.ParquetFile.read_row_group, []

    def watched(self: Any, group: int, columns: list[str]) -> Any:
        asked.append((group, tuple(columns)))
        return read_group(self, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", watched)
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
