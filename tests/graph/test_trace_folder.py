"""The folder of traced graphs: whatever happens to it, a read gives what was written, or nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.graph import trace_folder
from gap_export.graph.trace_folder import TraceFolder, user_folder

OVERHEAD = 51
"""Bytes of an entry besides what is kept."""


def entries(folder: TraceFolder) -> set[str]:
    return {path.stem for path in folder.path.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = TraceFolder(tmp_path / "not" / "there")
    assert folder.read("a") is None
    assert not folder.path.exists(), "made when there is something to keep"
    folder.write("a", b"one")
    folder.write("b", b"")
    folder.write("a", b"two")
    assert (folder.read("a"), folder.read("b"), TraceFolder(folder.path).read("a")) == (b"two", b"", b"two")
    assert entries(folder) == {"a", "b"}
    assert (folder.path / "a.trace").stat().st_size == OVERHEAD + 3


@given(data=st.data())
def test_damage_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = TraceFolder(tmp_path_factory.mktemp("damaged"))
    folder.write("a", b"a graph")
    path = folder.path / "a.trace"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut short"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert folder.read("a") is None
    folder.write("a", b"another")
    assert folder.read("a") == b"another"


def test_an_entry_belongs_to_its_key(tmp_path: Path) -> None:
    folder = TraceFolder(tmp_path)
    folder.write("a", b"a graph")
    (tmp_path / "a.trace").rename(tmp_path / "b.trace")
    assert folder.read("b") is None


def test_what_was_not_asked_for_longest_goes_first(tmp_path: Path) -> None:
    folder = TraceFolder(tmp_path, limit=3 * (OVERHEAD + 10))
    (tmp_path / "notes.txt").write_text("x" * 1000)  # not ours: neither counted nor removed
    for age, key in enumerate("cba"):
        folder.write(key, bytes(10))
        os.utime(tmp_path / f"{key}.trace", ns=(age, age))
    assert folder.read("c") == bytes(10)
    folder.write("d", bytes(10))
    assert entries(folder) == {"a", "c", "d", "notes"}
    folder.write("e", bytes(10 + OVERHEAD + 10))
    assert entries(folder) >= {"e", "notes"}
    assert len(entries(folder)) == 3
    folder.write("f", bytes(1000))
    assert "f" not in entries(folder), "larger than all may be together"


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.writing", tmp_path / ".new.writing"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 7200))
    TraceFolder(tmp_path).write("a", b"")
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trace_folder.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        TraceFolder(tmp_path).write("a", b"a graph")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TraceFolder(tmp_path)
    folder.write("a", b"a graph")

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(trace_folder.os, "utime", refuse)
    assert folder.read("a") == b"a graph"


def _write_and_read(path: Path, process: int) -> None:
    folder = TraceFolder(path, limit=5 * (OVERHEAD + 1000))
    for turn in range(200):
        key = str((turn * 7 + process) % 10)
        content = folder.read(key)
        assert content in (None, key.encode() * 1000)
        folder.write(key, key.encode() * 1000)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_write_and_read, args=(tmp_path, number)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    folder = TraceFolder(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".trace"}
    assert all(folder.read(key) == key.encode() * 1000 for key in entries(folder))
    assert len(entries(folder)) <= 5


@pytest.mark.parametrize(
    ("given", "xdg", "wanted"),
    [
        (None, None, "home/.cache/gap-export/traces"),
        ("", "", "home/.cache/gap-export/traces"),
        (None, "caches", "caches/gap-export/traces"),
        ("traces", "caches", "traces"),
        ("~/traces", None, "home/traces"),
        ("off", None, None),
    ],
)
def test_the_folder_is_the_users(
    given: str | None, xdg: str | None, wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in ((trace_folder.VARIABLE, given), ("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    folder = user_folder()
    assert (None if folder is None else folder.path) == (None if wanted is None else tmp_path / wanted)


def test_a_relative_cache_folder_is_no_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the convention says."""
    monkeypatch.delenv(trace_folder.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    folder = user_folder()
    assert folder is not None
    assert folder.path == tmp_path / ".cache" / "gap-export" / "traces"
