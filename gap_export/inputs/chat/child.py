"""The process that renders a chat template: `Renderer` starts it, asks it on standard input and reads standard output.

Both carry frames: the length in 8 bytes, big-endian, and that many bytes of JSON. The first tells the template and its limits, and is
answered when the process is ready; each later one asks for texts. An answer has `texts`, or what failed as `kind`, `line` and `said`.
The process limits itself, and ends with its input. It imports little, so that it is there after a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import TracebackType
from typing import Any, BinaryIO

HEADER_BYTES = 8
_LONGEST_SAID = 1000
"""Characters of what an error says; a template can have it say millions."""


def frame(content: Any) -> bytes:
    """A frame.

    Args:
        content: of JSON's types; texts may have lone surrogates.

    Raises:
        TypeError, ValueError, RecursionError: it cannot be written as JSON.
    """
    written = json.dumps(content).encode()
    return len(written).to_bytes(HEADER_BYTES, "big") + written


_OUT_OF_MEMORY = frame({"kind": "memory", "line": None, "said": ""})
"""Made before there is none left."""


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    requests, answers = sys.stdin.buffer, sys.stdout.fileno()
    setup = _read(requests)
    if setup is None:
        return
    try:
        from gap_export.inputs.chat import template_language

        _limit_memory(setup["memory_bytes"])
    except ImportError as error:
        _write(answers, frame(_fault("import", error)))
        return
    _write(answers, frame({}))

    template = None
    while True:
        try:
            request = _read(requests)
            if request is None:
                return
            _limit_time(setup["seconds"])
            try:
                if template is None:
                    template = template_language.compiled(setup["template"])
                texts = [
                    template_language.rendered(
                        template,
                        messages,
                        add_generation_prompt=add_generation_prompt,
                        variables=setup["variables"],
                        characters=setup["characters"],
                    )
                    for messages, add_generation_prompt in request
                ]
                answer: dict[str, Any] = _fault_of_texts(texts) or {"texts": texts}
            except MemoryError:
                raise
            except Exception as error:
                answer = _fault_of(error)
            written = frame(answer)
        except MemoryError:
            _write(answers, _OUT_OF_MEMORY)
            return  # what is left of it is not worth keeping: the next request starts afresh
        _write(answers, written)


def _read(source: BinaryIO) -> Any:
    """What the next frame has; None where there is none."""
    header = source.read(HEADER_BYTES)
    content = source.read(int.from_bytes(header, "big"))
    return json.loads(content) if content else None


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BrokenPipeError:  # the parent has ended
            os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    """Also no core dumps, and no byte into any file."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, limit in (("RLIMIT_AS", memory_bytes), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0)):
        kind = getattr(resource, name)
        _, most = resource.getrlimit(kind)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        try:
            resource.setrlimit(kind, (limit, most))
        except (ValueError, OSError):  # macOS knows the name alone
            continue


def _limit_time(seconds: float) -> None:
    """Of the processor, for a request that begins now: the parent's deadline comes first, unless the parent has ended."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(time.process_time() + seconds) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most)
    )


def _fault_of_texts(texts: list[str]) -> dict[str, Any] | None:
    """What no tokenizer can take."""
    for text in texts:
        if "\0" in text:
            return {"kind": "text", "line": None, "said": "a NUL character"}
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return {"kind": "text", "line": None, "said": f"half of a surrogate pair ({text[error.start]!a})"}
    return None


def _fault_of(error: Exception) -> dict[str, Any]:
    """What went wrong in a template, by kind."""
    from jinja2 import exceptions

    from gap_export.inputs.chat import template_language

    if isinstance(error, exceptions.TemplateSyntaxError):
        return {"kind": "syntax", "line": error.lineno, "said": str(error.message)[:_LONGEST_SAID]}
    kinds: dict[type[Exception], str] = {
        template_language.RaisedByTemplate: "raised",
        template_language.TooLong: "long",
        exceptions.SecurityError: "security",
        exceptions.UndefinedError: "undefined",
        RecursionError: "deep",
    }
    kind = next((kind for each, kind in kinds.items() if isinstance(error, each)), "failed")
    if isinstance(error, TypeError) and "no loader for this environment" in str(error):
        kind = "loader"
    return _fault(kind, error)


def _fault(kind: str, error: Exception) -> dict[str, Any]:
    try:
        said = str(error)[:_LONGEST_SAID]
    except Exception:  # a template chooses what its errors are made of
        said = ""
    if kind == "failed":
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return {"kind": kind, "line": _line_of(error.__traceback__), "said": said}


def _line_of(place: TracebackType | None) -> int | None:
    """The innermost line of the template in a traceback, counted from 1."""
    line = None
    while place is not None:
        if place.tb_frame.f_code.co_filename == "<template>":
            line = place.tb_lineno
        place = place.tb_next
    return line


if __name__ == "__main__":
    main()
