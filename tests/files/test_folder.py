"""Folders that appear whole or not at all, whatever ends the process that makes them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import BUNDLE
from gap_export.errors import BundleError
from gap_export.files import FolderLock, atomic_folder, check_folder, hidden, scratch_folder
from gap_export.files import folder as module


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


@pytest.fixture(params=[True, False], ids=["exchanged", "moved aside"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without a system that exchanges two folders in one step."""
    if not request.param:
        monkeypatch.setattr(module, "_exchanged", lambda *_: False)
    return bool(request.param)


def test_links_and_empty_folders(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link leads to is replaced, not the link; an empty folder stays, for somebody may work in it."""
    old_bundle(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("new")
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("link", "dangling", "empty/."):
        with atomic_folder(tmp_path / name) as scratch:
            (scratch / "a.json").touch()
    assert listing(tmp_path) == ["dangling", "empty", "link", "new", "real"]
    assert all(listing(tmp_path / name) == ["a.json"] for name in ("real", "new", "empty"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty").stat().st_ino == inode


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

    monkeypatch.setattr(module, "_exchanged", lambda *_: False)
    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises((BundleError, KeyboardInterrupt)), atomic_folder(target) as scratch:
        (scratch / "new").touch()
    assert listing(tmp_path) == ["out"]
    assert listing(target) == ["old"]


def test_what_is_checked_last_may_refuse(exchanges: bool, tmp_path: Path) -> None:
    target = old_bundle(tmp_path / "out")

    def refuse() -> None:
        raise BundleError("holds something now", subject="out", hint="")

    with pytest.raises(BundleError, match="holds something now"), atomic_folder(target, check=refuse):
        pass
    assert listing(tmp_path) == ["out"]
    assert listing(target) == ["old"]


# Processes that were killed

_KILLED = """
import os, signal, sys
from pathlib import Path
from gap_export.files import folder as module
target, moment = Path(sys.argv[1]), sys.argv[2]
rename, count = os.rename, 0

def killing(source, destination):
    global count
    rename(source, destination)
    count += 1
    if moment == f"rename {count}":
        os.kill(os.getpid(), signal.SIGKILL)

module.os.rename = killing
if "exchange" not in moment:
    module._exchanged = lambda *_: False
else:
    exchange = module._exchanged
    module._exchanged = lambda *both: (exchange(*both), os.kill(os.getpid(), signal.SIGKILL))
with module.atomic_folder(target) as scratch:
    (scratch / "new").write_text("new")
    if moment == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["inside", "rename 1", "rename 2", "exchange"])
@pytest.mark.parametrize("name", ["out", "out[1]", "o*t"])
def test_a_kill_at_any_moment_loses_nothing(moment: str, name: str, tmp_path: Path) -> None:
    target = old_bundle(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", _KILLED, target, moment], check=False)
    assert done.returncode == -9
    assert len(listing(tmp_path)) == (1 if moment == "rename 1" else 2)
    neighbours = [tmp_path / f".{name}.building-x", tmp_path / f".{name}1.building-x"]
    for neighbour in neighbours:
        neighbour.mkdir()
        (neighbour / "precious").touch()
    with scratch_folder(beside=target, purpose="other"):
        whole = listing(target)
    assert whole in (["old"], ["new"])
    assert whole == (["old"] if moment in ("inside", "rename 1") else ["new"])
    assert listing(tmp_path) == sorted([*(path.name for path in neighbours), name])


def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    with scratch_folder(beside=tmp_path / "out", purpose="building") as mine:
        (mine / "half").touch()
        with atomic_folder(tmp_path / "out") as other:
            (other / "a").touch()
        assert (mine / "half").exists()
    assert listing(tmp_path) == ["out"]


def test_a_half_filled_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are moved one by one into an empty folder that must stay; a kill between two of them leaves some."""
    target = tmp_path / "out"
    target.mkdir()
    code = """
import os, signal, sys
from pathlib import Path
from gap_export.files import folder as module
with module.atomic_folder(Path(sys.argv[1])) as scratch:
    for name in ("a", "b", "c.json"):
        (scratch / name).write_text(name)
    rename, left = os.rename, int(sys.argv[2])
    def killing(source, destination):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, destination)
    module.os.rename = killing
"""
    assert subprocess.run([sys.executable, "-c", code, target, "2"], check=False).returncode == -9
    assert listing(target) == ["a"]
    module.recover(target)
    assert listing(target) == ["a", "b", "c.json"]
    assert listing(tmp_path) == ["out"]


def test_what_is_all_that_is_left_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was moved aside and cannot be put back stays where it is."""
    monkeypatch.setattr(hidden, "_is_dead", lambda _: True)
    scratch = hidden.hidden_path(tmp_path / "out", "building")
    for name in ("fresh", "retired"):
        (scratch / name).mkdir(parents=True)
    (scratch / "retired" / "old").touch()
    (tmp_path / "out").mkdir()  # made by somebody in the meantime
    module.recover(tmp_path / "out")
    assert (scratch / "retired" / "old").exists()
    (tmp_path / "out").rmdir()
    module.recover(tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["old"]


@pytest.mark.parametrize(
    "changed",
    ["machine", "target", "pid", "purpose", "short"],
)
def test_a_folder_of_unknown_fate_is_left_alone(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine, for another target, or under a name that nobody can have given; the control is of a dead process."""
    monkeypatch.setattr(hidden, "_began", lambda _: 1)
    dead = hidden.hidden_path(tmp_path / "out", "building")
    monkeypatch.undo()
    name = dead.name
    owner = name.removeprefix(".out.").removesuffix(".building").split("-")
    if changed in ("machine", "target", "pid"):
        place = {"target": 0, "machine": 1, "pid": 3}[changed]
        owner[place] = "0" * len(owner[place])
        name = f".out.{'-'.join(owner)}.building"
    else:
        name = name.replace(".building", "") if changed == "purpose" else name.replace(owner[-1], "abc")
    for each in (dead.name, name):
        (tmp_path / each).mkdir()
    with scratch_folder(beside=tmp_path / "out", purpose="building"):
        pass
    assert listing(tmp_path) == [name]


@pytest.mark.parametrize("name", ["x" * 255, "\u732b" * 85, "name with\nline", "[1]*"])
def test_names_as_long_as_they_may_be(name: str, tmp_path: Path) -> None:
    with atomic_folder(tmp_path / name) as scratch:
        (scratch / "new").touch()
    assert listing(tmp_path) == [name]


def test_a_process_is_told_from_another_of_the_same_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = hidden._began(child.pid)
        assert began is not None
        mine = hidden._began(os.getpid())
        assert mine is not None
        assert began >= mine
    finally:
        child.communicate(b"\n")
    deadline = time.monotonic() + 10
    while hidden._began(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hidden._began(child.pid) is None


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be created"), atomic_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(BundleError, match="null byte"), atomic_folder(tmp_path / "null\0byte"):
        pass


def _entered(path: Path) -> None:
    with atomic_folder(path):
        pass


@pytest.mark.parametrize(
    "use", [lambda path: FolderLock(path), lambda path: check_folder(path, BUNDLE), _entered]
)
def test_a_link_that_leads_to_itself_is_the_users_error(use: Any, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(BundleError, match="link"):
        use(link)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
