"""Folders that appear whole or not at all, and records that notice every change."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from gap_export import files
from gap_export.errors import BundleError
from gap_export.files import (
    atomic_folder,
    place_file,
    readable_size,
    write_atomically,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


# Folders


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("1")
        assert not target.exists()
        assert scratch.stat().st_dev == target.parent.stat().st_dev, "so that renaming and linking work"
    assert listing(target) == ["a"]
    assert listing(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    error: type[BaseException], existing: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if existing:
        old_bundle(target)

    def fail(scratch: Path) -> None:
        (scratch / "half").write_text("written")
        raise error

    with pytest.raises(error), atomic_folder(target) as scratch:
        fail(scratch)
    assert listing(tmp_path) == (["out"] if existing else [])
    if existing:
        assert listing(target) == ["old"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = old_bundle(tmp_path / "out")
    with atomic_folder(target) as scratch:
        (scratch / "new").touch()
        assert listing(target) == ["old"]
    assert listing(target) == ["new"]
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_bundle(tmp_path / "out")
    rename = os.rename

    def refuse(source: Any, destination: Any) -> None:
        if Path(destination) == target and not (Path(source) / "old").exists():
            raise error
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", refuse)
    with pytest.raises(type(error)), atomic_folder(target) as scratch:
        (scratch / "new").touch()
    assert listing(tmp_path) == ["out"]
    assert listing(target) == ["old"]


@pytest.mark.parametrize("name", ["out", "out[1]", "o*t"])
def test_what_a_killed_build_left_is_cleared_away(name: str, tmp_path: Path) -> None:
    leftover = tmp_path / f".{name}.building-abc"
    leftover.mkdir()
    (leftover / "weights").write_text("x")
    neighbours = [tmp_path / ".out1.building-x", tmp_path / ".outer.building-x"]
    for neighbour in neighbours:
        neighbour.mkdir()
    with atomic_folder(tmp_path / name) as scratch:
        (scratch / "a").touch()
    assert listing(tmp_path) == sorted([*(path.name for path in neighbours), name])


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be created"), atomic_folder(tmp_path / "file" / "out"):
        pass


# Files


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

    monkeypatch.setattr(files.os, "link", refuse)
    (tmp_path / "source").write_bytes(b"weights")
    assert place_file(tmp_path / "source", tmp_path / "placed", copy=False) == 7
    assert (tmp_path / "placed").read_bytes() == b"weights"


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.shutil, "copyfile", full)
    (tmp_path / "source").touch()
    with pytest.raises(BundleError, match="No space left on device"):
        place_file(tmp_path / "source", tmp_path / "placed", copy=True)


def test_sizes_are_readable() -> None:
    sizes = (7, 1500, 999_999, 2_500_000_000, 14_000_000_000_000)
    assert [readable_size(size) for size in sizes] == ["7.0 B", "1.5 kB", "1000.0 kB", "2.5 GB", "14000.0 GB"]
