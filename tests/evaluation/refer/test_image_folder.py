"""Which file an image of a data set is: the one whose path has most of its name; never one of two that are as good."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from gap_export.errors import InputError
from gap_export.evaluation.refer import image_folder
from gap_export.evaluation.refer.annotations import read_annotations
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.refer.evaluate import evaluate_predictions
from gap_export.evaluation.refer.image_folder import FolderIndex
from gap_export.evaluation.refer.image_source import Folder
from gap_export.evaluation.refer.run import work_of


def folder_of(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    return root


@pytest.mark.parametrize(
    ("name", "there", "found"),
    [
        ("1.jpg", ["1.jpg"], "1.jpg"),
        ("1.jpg", ["1.jpg", "a/1.jpg"], "1.jpg"),
        ("1.jpg", ["a/1.jpg"], "a/1.jpg"),
        ("./1.jpg", ["1.jpg"], "1.jpg"),
        ("a/./b/../1.jpg", ["a/1.jpg"], "a/1.jpg"),
        ("a/1.jpg", ["a/1.jpg", "b/1.jpg"], "a/1.jpg"),
        ("coco/train2014/1.jpg", ["1.jpg"], "1.jpg"),
        ("coco/train2014/1.jpg", ["1.jpg", "val/train2014/1.jpg"], "1.jpg"),
        ("coco/train2014/1.jpg", ["1.jpg", "train2014/1.jpg"], "train2014/1.jpg"),
        ("/data/coco/train2014/1.jpg", ["train2014/1.jpg", "val2014/1.jpg"], "train2014/1.jpg"),
        ("train2014/1.jpg", ["x/train2014/1.jpg", "x/val2014/1.jpg"], "x/train2014/1.jpg"),
        ("c/1.jpg", ["a/1.jpg", "b/1.jpg"], None),
        ("c/1.jpg", ["a/1.jpg"], None),
        ("../1.jpg", ["1.jpg"], None),
        ("a/../../1.jpg", ["1.jpg"], None),
        ("", ["1.jpg"], None),
        ("/", ["1.jpg"], None),
        ("1.jpg\0", ["1.jpg"], None),
        ("x" * 5000, ["1.jpg"], None),
    ],
)
def test_as_much_of_the_name_as_there_is(
    name: str, there: list[str], found: str | None, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, *there)
    assert FolderIndex(folder).find(name) == (None if found is None else folder / found)


ENDS = ["1.jpg", "a/1.jpg", "b/1.jpg", "a/b/1.jpg", "b/a/1.jpg", "c/a/b/1.jpg"]


def test_every_pair_of_files_and_every_name(tmp_path: Path) -> None:
    """Either the file that has strictly more of the name is found, or nothing, or both are named; counts are printed."""
    counts = {"found": 0, "none": 0, "refused": 0}
    for number, (one, other) in enumerate(itertools.combinations(ENDS, 2)):
        folder = folder_of(tmp_path / str(number), one, other)
        for name in [*ENDS, "x/a/1.jpg", "/r/a/b/1.jpg", "2.jpg"]:
            parts = [part for part in name.split("/") if part]
            fits = [end for end in (one, other) if _ends(parts, end.split("/"))]
            longest = max((min(len(parts), len(end.split("/"))) for end in fits), default=0)
            best = [end for end in fits if min(len(parts), len(end.split("/"))) == longest]
            if name in (one, other):
                best = [name]
            if len(best) == 2:
                with pytest.raises(InputError, match="may be") as refused:
                    FolderIndex(folder).find(name)
                assert all(str(folder / end) in refused.value.message for end in best)
                counts["refused"] += 1
            else:
                assert FolderIndex(folder).find(name) == (folder / best[0] if best else None)
                counts["found" if best else "none"] += 1
    print(counts)
    assert min(counts.values()) > 5


def _ends(name: list[str], file: list[str]) -> bool:
    count = min(len(name), len(file))
    return name[-count:] == file[-count:]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a/1.jpg", "b/1.jpg", False),
        ("x/a/1.jpg", "x/b/1.jpg", False),
        ("a/1.jpg", "1.jpg", True),
        ("a/1.jpg", "./a//1.jpg", True),
        ("coco/a/1.jpg", "a/1.jpg", True),
    ],
)
def test_two_images_are_not_one_file(one: str, other: str, same: bool, tmp_path: Path) -> None:
    for first, second in ((one, other), (other, one)):
        index = FolderIndex(folder_of(tmp_path, "1.jpg"))
        assert index.find(first) == tmp_path / "1.jpg"
        if same:
            assert index.find(second) == tmp_path / "1.jpg"
        else:
            with pytest.raises(InputError, match="are different images") as refused:
                index.find(second)
            assert first in refused.value.subject
            assert second in refused.value.message


def test_without_the_guards_one_is_taken_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderIndex, "_check_named_once", lambda *_: None)
    index = FolderIndex(folder_of(tmp_path, "1.jpg"))
    assert index.find("a/1.jpg") == index.find("b/1.jpg")


def test_a_whole_disk_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_FILES", 2)
    folder = folder_of(tmp_path, "1.jpg", "2.jpg", "a/3.jpg")
    assert FolderIndex(folder).find("1.jpg"), "where it says it is"
    with pytest.raises(InputError, match="holds more than 2 files"):
        FolderIndex(folder).find("3.jpg")


def test_no_list_of_files_travels_to_a_worker(tmp_path: Path) -> None:
    source = Folder(folder_of(tmp_path, *(f"a/{number}.jpg" for number in range(300))))
    assert source.has("7.jpg")
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert pickle.loads(sent).has("8.jpg")


def annotations(path: Path, *images: str) -> Path:
    rows = (
        {"image": image, "sent": "mug", "bbox": [1, 1, 4, 4], "width": 8, "height": 8} for image in images
    )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("image", ["../1.jpg", "a/../../1.jpg", "../../../../x/1.jpg"])
def test_names_that_lead_out_of_the_folder_are_refused_with_their_row(image: str, tmp_path: Path) -> None:
    data = annotations(tmp_path / "rec.jsonl", "1.jpg", image)
    with pytest.raises(InputError, match="leads out of the folder of images") as refused:
        read_annotations(data)
    assert "row 2 (line 2)" in refused.value.subject
    assert len(read_annotations(data, skip_bad_rows=True).skipped) == 1


def test_data_sets_of_equal_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", "a/1.jpg", "b/1.jpg")
    both = open_dataset(annotations(tmp_path / "both.jsonl", "a/1.jpg", "b/1.jpg"), images=folder)
    assert both.source is not None
    assert len(work_of(both.expressions, both.source).groups) == 2
    short = open_dataset(annotations(tmp_path / "short.jsonl", "1.jpg"), images=folder)
    assert short.source is not None
    with pytest.raises(InputError, match=r"may be .*a/1\.jpg or .*b/1\.jpg"):
        work_of(short.expressions, short.source)
    flat = open_dataset(tmp_path / "both.jsonl", images=folder_of(tmp_path / "flat", "1.jpg"))
    assert flat.source is not None
    with pytest.raises(InputError, match="are different images"):
        work_of(flat.expressions, flat.source)


def test_answers_are_not_scored_with_the_images_of_something_else(tmp_path: Path) -> None:
    data = annotations(tmp_path / "rec.jsonl", "1.jpg")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "1.jpg.0", "answer": "[[0, 0, 500, 500]]"}')
    wrong = open_dataset(data, images=folder_of(tmp_path / "wrong", "2.jpg"))
    with pytest.raises(InputError, match="none of the 1 images is there"):
        evaluate_predictions(answers, wrong, "internvl")
    right = open_dataset(data, images=folder_of(tmp_path / "right", "1.jpg"))
    assert evaluate_predictions(answers, right, "internvl").expressions == 1


def test_scenes_have_no_splits() -> None:
    with pytest.raises(InputError, match="scenes have no splits"):
        open_dataset("scenes:2", split="val")


def test_two_images_of_one_name_in_a_table(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def table(*contents: bytes) -> Path:
        rows = [
            {"question_id": f"q{number}", "image": {"bytes": content}, "answer": ["mug"], "bbox": [1.0, 1.0, 4.0, 4.0], "file_name": "1.jpg"}
            for number, content in enumerate(contents)
        ]  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val-0.parquet", row_group_size=1)
        return tmp_path / "val-0.parquet"

    same = read_annotations(table(b"image", b"image")).images
    assert same is not None
    assert same.read("1.jpg") == b"image"
    other = read_annotations(table(b"image", b"another")).images
    assert other is not None
    with pytest.raises(InputError, match="is the name of two different images: in row 1 of group 1 of val-0"):
        other.read("1.jpg")
