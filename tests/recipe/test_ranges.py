"""Files of ranges: read back as written, refused when they are no such file or of another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gap_export.errors import RecipeError
from gap_export.recipe.ranges import Ranges, read_ranges

RANGES = Ranges(
    gap_export="0.1.0",
    bundle="tiny",
    family="llava",
    checkpoint="folder",
    samples=4,
    source="scenes",
    largest={"a.weight": 3.5, "b.weight": 0.0},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(RANGES.model_dump_json())
    assert read_ranges(path) == RANGES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("{}", "is missing"),
        (json.dumps({**RANGES.model_dump(), "largest": {"a.weight": -1}}), "largest.a.weight"),
        (RANGES.model_dump_json().replace("3.5", "1e999"), "largest.a.weight"),
        (json.dumps({**RANGES.model_dump(), "more": 1}), "more"),
    ],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words) as caught:
        read_ranges(path)
    assert "gap-export calibrate" in caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_ranges(tmp_path / "none.json")


def test_ranges_of_another_model() -> None:
    RANGES.check_covers(["a.weight"], "llava")
    with pytest.raises(RecipeError, match=r"no range of c\.weight"):
        RANGES.check_covers(["a.weight", "c.weight"], "llava")
    with pytest.raises(RecipeError, match="ranges of family 'llava'"):
        RANGES.check_covers(["a.weight"], "shikra")
