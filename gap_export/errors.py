"""The error tree: every failure says where it happened, what it is about and what to do next.

    GapExportError
    ├── RecipeError        a recipe or a command-line option that cannot work
    ├── CheckpointError    config.json, tokenizer or weights: missing, truncated, of another kind
    ├── TraceError         a component could not be turned into a graph
    ├── LintError          an exported graph would not carry gapped position ids
    ├── EngineError        TensorRT or TensorRT-RTX refused a graph, a profile or a device
    ├── BundleError        a bundle folder: damaged, foreign, or in the way
    ├── InputError         an image, an expression or a data file from the user
    ├── SessionError       a runtime refused to load or run a bundle
    ├── GateError          a run does not do what was required of it
    ├── OutputError        standard output takes nothing more
    └── MissingRequirementError   an optional dependency, memory, disk or device that is not there

The command line prints these without a traceback and exits with 2. Any other exception is a bug; please report it.
"""

from __future__ import annotations

import reprlib
from functools import partial
from typing import Any

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_SHOWN.maxlevel = 3


class GapExportError(Exception):
    """A failure the user can act on.

    Args:
        message: what went wrong, one sentence.
        subject: the thing it is about: a file, a tensor, an option, a node.
        hint: what to do next, one sentence.
    """

    stage = "gap-export"

    def __init__(self, message: str, *, subject: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.subject = subject
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """How to make it again on the other side of a process boundary."""
        return partial(type(self), subject=self.subject, hint=self.hint), (self.message,)

    def __str__(self) -> str:
        return f"{self.stage}: {self.subject}: {self.message} ({self.hint})"


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: an extension module that is interrupted while it is imported says that it cannot be imported."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def first_line(error: BaseException) -> str:
    """What a library said, for a message: the first line of it, or the error's type where it said nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: Any) -> str:
    """A value that comes from outside, for a message: as Python writes it, on one line, shortened where it is long."""
    return _SHOWN.repr(value)


def named(name: str) -> str:
    """A name that comes from outside, for a message: as it is, or as `shown` where it is long or cannot be printed."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def in_one_line(text: str, longest: int = 400) -> str:
    """Text from outside in a message: what cannot be printed is escaped, and what is too long ends in dots."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:longest])
    return shown if len(text) <= longest and len(shown) <= longest else f"{shown[: longest - 4]} ..."


class RecipeError(GapExportError):
    """A recipe or an option is unknown, out of range or contradicts another."""

    stage = "recipe"


class CheckpointError(GapExportError):
    """A checkpoint is missing, truncated, or of a family that is not supported."""

    stage = "checkpoint"


class TraceError(GapExportError):
    """A component could not be traced or translated into a graph."""

    stage = "trace"


class LintError(GapExportError):
    """A graph breaks a rule without which gapped position ids do not survive."""

    stage = "lint"


class EngineError(GapExportError):
    """TensorRT or TensorRT-RTX refused a graph, a profile, a precision or a device."""

    stage = "engine"


class BundleError(GapExportError):
    """A bundle folder is damaged, foreign, or in the way of a new one."""

    stage = "bundle"


class InputError(GapExportError):
    """An image, an expression or a data file that cannot be used."""

    stage = "input"


class SessionError(GapExportError):
    """A runtime refused to load or to run a graph of a bundle."""

    stage = "session"


class GateError(GapExportError):
    """A run differs more from the one that it is compared with than its thresholds allow."""

    stage = "gate"


class OutputError(GapExportError):
    """Standard output is closed, full, or a pipe whose reader has ended."""

    stage = "output"


class MissingRequirementError(GapExportError):
    """An optional dependency, memory, disk space or a device is not there."""

    stage = "environment"


class SessionWarning(UserWarning):
    """What a runtime does otherwise than its name says."""


class CheckpointWarning(UserWarning):
    """Something of a checkpoint is not followed, and may change what it answers; no reason to refuse it."""
