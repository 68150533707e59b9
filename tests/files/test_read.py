"""The one reader of files from outside."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.errors import CheckpointError, GapExportError, InputError
from gap_export.files import (
    FileKind,
    check_readable,
    is_file,
    is_folder,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)
from gap_export.files.kinds import FILE_KINDS
from gap_export.files.read import DEEPEST, LONGEST_NUMBER

SMALL = FileKind("a note", 100, InputError, "write it again")
ANY = FileKind("a note", None, InputError, "write it again")


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices cannot be made here")


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a pipe"),
        (_socket, "is a socket"),
        (_device, "is a device"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many"),
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.write_bytes(b"x" * 101), "has at most 100.0 B"),
    ],
)
@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml, check_readable])
def test_what_is_no_small_regular_file_is_refused(
    make: Callable[[Path], None], said: str, read: Callable[[Path, FileKind], object], tmp_path: Path
) -> None:
    path = tmp_path / "given"
    make(path)
    with pytest.raises(InputError, match=said) as refused:
        read(path, SMALL)
    assert refused.value.subject == str(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a/" * 3000, "\udcff"])
def test_names_that_no_file_can_have_are_no_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert not is_file(path)
    assert not is_folder(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_bytes(path, ANY)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    link = tmp_path / "link"
    link.symlink_to("file")
    assert read_text(link, SMALL) == "text"
    assert is_file(link)


def test_a_file_that_grows_while_it_is_read_is_bounded_too() -> None:
    with pytest.raises(InputError, match="is too large"):
        read_bytes(
            Path("/proc/self/status"), FileKind("a note", 10, InputError, "")
        )  # has no size to the system


def test_what_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo \xff")
    with pytest.raises(InputError, match="byte 0xff at column 5") as refused:
        read_text(path, SMALL)
    assert refused.value.subject.endswith("note, line 2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * (LONGEST_NUMBER + 1), "has 1001 digits"),
        ("9" * 100_000, "has 100000 digits"),
        ("1e999", "larger than any number"),
        ("-1e999", "larger than any number"),
        ("NaN", "no number in JSON"),
        ("[Infinity]", "no number in JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("", "is not JSON"),
        ("[1,", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ("[1] 2", "is not JSON"),
    ],
)
def test_json_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_json(text, "note", ANY)


def test_json_at_its_bounds_is_read() -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(deep, "note", ANY)) == deep
    assert parse_json("9" * LONGEST_NUMBER, "note", ANY) == 10**LONGEST_NUMBER - 1
    assert parse_json('{"a": 1, "a": 1}', "note", ANY) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x", "alias"),
        ("a: &a [x]\n" + "\n".join(f"b{n}: &b{n} [*a, *a]" for n in range(3)), "alias"),
        ("a: {<<: {b: 1}}", "no plain text"),
        ("<<: {b: 1}", "no plain text"),
        ("a: 1\na: 2", "a stands twice"),
        ("? [1, 2]\n: 3", "no plain text"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: 9999-99-99", "cannot be read as YAML"),
        ("a: " + "9" * 5000, "cannot be read as YAML"),
        ("a: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("\x01", "is not YAML"),
        ("--- 1\n--- 2", "is not YAML"),
    ],
)
def test_yaml_that_is_not_plain_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_yaml(path, ANY)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_VALUES)
def test_what_json_can_say_is_read_as_it_was_written(value: object) -> None:
    assert parse_json(json.dumps(value), "note", ANY) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(InputError):
        parse_json(content, "note", ANY)


def test_every_kind_says_what_to_do() -> None:
    assert len({kind.name for kind in FILE_KINDS}) == len(FILE_KINDS)
    for kind in FILE_KINDS:
        assert issubclass(kind.error, GapExportError)
        assert kind.hint
    assert CheckpointError in {kind.error for kind in FILE_KINDS}
