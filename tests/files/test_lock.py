"""One process at a time in an output folder, whatever ends the one that was there."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gap_export.errors import BundleError
from gap_export.files import FolderLock
from gap_export.files import lock as module

HOLDER = """
import sys
from pathlib import Path
from gap_export.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_waits_outside_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    process = holder(folder)
    try:
        with pytest.raises(BundleError, match=f"is being written by process {process.pid} on ") as caught:
            FolderLock(folder)
        assert "wait until it has finished" in caught.value.hint
    finally:
        process.kill()
        process.communicate()
    with FolderLock(folder):
        pass
    assert list(tmp_path.rglob("*")) == [folder.parent]


def test_it_is_released_once_and_by_itself(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(BundleError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path / "out")
    lock.release()
    second = FolderLock(tmp_path / "out")
    lock.release()  # no longer its own
    with pytest.raises(BundleError, match="is being written"):
        FolderLock(tmp_path / "out")
    del second
    FolderLock(tmp_path / "out").release()
    assert list(tmp_path.iterdir()) == []


def test_links_to_a_folder_are_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with FolderLock(tmp_path / "real"), pytest.raises(BundleError, match="is being written"):
        FolderLock(tmp_path / "link")


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / ".out.lock").symlink_to("precious")
    with pytest.raises(BundleError, match="cannot be created"):
        FolderLock(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "old"


def test_a_lock_that_its_holder_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, the holder ends and another takes a new file: both must not be inside."""
    first, flock = FolderLock(tmp_path / "out"), fcntl.flock
    others: list[FolderLock] = []

    def late(descriptor: int, operation: int) -> None:
        if not others:
            monkeypatch.setattr(module.fcntl, "flock", flock)
            first.release()
            others.append(FolderLock(tmp_path / "out"))
        flock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with pytest.raises(BundleError, match="is being written"):
        FolderLock(tmp_path / "out")
    assert len(others) == 1


def test_where_there_are_no_locks_nothing_is_taken_over_by_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", none)
    with FolderLock(tmp_path / "out"), pytest.raises(BundleError, match=f"process {os.getpid()}") as caught:
        FolderLock(tmp_path / "out")
    assert f"delete {tmp_path / '.out.lock'}" in caught.value.hint
    FolderLock(tmp_path / "out").release()


@pytest.mark.parametrize(
    "content", ["my notes\n", "process 12 on\n", "\0" * 9, "process 1 on me since 2020\nmore"]
)
def test_a_file_of_that_name_that_is_no_lock_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text(content)
    with pytest.raises(BundleError, match="is there and is no lock of gap-export"):
        FolderLock(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == content


def test_what_another_machine_left_is_not_taken_over(tmp_path: Path) -> None:
    said = f"process 12 on another since {module._now()}\n"
    (tmp_path / ".out.lock").write_text(said)
    with pytest.raises(BundleError, match="is being written by process 12 on another") as caught:
        FolderLock(tmp_path / "out")
    assert f"delete {tmp_path / '.out.lock'}" in caught.value.hint
    assert (tmp_path / ".out.lock").read_text() == said


@pytest.mark.parametrize(
    "content", ["", f"process 12 on {platform.node()} since {module._now()}\n"], ids=["empty", "said"]
)
def test_what_a_killed_process_left_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text(content)
    with FolderLock(tmp_path / "out") as lock:
        assert lock.path.read_text().startswith(f"process {os.getpid()} on")
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_when_what_follows_fails(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(KeyError), lock.kept():
        raise KeyError
    assert list(tmp_path.iterdir()) == []
