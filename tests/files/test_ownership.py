"""Whose a folder is: told by content, not by a name; what no command wrote is never replaced."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle.folder import BUNDLE
from gap_export.errors import BundleError
from gap_export.evaluation.refer.journal import EVALUATION
from gap_export.evaluation.refer.results import SCORED
from gap_export.evaluation.sweep.store import SWEEP
from gap_export.files import FolderKind, ListedFolder, check_folder
from gap_export.files import ownership as module
from gap_export.files.hidden import hidden_path

KINDS = (BUNDLE, EVALUATION, SCORED, SWEEP)
NAMES = {
    BUNDLE.name: ("manifest.json", "a.onnx", "reports/parity.json"),
    SWEEP.name: ("settings.json", "sweep.json", "points/none.json"),
}


CONTENT = b"weights"
HASH = hashlib.sha256(CONTENT).hexdigest()


def content_of(kind: FolderKind, **changes: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(kind.fields, 1),
        "files": {"a.onnx": {"sha256": HASH, "bytes": len(CONTENT)}},
        **changes,
    }


def folder_of(kind: FolderKind, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / kind.mark).write_text(json.dumps(content_of(kind)))
    return folder


def tree(folder: Path) -> dict[str, Any]:
    """Everything in a folder, with what it holds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.mark}")
def test_a_folder_of_ours_is_told(kind: FolderKind, tmp_path: Path) -> None:
    assert not check_folder(tmp_path / "absent", kind)
    assert not check_folder(tmp_path, kind)
    folder = folder_of(kind, tmp_path / "ours")
    hidden_path(folder / "x", "writing").touch()  # what a killed process left
    assert check_folder(folder, kind)
    for name in NAMES.get(kind.name, ("provenance.json", "unc-results.parquet", "lmms-eval-eval.json")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).exists() or (folder / name).write_bytes(CONTENT)
    assert check_folder(folder, kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.mark}")
@pytest.mark.parametrize(
    "content",
    [
        {"name": "My application", "short_name": "App", "icons": [], "start_url": "/"},
        {"editor.fontSize": 14, "files.exclude": {}},
        [1, 2],
        None,
        "text",
    ],
    ids=str,
)
def test_a_file_of_that_name_proves_nothing(kind: FolderKind, content: Any, tmp_path: Path) -> None:
    (tmp_path / kind.mark).write_text(json.dumps(content))
    before = tree(tmp_path)
    for replaced in (True, False):
        with pytest.raises(BundleError, match=f"is not empty and holds no {kind.name}"):
            check_folder(tmp_path, kind, replaced=replaced)
    assert tree(tmp_path) == before


@given(st.binary(max_size=60))
def test_nor_does_any_content(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="holds no bundle"):
        check_folder(folder, BUNDLE)


def test_deep_nesting_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="holds no bundle"):
        check_folder(tmp_path, BUNDLE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.mark}")
@pytest.mark.parametrize(
    "name", ["notes.txt", "deep/er/thesis.tex", "link", "empty/", ".hidden", "points/x/y.json"]
)
def test_files_of_others_are_named_and_stay(kind: FolderKind, name: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "ours")
    if name == "link":
        (folder / name).symlink_to(tmp_path)
    elif name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("work of a year")
    before = tree(folder)
    with pytest.raises(
        BundleError, match=re.escape(f"holds what no command wrote beside its {kind.name}: {name}")
    ) as caught:
        check_folder(folder, kind)
    assert "nothing of yours is replaced" in caught.value.hint
    assert check_folder(folder, kind, replaced=False), "where nothing is replaced, nothing is lost"
    assert tree(folder) == before


def test_ten_are_named(tmp_path: Path) -> None:
    folder = folder_of(BUNDLE, tmp_path / "ours")
    for number in range(12):
        (folder / f"note{number:02}").touch()
    with pytest.raises(BundleError, match=r"note00, .*note09, \.\.\."):
        check_folder(folder, BUNDLE)


def test_names_in_a_manifest_are_no_patterns(tmp_path: Path) -> None:
    folder = folder_of(BUNDLE, tmp_path / "ours")
    (folder / "manifest.json").write_text(
        json.dumps(content_of(BUNDLE, files={".*": {}, "../x": {}, "a.onnx": {}}))
    )
    (folder / "notes").touch()
    with pytest.raises(BundleError, match="notes"):
        check_folder(folder, BUNDLE)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"WEIGHTS"), "changed since they were written: a.onnx"),
        (lambda path: path.write_bytes(CONTENT + b"x"), "changed since they were written: a.onnx"),
        (lambda path: (path.unlink(), path.symlink_to("../elsewhere")), "no command wrote .*: a.onnx"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "no command wrote .*: a.onnx"),
        (lambda path: (path.unlink(), path.mkdir()), "no command wrote .*: a.onnx/"),
        (lambda path: path.unlink(), None),
        (lambda path: path.touch(), None),
    ],
    ids=["changed", "longer", "a link", "a pipe", "a folder", "gone", "touched"],
)
def test_a_listed_file_is_ours_as_it_was_written(damage: Any, words: str | None, tmp_path: Path) -> None:
    folder = folder_of(BUNDLE, tmp_path / "ours")
    (folder / "a.onnx").write_bytes(CONTENT)
    damage(folder / "a.onnx")
    if words is None:
        assert check_folder(folder, BUNDLE)
        return
    with pytest.raises(BundleError, match=words):
        check_folder(folder, BUNDLE)


def test_large_files_are_told_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(BUNDLE, tmp_path / "ours")
    (folder / "a.onnx").write_bytes(b"WEIGHTS")
    monkeypatch.setattr(module, "HASHED", 3)
    assert check_folder(folder, BUNDLE)
    (folder / "a.onnx").write_bytes(b"WEIGHTS and more")
    with pytest.raises(BundleError, match="changed since"):
        check_folder(folder, BUNDLE)


def test_reports_are_anything_but_devices_and_pipes(tmp_path: Path) -> None:
    """They are copied into the new bundle, and copying a pipe waits for ever."""
    folder = folder_of(BUNDLE, tmp_path / "ours")
    (folder / "reports" / "mine").mkdir(parents=True)
    (folder / "reports" / "mine" / "notes.txt").touch()
    (folder / "reports" / "link").symlink_to(tmp_path)
    assert check_folder(folder, BUNDLE)
    os.mkfifo(folder / "reports" / "pipe")
    with pytest.raises(BundleError, match="reports/pipe"):
        check_folder(folder, BUNDLE)


def test_nothing_is_put_into_a_bundle(tmp_path: Path) -> None:
    folder = folder_of(BUNDLE, tmp_path / "ours")
    for place in ("out", "deep/er/out", "../ours/out", "reports/out"):
        with pytest.raises(BundleError, match=r"lies in the bundle .*/ours") as caught:
            check_folder(folder / place, SWEEP, outside=(BUNDLE,))
        assert "ours.runs" in caught.value.hint
    assert not check_folder(tmp_path / "ours.runs" / "out", SWEEP, outside=(BUNDLE,))


def test_a_listing_tells_whose_a_folder_is_and_what_is_in_it(tmp_path: Path) -> None:
    results = ListedFolder(tmp_path, SWEEP)
    results.write("settings.json", "{}")
    results.write("points/a.json", "1")
    results.write("points/a.json", "2")
    assert check_folder(tmp_path, SWEEP)
    (tmp_path / "points" / "a.json").write_text("1")  # a write that did not come to its end
    assert check_folder(tmp_path, SWEEP)
    (tmp_path / "points" / "b.json").write_text("not written by a command")
    for replaced in (True, False):
        with pytest.raises(BundleError, match=r"no command wrote .*: points/b.json"):
            check_folder(tmp_path, SWEEP, replaced=replaced)
    with pytest.raises(BundleError, match="holds no evaluation"):
        check_folder(tmp_path, EVALUATION)


def test_without_the_comparison_of_hashes_a_change_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what makes `check_folder` refuse is the hash."""
    folder = folder_of(BUNDLE, tmp_path / "ours")
    (folder / "a.onnx").write_bytes(b"WEIGHTS")
    monkeypatch.setattr(module.Listed, "is_in", lambda *_: True)
    assert check_folder(folder, BUNDLE)


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be used: File name too long"):
        check_folder(tmp_path / ("x" * 300), BUNDLE)


def test_a_file_or_a_pipe_is_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="is a file"):
        check_folder(tmp_path / "pipe", BUNDLE)
