"""Standard streams and the working folder: what a command needs of them, and what is said where they do not hold.

An answer that could not be written is no success: pipes are closed early, disks are full, and a service may start a command without any
streams at all. Nothing here can be left to the interpreter, which ends with a message of its own and code 120.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Sequence

from gap_export.errors import InputError, OutputError

_STDOUT = 1
_LOST = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF}
"""What writing to a stream says that takes no more."""
_EMPTY_OPTION = re.compile(r"(--[a-z-]+)=")


def check_surroundings(arguments: Sequence[str]) -> None:
    """Refuse before any work what would lose its result.

    Args:
        arguments: of the command line, without its name.

    Raises:
        GapExportError: standard output is closed, the working folder was deleted, or an argument is empty.
    """
    closed = _occupy()
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # for the rest of the process
    if _STDOUT in closed or sys.stdout is None:
        raise OutputError(
            "is closed, and the answer would be lost",
            subject="standard output",
            hint=f"redirect it: > FILE, or > {os.devnull}",
        )
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what stands in for it may have none
    if reconfigure is not None and sys.stdout.errors == "strict":
        # Names of files and texts of data sets are in any encoding, and the work is done.
        reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            "was deleted, or cannot be read",
            subject="the working folder",
            hint="change to another one: cd",
        ) from error
    for place, argument in enumerate(arguments):
        option = _EMPTY_OPTION.fullmatch(argument)
        if argument == "" or option is not None:
            before = option[1] if option is not None else arguments[place - 1] if place else "the command"
            raise InputError(
                "is empty", subject=f"the argument after {before}", hint="is a variable of the shell unset?"
            )


def finish(code: int) -> tuple[int, OSError | None]:
    """Write what is still held back.

    Args:
        code: that the command ended with.

    Returns:
        The exit code, and why standard output could not be written where it could not.
    """
    lost: OSError | None = None
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            discard(stream)
            lost = error if stream is sys.stdout else lost
        except ValueError:  # closed by somebody
            continue
    return (code if lost is None else 2), lost


def discard(stream: object) -> None:
    """Let a stream lead nowhere, so that what it still holds is not written at the end of the process, in vain again."""
    fileno = getattr(stream, "fileno", None)
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fileno() if fileno is not None else _STDOUT)
        os.close(nowhere)


def is_lost_output(error: OSError) -> bool:
    """Whether a system error is that of a stream; functions that write files name them."""
    return error.errno in _LOST and error.filename is None


def _occupy() -> set[int]:
    """Open the descriptors 0 to 2 where they are closed: the next files would get these numbers, and what is printed with them."""
    closed = set()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.add(descriptor)
            os.open(os.devnull, os.O_RDWR)
    return closed
