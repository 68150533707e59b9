"""The journal: whole lines count, torn ones do not, and what belongs to another evaluation is not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import BundleError
from gap_export.evaluation.digests import first_digest
from gap_export.evaluation.refer.journal import ANSWERS, AnswerRow, Settings, open_journal
from gap_export.records import Record

SETTINGS = Settings(manifest_sha256="b", annotations="a", split="val", backend="torch", keep=None, share=True)


def row(identity: str, **changes: Any) -> AnswerRow:
    fields = {
        "image": "x.jpg",
        "width": 10,
        "height": 20,
        "answer": "[0, 0, 1, 1]\n",
        "tokens": 3,
        "kept_indices": (2, 7),
    }
    return AnswerRow.model_validate({"id": identity, "seconds": 0.5, **fields, **changes})


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "run", SETTINGS)
    journal.add([row("a"), row("b", refused="too long")])
    again = open_journal(tmp_path / "run", SETTINGS)
    assert again.rows == [row("a"), row("b", refused="too long")]
    again.add([row("c")])
    assert open_journal(tmp_path / "run", SETTINGS).known == {"a", "b", "c"}


@pytest.mark.parametrize("left", range(1, 12))
def test_a_torn_line_is_cut_off(left: int, tmp_path: Path) -> None:
    journal = open_journal(tmp_path, SETTINGS)
    journal.add([row("a")])
    whole = (tmp_path / ANSWERS).read_bytes()
    journal.add([row("b")])
    content = (tmp_path / ANSWERS).read_bytes()
    (tmp_path / ANSWERS).write_bytes(content[:-left])
    again = open_journal(tmp_path, SETTINGS)
    assert again.known == {"a"}
    assert (tmp_path / ANSWERS).read_bytes() == whole
    again.add([row("b")])
    assert (tmp_path / ANSWERS).read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.5}, "keep None there, 0.5 here"),
        ({"backend": "onnxruntime"}, "backend torch there"),
        ({"box_format": "list_pixels"}, "box format None there, list_pixels here"),
    ],
)
def test_another_evaluation_is_left_alone(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    open_journal(tmp_path, SETTINGS).add([row("a")])
    other = SETTINGS.model_copy(update=change)
    with pytest.raises(BundleError, match=message):
        open_journal(tmp_path, other)
    assert open_journal(tmp_path, SETTINGS).known == {"a"}
    assert open_journal(tmp_path, other, replace=True).known == set()


def test_a_journal_from_before_there_were_box_formats_goes_on(tmp_path: Path) -> None:
    """Settings without one are written as they were, and with them the digests of every line."""
    journal = open_journal(tmp_path, SETTINGS)
    assert "box_format" not in (tmp_path / "settings.json").read_text()
    assert journal.digest == first_digest(Before(**SETTINGS.model_dump()))
    journal.add([row("a")])
    assert open_journal(tmp_path, SETTINGS).known == {"a"}


class Before(Record):
    """What settings were before."""

    manifest_sha256: str
    annotations: str
    split: str
    backend: str
    keep: float | None
    share: bool
    ignore_exif: bool = False


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="holds no evaluation"):
        open_journal(tmp_path, SETTINGS, replace=True)


@pytest.mark.parametrize(("text", "message"), [("{}\n", "line 2"), (None, "answer to a twice")])
def test_damage_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    journal = open_journal(tmp_path, SETTINGS)
    journal.add([row("a")])
    if text is None:
        journal.add([row("a")])
    else:
        with (tmp_path / ANSWERS).open("a") as out:
            out.write(text)
    with pytest.raises(BundleError, match=message):
        open_journal(tmp_path, SETTINGS)


def test_a_disk_that_is_full_for_a_moment_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path, SETTINGS)
    journal.add([row("a")])
    before = (tmp_path / ANSWERS).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(BundleError, match="No space left"):
            journal.add([row("b"), row("c")])
    assert (tmp_path / ANSWERS).read_bytes() == before
    journal.add([row("b")])
    assert open_journal(tmp_path, SETTINGS).known == {"a", "b"}
