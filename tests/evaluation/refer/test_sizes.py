"""Boxes are pixels of one size of the image; another size is noticed before anything is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression, read_annotations
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.refer.evaluate import evaluate_predictions
from gap_export.evaluation.refer.image_source import Embedded, Folder, InMemory
from gap_export.evaluation.refer.sizes import fitted
from gap_export.inputs.images import image_size, load_image

BOX = (8.0, 12.0, 24.0, 30.0)
_ORIENTATION = 0x0112


def expression(name: str, size: tuple[int, int] | None, number: int = 0) -> Expression:
    return Expression(f"{name}.{number}", name, "a mug", BOX, *(size or (None, None)))


def photograph(stored: tuple[int, int], orientation: int, kind: str = "JPEG") -> bytes:
    content, image = io.BytesIO(), Image.new("RGB", stored, (9, 9, 9))
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    image.save(content, kind, exif=exif)
    return content.getvalue()


def test_the_same_sizes_change_nothing() -> None:
    source = InMemory({"a": Image.new("RGB", (40, 60)), "b": Image.new("RGB", (30, 40))})
    asked = [expression("a", (40, 60)), expression("b", None), expression("missing", (1, 1))]
    for rescale in (False, True):
        found = fitted(asked, source, rescale=rescale)
        assert found.expressions == tuple(asked)
        assert found.rescaled == ()


def test_other_sizes_are_refused_with_both_sizes_the_count_and_the_remedies() -> None:
    source = InMemory({name: Image.new("RGB", (80, 120)) for name in "abc"})
    asked = [expression("a", (80, 120)), *(expression(name, (40, 60), n) for name in "bc" for n in range(2))]
    with pytest.raises(InputError) as caught:
        fitted(asked, source)
    assert caught.value.subject == "image b"
    for part in ("80x120", "40x60", "in 2 of 3 images"):
        assert part in caught.value.message
    for remedy in ("--rescale-boxes", "--ignore-exif"):
        assert remedy in caught.value.hint
    found = fitted(asked, source, rescale=True)
    assert found.rescaled == ("b", "c")
    assert found.expressions[0] == asked[0]
    assert found.expressions[1].box == (16.0, 24.0, 48.0, 60.0)
    assert (found.expressions[1].width, found.expressions[1].height) == (80, 120)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_in_the_header_is_that_of_the_image(kind: str, orientation: int, tmp_path: Path) -> None:
    content = photograph((40, 60), orientation, kind)
    path = tmp_path / "photograph"
    path.write_bytes(content)
    for upright in (True, False):
        loaded = load_image(content, upright=upright).size
        turned = orientation >= 5 and (upright or kind == "TIFF")  # Pillow always turns TIFF files
        assert loaded == ((60, 40) if turned else (40, 60))
        assert image_size(content, name="a", upright=upright) == loaded
        assert image_size(path, name="a", upright=upright) == loaded


def test_a_photograph_that_is_turned(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photograph((40, 60), 6))
    stored = [expression("a.jpg", (40, 60))]
    with pytest.raises(InputError, match="is 60x40 pixels, and its annotations are of 40x60"):
        fitted(stored, Folder(tmp_path))
    with pytest.raises(InputError, match="is 60x40") as caught:
        fitted(stored, Folder(tmp_path), rescale=True)
    assert "--ignore-exif" in caught.value.hint
    as_stored = Folder(tmp_path, upright=False)
    assert fitted(stored, as_stored).expressions == tuple(stored)
    assert as_stored.open("a.jpg").size == as_stored.size("a.jpg") == (40, 60)
    with pytest.raises(InputError, match="is 40x60"):
        fitted([expression("a.jpg", (60, 40))], as_stored)


def test_images_inside_a_data_set() -> None:
    class Inside:
        def names(self) -> list[str]:
            return ["a"]

        def read(self, image: str) -> bytes:
            return photograph((40, 60), 8)

    assert Embedded(Inside()).size("a") == Embedded(Inside()).open("a").size == (60, 40)
    as_stored = Embedded(Inside(), upright=False)
    assert as_stored.size("a") == as_stored.open("a").size == (40, 60)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes(b"")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(InputError, match=r"not an image|is empty"):
            fitted([expression(name, (1, 1))], Folder(tmp_path))
    assert not Folder(tmp_path).has("x" * 5000)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_from_elsewhere_are_compared_too(tmp_path: Path) -> None:
    Image.new("RGB", (80, 120)).save(tmp_path / "a.png")
    row = {"image": "a.png", "sent": "mug", "bbox": list(BOX), "width": 40, "height": 60}
    data = write(tmp_path / "data.jsonl", [row])
    answers = write(tmp_path / "answers.jsonl", [{"id": "a.png.0", "answer": "[[200, 200, 600, 500]]"}])
    assert evaluate_predictions(answers, open_dataset(data), "internvl").accuracy == 1.0
    dataset = open_dataset(data, images=tmp_path)
    with pytest.raises(InputError, match="is 80x120 pixels"):
        evaluate_predictions(answers, dataset, "internvl")
    record = evaluate_predictions(answers, dataset, "internvl", rescale_boxes=True)
    assert (record.accuracy, record.rescaled_images) == (1.0, 1)


def test_sizes_that_are_none(tmp_path: Path) -> None:
    row = {"image": "a.png", "sent": "mug", "bbox": list(BOX)}
    for field in ("width", "height"):
        for size in (0, -1, 1.5, True, "640", 10**400):
            with pytest.raises(InputError, match=f"{field} is .*not a number of pixels"):
                read_annotations(write(tmp_path / "data.jsonl", [{**row, field: size}]))


def test_an_image_that_is_scaled_and_turned_is_not_rescaled(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photograph((20, 30), 6))
    stored = [expression("a.jpg", (40, 61))]
    with pytest.raises(InputError, match="is 30x20 pixels, and its annotations are of 40x61") as caught:
        fitted(stored, Folder(tmp_path), rescale=True)
    assert "--ignore-exif" in caught.value.hint
    found = fitted(stored, Folder(tmp_path, upright=False), rescale=True)
    assert (found.rescaled, found.stretched) == (("a.jpg",), ())
    # An image that was squashed is of neither shape, and boxes are squashed with it.
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    found = fitted([expression("b.png", (64, 48))], Folder(tmp_path), rescale=True)
    assert found.expressions[0].box == (4.0, 8.0, 12.0, 20.0)
    assert found.rescaled == found.stretched == ("b.png",)


def test_boxes_that_cannot_be_of_the_image_are_refused_where_no_size_is_given() -> None:
    source = InMemory({"a": Image.new("RGB", (24, 30)), "b": Image.new("RGB", (8, 12))})
    fitted([expression("a", None)], source)
    with pytest.raises(
        InputError, match=r"is 8x12 pixels.*expression b\.0 lies outside.* 1 of 2 images"
    ) as caught:
        fitted([expression("a", None), expression("b", None)], source, rescale=True)
    assert "width and height" in caught.value.hint
