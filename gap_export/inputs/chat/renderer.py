"""Rendering a chat template in a process of its own, with a limit of time, of memory and of length.

A template comes with a checkpoint and is a program: it may loop for ever, ask for terabytes, or look for a way out of its sandbox. Here
each of these is a sentence, and the next conversation is rendered by a fresh process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gap_export
from gap_export.errors import GapExportError, InputError, MissingRequirementError, first_line, in_one_line
from gap_export.inputs.chat import child
from gap_export.inputs.chat.limits import DEFAULT_LIMITS, Limits

_START_SECONDS = 60.0
"""Until the process is ready; a tenth of a second where nothing else runs."""
_CHUNK = 1 << 16
_BYTES_PER_CHARACTER = 12
"""At most, in JSON: a surrogate pair, escaped."""
_LONGEST_FAULT = 1 << 16
_START = "import sys; sys.path += sys.argv[1:]; from gap_export.inputs.chat.child import main; main()"
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "TZDIR")
"""Variables that Python needs to start, and that the hour of `strftime_now` depends on."""
_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})

_SUBJECT = "chat template"
_OTHER_TEMPLATE = "give another chat template"
_FAULTS = {
    "syntax": ("is not valid Jinja{line}: {said}", "correct it, or give another"),
    "raised": ("refuses the conversation: {said}", "change the conversation as it says"),
    "security": ("does what no template may{line}: {said}", _OTHER_TEMPLATE),
    "undefined": ("needs what it is not given{line}: {said}", _OTHER_TEMPLATE),
    "memory": ("took more than {memory:.0f} MiB of memory", _OTHER_TEMPLATE),
    "time": ("took more than {seconds:g} s", _OTHER_TEMPLATE),
    "long": ("made a text of more than {characters} characters", "shorten the conversation, or give another"),
    "deep": ("is nested too deeply, or calls itself without end{line}", _OTHER_TEMPLATE),
    "text": (
        "made a text that cannot be read: {said}",
        "leave such characters out of the conversation, or give another",
    ),
    "loader": ("asks for another template{line}", "write what it includes or imports into it"),
    "failed": ("failed{line}: {said}", _OTHER_TEMPLATE),
    "ended": ("ended the process that renders it: {said}", _OTHER_TEMPLATE),
    "answer": ("brought an answer that is none from the process that renders it", _OTHER_TEMPLATE),
}
"""Kind of fault -> message and hint."""


class TemplateSaid(Exception):
    """What the error of a template says: words of Jinja, or of whoever wrote the template, and none of this package."""


class TookTooMuch(InputError):
    """A chat template takes more time or memory than it may, and would do so again."""


class Renderer:
    """A chat template, and a process that renders it.

    The process is started at first use, and another one after a template took too much. Threads may share a renderer. After `close`,
    and when the object is no longer used, there is no process.

    Args:
        template: in Jinja, as `chat_template.jinja` of a checkpoint.
        variables: what the template is given besides the conversation: `bos_token`, say. Of JSON's types.
        limits: of every round trip.

    Raises:
        InputError: the template is too long, or a variable is of another type.
    """

    def __init__(
        self, template: str, variables: Mapping[str, Any] = _NO_VARIABLES, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        if len(template) > limits.template_characters:
            raise InputError(
                f"has {len(template)} characters, and may have {limits.template_characters}",
                subject=_SUBJECT,
                hint=_OTHER_TEMPLATE,
            )
        self._limits = limits
        setup = {"template": template, "variables": dict(variables), **limits.model_dump()}
        self._setup = _framed(setup, "its variables")
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._end: weakref.finalize[Any, Renderer] | None = None

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of one conversation.

        Args:
            messages: as the template wants them, of JSON's types.
            add_generation_prompt: whether the text ends with what an answer begins with.

        Raises:
            InputError: the template is not valid, refuses the conversation, fails, or takes more than its limits.
            MissingRequirementError: the process cannot be started.
        """
        (text,) = self.render_all([(messages, add_generation_prompt)])
        return text

    def render_all(self, conversations: Sequence[tuple[list[dict[str, Any]], bool]]) -> list[str]:
        """The texts of several conversations, in one round trip.

        Args:
            conversations: each its messages and whether to add the generation prompt.

        Returns:
            one text per conversation.

        Raises:
            InputError: the template is not valid, refuses one of them, fails, or takes more than its limits.
            MissingRequirementError: the process cannot be started.
        """
        request = _framed(list(conversations), "the conversation")
        longest = len(conversations) * self._limits.characters * _BYTES_PER_CHARACTER + _LONGEST_FAULT
        with self._lock:
            try:
                answer = self._started().exchange(request, self._limits.seconds, longest)
            except _Failed as failed:
                self._stop()
                raise self._error(failed.kind, None, failed.said) from TemplateSaid(in_one_line(failed.said))
            except BaseException:  # Ctrl-C, say: an answer may come that belongs to no later request
                self._stop()
                raise
            if answer.get("kind") == "memory":  # it has ended itself
                self._stop()
        return self._texts(answer, len(conversations))

    def close(self) -> None:
        """End the process, if there is one; a later `render` starts another."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> _Process:
        """The process, ready; that of another process, which this one was forked from, is left to it."""
        if self._process is None or self._process.owner != os.getpid():
            self._stop()
            self._process = _Process(self._setup)
            self._end = weakref.finalize(self, self._process.stop)
            self._process.wait_until_ready()
        return self._process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _texts(self, answer: dict[str, Any], count: int) -> list[str]:
        """What was asked for, of an answer that a template may have had a hand in."""
        kind, texts = answer.get("kind"), answer.get("texts")
        if isinstance(kind, str) and kind in _FAULTS:
            said = str(answer.get("said"))
            raise self._error(kind, answer.get("line"), said) from TemplateSaid(in_one_line(said))
        if (
            not isinstance(texts, list)
            or len(texts) != count
            or not all(isinstance(text, str) for text in texts)
        ):
            raise self._error("answer", None, "")
        return texts

    def _error(self, kind: str, line: Any, said: str) -> InputError:
        message, hint = _FAULTS[kind]
        error = TookTooMuch if kind in ("time", "memory") else InputError
        return error(
            message.format(
                said=in_one_line(said),
                line=f" in line {line}" if isinstance(line, int) else "",
                seconds=self._limits.seconds,
                memory=self._limits.memory_bytes / 2**20,
                characters=self._limits.characters,
            ),
            subject=_SUBJECT,
            hint=hint,
        )


class _Failed(Exception):
    """A round trip came to nothing: its kind, one of `_FAULTS`, and what is to be said."""

    def __init__(self, kind: str, said: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.said = said


class _Process:
    """A running `child`.

    Args:
        setup: its first frame.

    Raises:
        MissingRequirementError: it cannot be started.
    """

    def __init__(self, setup: bytes) -> None:
        self.owner = os.getpid()
        self._setup = setup
        # Isolated, and without what `site` does: it finds this package and Jinja where this process has them, and nothing else.
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START, *_import_folders()]
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal does not reach it
            )
        except (OSError, ValueError) as error:
            raise _cannot_start(first_line(error)) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._stdin, self._stdout):
            os.set_blocking(descriptor, False)

    def wait_until_ready(self) -> None:
        """Tell it the template, and wait for its answer.

        Raises:
            MissingRequirementError: there is none.
        """
        try:
            answer = self.exchange(self._setup, _START_SECONDS, _LONGEST_FAULT)
        except _Failed as failed:
            said = failed.said or f"it is not ready after {_START_SECONDS:g} s"
            raise _cannot_start(said) from None
        if answer:
            raise _cannot_start(str(answer.get("said")))

    def exchange(self, request: bytes, seconds: float, longest: int) -> dict[str, Any]:
        """Send a frame and read its answer.

        Args:
            request: the frame.
            seconds: until the answer is there.
            longest: bytes of an answer.

        Raises:
            _Failed: there is none.
        """
        deadline = time.monotonic() + seconds
        rest, answer, wanted = memoryview(request), bytearray(), child.HEADER_BYTES
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            while len(answer) < wanted:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _Failed("time")
                for key, _ in selector.select(left):
                    if key.fd == self._stdout:
                        answer += self._read(wanted - len(answer))
                    else:
                        rest = self._write(rest)
                        if not rest:
                            selector.unregister(self._stdin)
                if len(answer) == wanted == child.HEADER_BYTES:
                    wanted += int.from_bytes(answer, "big")
                    if wanted > longest:
                        raise _Failed("answer")
        try:
            found = json.loads(answer[child.HEADER_BYTES :])
        except (ValueError, RecursionError):
            raise _Failed("answer") from None
        if not isinstance(found, dict):
            raise _Failed("answer")
        return found

    def stop(self) -> None:
        """End it, whatever it does, and leave nothing of it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def _read(self, wanted: int) -> bytes:
        try:
            found = os.read(self._stdout, min(wanted, _CHUNK))
        except BlockingIOError:
            return b""
        if not found:
            raise self._ended()
        return found

    def _write(self, rest: memoryview) -> memoryview:
        try:
            return rest[os.write(self._stdin, rest[:_CHUNK]) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:
            return memoryview(b"")  # it may have answered before it ended

    def _ended(self) -> _Failed:
        """How it did, now that its output has ended."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return _Failed("answer")
        if code == -getattr(signal, "SIGXCPU", 0):
            return _Failed("time")
        if code < 0:
            return _Failed("ended", f"signal {-code}")
        return _Failed("ended", f"exit code {code}")


def _import_folders() -> list[str]:
    """Absolute paths of the folders, or archives, that this package and Jinja are imported from; neither is imported for it."""
    folders = [os.path.dirname(os.path.dirname(os.path.abspath(gap_export.__file__)))]
    for name in ("jinja2", "markupsafe"):
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None or found.origin is None:
            raise MissingRequirementError(
                "is needed for chat templates and not installed", subject=name, hint="pip install jinja2"
            )
        folders.append(os.path.dirname(os.path.dirname(os.path.abspath(found.origin))))
    return list(dict.fromkeys(folders))


def _cannot_start(said: str) -> GapExportError:
    return MissingRequirementError(
        f"cannot be started: {in_one_line(said)}",
        subject="process that renders chat templates",
        hint="it takes another Python process, 50 MB of memory, and the package jinja2",
    )


def _framed(content: Any, what: str) -> bytes:
    try:
        return child.frame(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot be given {what}: {in_one_line(first_line(error))}",
            subject=_SUBJECT,
            hint="give text, numbers, lists and mappings",
        ) from error
