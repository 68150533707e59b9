"""What a command may find around it: streams that are closed, full or of another encoding, folders that are gone, disks without space."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.child import Environment
from tests.hostile.judge import ACCEPTED, NOT_ZERO

_NEW_MOUNTS, _PRIVATE = 0x20000, 1 << 18 | 1 << 14
_READ_ONLY = 1


@dataclass(frozen=True)
class Surroundings:
    """An environment, and what must come of a harmless call in it.

    Attributes:
        environment: as the child enters it.
        expect: `ACCEPTED`, `NOT_ZERO`, or empty where either is right.
        make: changes the working folder first.
        as_json: whether the call is to give JSON.
        says_so: whether a refusal can be read.
    """

    environment: Environment
    expect: str = ""
    make: Callable[[Path], bool] = lambda _: True
    as_json: bool = False
    says_so: bool = True


def _to_closed() -> None:
    """As `>&-` leaves it."""
    os.close(1)


def _error_to_closed() -> None:
    os.close(2)


def _both_closed() -> None:
    _to_closed()
    _error_to_closed()


def _to_full() -> None:
    """Standard output to the device that is always full."""
    _instead(1, os.open("/dev/full", os.O_WRONLY))


def _error_to_full() -> None:
    _instead(2, os.open("/dev/full", os.O_WRONLY))


def _to_broken_pipe() -> None:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    _instead(1, writer)


def _error_to_broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    _instead(2, writer)


def _instead(descriptor: int, other: int) -> None:
    os.dup2(other, descriptor)
    os.close(other)


def _input_closed() -> None:
    os.close(0)


def _without_folder() -> None:
    """The working folder is deleted while the command begins."""
    shutil.rmtree(os.getcwd())


def _small_files() -> None:
    """No file may grow beyond some kilobytes, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))


def _variables(**given: str) -> Callable[[], None]:
    return lambda: os.environ.update(given)


def mount(folder: str, *, full: bool) -> Callable[[], None]:
    """A file system of its own in `folder`, seen by the child alone: full, or read-only.

    Args:
        folder: in the working folder; made.
        full: whether it is that.
    """

    def enter() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        target = os.fsencode(os.path.abspath(folder))
        os.makedirs(target, exist_ok=True)

        def check(result: int) -> None:
            if result:
                raise OSError(ctypes.get_errno(), "mount")

        check(libc.unshare(_NEW_MOUNTS))
        check(libc.mount(None, b"/", None, _PRIVATE, None))
        check(libc.mount(b"tmpfs", target, b"tmpfs", 0 if full else _READ_ONLY, b"size=16k"))
        if full:
            with open(os.path.join(target, b"filler"), "wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(1024))
                except OSError:
                    pass

    return enter


def may_mount(folder: Path) -> bool:
    """Whether this machine lets a process mount; tried in one that ends."""
    child = os.fork()
    if child == 0:
        try:
            mount(str(folder / "tried"), full=False)()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _file_as_cache(work: Path) -> bool:
    (work / "cache").write_text("x")
    return True


ENVIRONMENTS: tuple[Surroundings, ...] = (
    Surroundings(Environment("output closed", _to_closed), NOT_ZERO),
    Surroundings(Environment("output full", _to_full), NOT_ZERO),
    Surroundings(Environment("output full, JSON", _to_full), NOT_ZERO, as_json=True),
    Surroundings(Environment("output to a broken pipe", _to_broken_pipe)),
    Surroundings(Environment("output to a broken pipe, JSON", _to_broken_pipe), as_json=True),
    Surroundings(Environment("error closed", _error_to_closed), ACCEPTED),
    Surroundings(Environment("error full", _error_to_full), ACCEPTED),
    Surroundings(Environment("error to a broken pipe", _error_to_broken_pipe), ACCEPTED),
    Surroundings(Environment("output and error closed", _both_closed), NOT_ZERO, says_so=False),
    Surroundings(Environment("input closed", _input_closed), ACCEPTED),
    Surroundings(Environment("ASCII", encoding="ascii"), ACCEPTED),
    Surroundings(Environment("Latin-1", encoding="latin-1"), ACCEPTED),
    Surroundings(Environment("Latin-1, JSON", encoding="latin-1"), ACCEPTED, as_json=True),
    Surroundings(Environment("code page 437", encoding="cp437"), ACCEPTED),
    Surroundings(Environment("working folder deleted", _without_folder)),
    Surroundings(Environment("files of 2,500 bytes at most", _small_files)),
    Surroundings(Environment("one column", _variables(COLUMNS="1")), ACCEPTED),
    Surroundings(Environment("no columns", _variables(COLUMNS="0", LINES="0")), ACCEPTED),
    Surroundings(
        Environment("odd variables", _variables(TERM="[/red]", LANG="x", LC_ALL="x", COLUMNS="x")), ACCEPTED
    ),
    Surroundings(Environment("no home", _variables(HOME="/absent")), ACCEPTED),
    Surroundings(
        Environment("a file as trace cache", _variables(GAP_EXPORT_TRACE_CACHE="cache")),
        ACCEPTED,
        _file_as_cache,
    ),
)
