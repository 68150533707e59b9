"""What may lie at a path that a command reads or writes, and names that paths may have."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.hostile.judge import REFUSED

Make = Callable[[Path, str], bool]
"""Puts something of a name into the working folder; returns False where this machine does not let it."""


@dataclass(frozen=True)
class Node:
    """Something at a path.

    Attributes:
        name: for the table.
        make: it.
        typed: what is given on the command line, relative to the working folder; `*` is the name that it is made under.
        expect: what must come of it: `REFUSED`, or empty where either is right.
    """

    name: str
    make: Make
    typed: str = "*"
    expect: str = REFUSED

    def given(self, place: str) -> str:
        """What is typed where it is made under that name."""
        return place if self.typed == "*" else self.typed.replace("*", place)


def _nothing(_: Path, __: str) -> bool:
    return True


def _file(content: bytes = b"x", name: str = "") -> Make:
    def make(work: Path, place: str) -> bool:
        (work / (name or place)).parent.mkdir(parents=True, exist_ok=True)
        (work / (name or place)).write_bytes(content)
        return True

    return make


def _folder(name: str = "", **files: str) -> Make:
    def make(work: Path, place: str) -> bool:
        (work / (name or place)).mkdir()
        for file, content in files.items():
            (work / (name or place) / file.replace("__", ".")).write_text(content)
        return True

    return make


def _link_to(target: str) -> Make:
    def make(work: Path, place: str) -> bool:
        (work / place).symlink_to(target.replace("*", place))
        return True

    return make


def _behind_link(make: Make) -> Make:
    """What is made, as `there`, and a link to it under the name that is given."""

    def both(work: Path, place: str) -> bool:
        (work / place).symlink_to("there")
        return make(work, "there")

    return both


def _fifo(work: Path, place: str) -> bool:
    os.mkfifo(work / place)
    return True


def _socket(work: Path, place: str) -> bool:
    before = os.getcwd()
    os.chdir(work)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place)
    finally:
        os.chdir(before)
    return True


def _device(minor: int) -> Make:
    """One of memory's: 3 swallows everything, 5 is endless, 7 is full."""

    def make(work: Path, place: str) -> bool:
        try:
            os.mknod(work / place, 0o600 | stat.S_IFCHR, os.makedev(1, minor))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                return False
            raise
        return True

    return make


def _closed(work: Path, place: str) -> bool:
    """A file that may not be read; a superuser may all the same."""
    (work / place).write_bytes(b"x")
    (work / place).chmod(0)
    return os.geteuid() != 0


ODD_NAMES = (
    "[/red]",
    "[bold]x[/]",
    "a b",
    "-x",
    "--help",
    "a\nb",
    "a\x1b[31mb",
    ":smile:",
    "$HOME",
    "~x",
    "%s",
    "?",
    "<b>x</b>",
    "ünïcödé",
    "\U0001f600",
    os.fsdecode(b"latin-\xe9"),
    os.fsdecode(b"\xff\xfe"),
    "a.b.c.",
    "...",
    "x" * 250,
)

_ANYWHERE = (
    Node("empty text", _nothing, ""),
    Node("below a file", _file(), "*/x"),
    Node("name too long", _nothing, "x" * 300),
    Node("path too long", _nothing, "x/" * 3000 + "x"),
    Node("null byte", _nothing, "a\0b"),
    Node("fifo", _fifo),
    Node("socket", _socket),
    Node("null device", _device(3)),
    Node("endless device", _device(5)),
    Node("full device", _device(7)),
    Node("link to itself", _link_to("*")),
    Node("link to a fifo", _behind_link(_fifo)),
    Node("link to a device", _behind_link(_device(5))),
)
_ABSENT = (
    Node("blank", _nothing, " "),
    Node("absent", _nothing),
    Node("in no folder", _nothing, "absent/*"),
    Node("tilde", _nothing, "~"),
    Node("dangling link", _link_to("absent")),
)
_EDITOR = '{"editor.fontSize": 12}'
_APP = json.dumps({"name": "app", "schema_version": 2, "icons": []})

TO_READ: tuple[Node, ...] = (
    *_ANYWHERE,
    *_ABSENT,
    Node("the folder above", _nothing, ".."),
    Node("the working folder", _nothing, ".", ""),
    Node("unreadable", _closed),
    Node("empty file", _file(b"")),
    Node("a file of another kind", _file(b"x" * 100)),
    Node("empty folder", _folder()),
    Node("folder with a slash", _folder(), "*/"),
    Node("web application", _folder(manifest__json=_APP)),
    Node("settings of an editor", _folder(settings__json=_EDITOR)),
    *(Node(f"absent, named {name!a}", _nothing, name) for name in ODD_NAMES),
    *(Node(f"a text file named {name!a}", _file(name=name), name) for name in ODD_NAMES[:8]),
)
"""Nearly all of them are refused where a file or a folder of ours is asked for."""

TO_WRITE: tuple[Node, ...] = (
    *_ANYWHERE,
    *(replace(node, expect="") for node in _ABSENT),
    Node("a foreign file", _file(b"somebody's")),
    Node("a foreign folder", _folder(notes__txt="somebody's")),
    Node("an empty folder", _folder(), expect=""),
    Node("an empty folder with a slash", _folder(), "*/", ""),
    Node("link to a foreign file", _behind_link(_file(b"somebody's"))),
    Node("link to a foreign folder", _behind_link(_folder(notes__txt="x"))),
    Node("web application", _folder(manifest__json=_APP, index__html="<p>")),
    Node("settings of an editor", _folder(settings__json=_EDITOR)),
    Node("provenance of something else", _folder(provenance__json='{"source": "x"}')),
    Node("a folder named as its scratch folder", _folder(".out.building-x", notes__txt="x"), "out", ""),
    Node("a file named as its lock", _file(name=".out.lock"), "out", ""),
    *(Node(f"named {name!a}", _nothing, name, "") for name in ODD_NAMES),
    *(Node(f"below {name!a}", _nothing, f"{name}/*", "") for name in ODD_NAMES[:6]),
)
"""What lies there is somebody's: but for new names and empty folders, all are refused."""
