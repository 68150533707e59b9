"""The guard of the tests themselves: whatever changes something outside is prevented, whatever stays inside is not."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guard import Guard, WrittenOutsideError


def _relative(folder: Path) -> None:
    before = os.getcwd()
    os.chdir(folder)
    try:
        Path("new").write_text("x")
    finally:
        os.chdir(before)


def _by_descriptor(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.unlink("file", dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _temporary(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda folder: (folder / "new").write_text("x"),
    "append": lambda folder: (folder / "file").open("a").close(),
    "change": lambda folder: (folder / "file").open("r+").close(),
    "create": lambda folder: (folder / "new").touch(),
    "descriptor": lambda folder: os.close(os.open(folder / "new", os.O_CREAT | os.O_WRONLY)),
    "relative": _relative,
    "bytes": lambda folder: open(os.fsencode(folder / "new"), "wb").close(),
    "temporary": _temporary,
    "remove": lambda folder: (folder / "file").unlink(),
    "remove by descriptor": _by_descriptor,
    "remove a tree": lambda folder: shutil.rmtree(folder / "folder"),
    "make a folder": lambda folder: (folder / "more").mkdir(),
    "remove a folder": lambda folder: (folder / "folder").rmdir(),
    "rename": lambda folder: (folder / "file").rename(folder / "new"),
    "move out": lambda folder: shutil.move(folder.parent / "kept", folder / "new"),
    "move in": lambda folder: shutil.move(folder / "file", folder.parent / "new"),
    "copy": lambda folder: shutil.copy(folder.parent / "kept", folder / "new"),
    "copy a tree": lambda folder: shutil.copytree(folder.parent / "tree", folder / "new"),
    "link": lambda folder: os.link(folder / "file", folder / "new"),
    "symbolic link": lambda folder: (folder / "new").symlink_to("file"),
    "through a link": lambda folder: (folder.parent / "link").write_text("x"),
    "truncate": lambda folder: os.truncate(folder / "file", 0),
    "mode": lambda folder: (folder / "file").chmod(0o600),
    "time": lambda folder: os.utime(folder / "file"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that may be written, with one in it to try things on."""
    folder = tmp_path / "place"
    (folder / "inner" / "folder").mkdir(parents=True)
    (folder / "tree").mkdir()
    for name in ("kept", "inner/file", "tree/file"):
        (folder / name).write_text("as it was")
    (folder / "link").symlink_to("inner/file")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_something_outside_is_prevented(name: str, guarded: Guard, place: Path) -> None:
    before = sorted(place.rglob("*"))
    with guarded.within(place / "elsewhere"), pytest.raises(WrittenOutsideError):
        CHANGES[name](place / "inner")
    assert guarded.outside
    guarded.outside.clear()
    assert sorted(place.rglob("*")) == before
    assert (place / "inner" / "file").read_text() == "as it was"


@pytest.mark.parametrize("name", CHANGES)
def test_inside_all_of_that_may_be_done(name: str, guarded: Guard, place: Path) -> None:
    with guarded.within(place):
        CHANGES[name](place / "inner")
    assert not guarded.outside


def test_reading_is_no_writing(guarded: Guard, place: Path) -> None:
    with guarded.within(place / "elsewhere"):
        (place / "kept").read_text()
        list(place.iterdir())
        place.mkdir(exist_ok=True)
        Path(os.devnull).write_text("x")
    assert not guarded.outside


def test_a_test_that_hides_it_fails_all_the_same(guarded: Guard, place: Path) -> None:
    with guarded.within(place), contextlib.suppress(Exception):
        (place.parent / "outside").write_text("x")
    with pytest.raises(AssertionError, match="outside of the folders"):
        guarded.check()
    guarded.check()
    assert not (place.parent / "outside").exists()
