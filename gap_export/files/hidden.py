"""Hidden names beside an output, under which it is made: each says what it is for and which process made it.

    .NAME.TARGET-MACHINE-BOOT-PROCESS-BEGAN-RANDOM.PURPOSE

The record of the owner is the name itself, so that there is no instant at which something lies there and does not say whose it is.
What a process left that is known to be dead is found again by it; of other machines, and of anything else that begins alike, nothing is known.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LONGEST_NAME = 100
"""Bytes of the target's name that are repeated, so that the whole is a name that file systems take."""
_OWNER = (
    r"(?P<target>[0-9a-f]{16})-(?P<machine>[0-9a-f]{16})-(?P<boot>[0-9a-f]{16})"
    r"-(?P<pid>[1-9][0-9]*)-(?P<began>[0-9]*)-[0-9a-f]{16}"
)
HIDDEN = rf"\.[^/]*\.{_OWNER}\.[a-z]+"
"""Pattern of such names."""
_HIDDEN = re.compile(HIDDEN)

WRITING = "writing"
"""Purpose of a file that is to replace another."""
HALF_WRITTEN = re.compile(rf"(.*/)?\.[^/]+\.{_OWNER}\.{WRITING}", re.DOTALL)
"""Paths of what a killed process leaves of a file."""


def hidden_path(target: Path, purpose: str) -> Path:
    """A name beside a target that nothing has and that cannot be guessed.

    Args:
        target: file or folder to be made.
        purpose: in a word of small letters.
    """
    pid = os.getpid()
    began = _began(pid)
    owner = f"{_target(target)}-{_machine()}-{_boot()}-{pid}-{'' if began is None else began}-{secrets.token_hex(8)}"
    return target.with_name(f".{shortened(target.name)}.{owner}.{purpose}")


def abandoned(target: Path) -> Iterator[Path]:
    """What processes that are known to have ended left under hidden names for a target."""
    with suppress(OSError, ValueError):  # a folder that is not there or may not be read
        for name in os.listdir(target.parent):
            found = _HIDDEN.fullmatch(name)
            if found is not None and found["target"] == _target(target) and _is_dead(found):
                yield target.with_name(name)


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, but for what killed processes left of files in it."""
    return [path for path in folder.iterdir() if not HALF_WRITTEN.fullmatch(path.name)]


def shortened(name: str) -> str:
    """The beginning of a name, for a longer one."""
    return os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", "ignore")


def _is_dead(owner: re.Match[str]) -> bool:
    """Whether a process is known to have ended; of another machine's nothing is known."""
    if owner["machine"] != _machine():
        return False
    if owner["boot"] != _boot():
        return True
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return owner["began"] != "" and int(owner["began"]) != _began(pid)


def _target(path: Path) -> str:
    return _hash(path.name)


def _machine() -> str:
    """Of the machine, and of the numbering of its processes: containers have their own, and cannot see each other's."""
    numbering = ""
    with suppress(OSError):
        numbering = os.readlink("/proc/self/ns/pid")
    return _hash(f"{platform.node()} {numbering}")


def _boot() -> str:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _hash(boot)


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None where that cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        # (The name in parentheses may hold blanks and parentheses.)
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
