"""One file: whole or not at all, linked or copied, and never in the place of something that is no file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import BundleError
from gap_export.files import check_output_file, place_file, readable_size, write_atomically
from gap_export.files import file as module


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "x.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert listing(path.parent) == ["x.json"]
    with pytest.raises(BundleError, match="cannot be written"):
        write_atomically(path / "below a file", "x")


def test_files_are_linked_or_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    assert place_file(source, tmp_path / "linked", copy=False) == 0
    assert os.path.samefile(source, tmp_path / "linked")
    assert place_file(source, tmp_path / "copied", copy=True) == 7
    assert not os.path.samefile(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"weights"


def test_a_link_to_a_symlink_is_a_link_to_the_file(tmp_path: Path) -> None:
    """Hub caches keep files behind symbolic links; runtimes refuse those as external data."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "snapshot").symlink_to("blob")
    place_file(tmp_path / "snapshot", tmp_path / "placed", copy=False)
    assert not (tmp_path / "placed").is_symlink()
    assert os.path.samefile(tmp_path / "placed", tmp_path / "blob")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_files_are_copied(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "link", refuse)
    (tmp_path / "source").write_bytes(b"weights")
    assert place_file(tmp_path / "source", tmp_path / "placed", copy=False) == 7
    assert (tmp_path / "placed").read_bytes() == b"weights"


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.shutil, "copyfile", full)
    (tmp_path / "source").touch()
    with pytest.raises(BundleError, match="No space left on device"):
        place_file(tmp_path / "source", tmp_path / "placed", copy=True)


def test_sizes_are_readable() -> None:
    sizes = (7, 1500, 999_999, 2_500_000_000, 14_000_000_000_000)
    assert [readable_size(size) for size in sizes] == ["7.0 B", "1.5 kB", "1000.0 kB", "2.5 GB", "14000.0 GB"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("folder", "is a folder"), ("pipe", "is no regular file")):
        with pytest.raises(BundleError, match=words):
            write_atomically(tmp_path / name, "x")
    assert listing(tmp_path) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """Neither one under the file's own name nor one under any name that could be guessed."""
    (tmp_path / "precious").write_text("old")
    for name in ("page.html", ".page.html.writing"):
        (tmp_path / name).symlink_to("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("page.html", "dangling"):
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "nothing").exists()


def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", "one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "x", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(BundleError, match="No space left"):
        write_atomically(tmp_path / "x", "new")
    assert listing(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("name", ["x" * 300, "null\0byte"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be written"):
        write_atomically(tmp_path / name, "x")
    assert listing(tmp_path) == []


# Before the work


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"pixels")
    (tmp_path / "alias.png").symlink_to("image.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unc-eval.json").touch()
    inputs = [tmp_path / "image.png", tmp_path / "run"]
    for name in ("image.png", "alias.png", "run/../image.png", "run/unc-eval.json"):
        with pytest.raises(BundleError, match="is read by this command"):
            check_output_file(tmp_path / name, inputs=inputs)
    for name in ("other.png", "run/page.html", "new/folder/x.png"):
        check_output_file(tmp_path / name, inputs=inputs)
    (tmp_path / "run" / "page.html").touch()
    check_output_file(tmp_path / "run" / "page.html", inputs=inputs, ours=lambda path: path.suffix == ".html")
    assert not (tmp_path / "new").exists()


def test_only_files_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("work of a year")
    (tmp_path / "page.html").write_text("ours")
    options: Any = {"ours": lambda path: "ours" in path.read_text(), "holds": "page"}
    with pytest.raises(BundleError, match="is there and holds no page"):
        check_output_file(tmp_path / "thesis.html", **options)
    check_output_file(tmp_path / "page.html", **options)
    check_output_file(tmp_path / "new.html", **options)


def test_places_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("file/x", "(is no folder|Not a directory)"),
        ("folder", "is a folder"),
        ("null\0", "null byte"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(BundleError, match=words):
            check_output_file(tmp_path / name)


def test_no_file_is_put_into_the_bundle_that_is_read(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("new.json", "below/new.json"):
        with pytest.raises(BundleError, match="lies in a folder"):
            check_output_file(bundle / name, inputs=[bundle], closed=[bundle])
    check_output_file(tmp_path / "new.json", inputs=[bundle], closed=[bundle])
    check_output_file(bundle / "new.json", inputs=[bundle])  # the control
