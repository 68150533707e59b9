"""How answers to free questions are printed: piece by piece, as a whole, or as a record."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from gap_export.cli.app import console, out, print_json
from gap_export.errors import OutputError

if TYPE_CHECKING:
    from gap_export.boxes.codecs import Box
    from gap_export.runtime.conversation.chat import Reply, ReplyStream

Size = tuple[int, int]
"""(width, height) in pixels."""


def streams_by_itself(as_json: bool) -> bool:
    """Whether answers are printed while they are made where nothing is said of it: on a terminal, and not as records.

    Args:
        as_json: whether records are printed.
    """
    return not as_json and sys.stdout is not None and sys.stdout.isatty()


@dataclass(frozen=True)
class Replies:
    """Prints answers on standard output, and what is to be known of them on standard error.

    Attributes:
        as_json: whether each is printed as a record, in one line.
        streamed: whether its text is printed while it is made.
        backend: that makes them.
    """

    as_json: bool
    streamed: bool
    backend: str

    def show(
        self, stream: ReplyStream, size: Size | None, *, is_ended: Callable[[], bool] | None = None
    ) -> Reply:
        """Read an answer to its end, and print it.

        Args:
            stream: the answer, nothing of it read yet.
            size: of the last image of the conversation; None without one.
            is_ended: asked between pieces whether the answer is to end where it is.

        Returns:
            The whole answer.

        Raises:
            OutputError: standard output takes no more.
            SessionError: the runtime failed.
        """
        begun = False
        try:
            for piece in _until(stream, is_ended):
                if self.streamed:
                    begun = True
                    out.write_piece(piece)
        except BaseException as error:
            if begun and not isinstance(error, OutputError):
                out.write_piece("\n")  # the message that follows begins a line
            raise
        reply = stream.reply
        if self.as_json:
            print_json(record_of(reply, size, self.backend))
        else:
            out.write_piece("\n" if self.streamed else f"{reply.text}\n")
            _tell(reply, size)
        return reply


def record_of(reply: Reply, size: Size | None, backend: str) -> dict[str, Any]:
    """An answer for programs.

    Args:
        reply: the answer.
        size: of the last image of the conversation; None without one.
        backend: that made it.
    """
    return {
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "new_tokens": reply.new_tokens,
        "prompt_tokens": reply.prompt_tokens,
        "boxes": [_rounded(box) for box in reply.boxes],
        "visual_tokens": reply.visual_tokens,
        "kept": len(reply.kept_indices),
        "kept_indices": reply.kept_indices.tolist(),
        "image_size": None if size is None else list(size),
        "notes": list(reply.notes),
        "backend": backend,
    }


def _tell(reply: Reply, size: Size | None) -> None:
    """Say what the text of an answer does not."""
    if reply.finish_reason == "length":
        console.say(("the answer was cut off", "yellow"), f" after {reply.new_tokens} tokens")
    elif reply.finish_reason == "closed":
        console.say(("the answer was ended", "yellow"), f" after {reply.new_tokens} tokens")
    for note in reply.notes:
        console.say(("note", "yellow"), f": {note}")
    if reply.boxes and size is not None:
        boxes = ", ".join(str(_rounded(box)) for box in reply.boxes)
        one_or_more = "box" if len(reply.boxes) == 1 else f"{len(reply.boxes)} boxes"
        console.say(f"{one_or_more} {boxes} in pixels of {size[0]} x {size[1]}")


def _rounded(box: Box) -> list[float]:
    return [round(float(edge), 2) for edge in box]


def _until(stream: ReplyStream, is_ended: Callable[[], bool] | None) -> Iterator[str]:
    """Parts of an answer, which is closed where it is said to end."""
    while is_ended is None or not is_ended():
        piece = next(stream, None)
        if piece is None:
            return
        yield piece
    stream.close()


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is noted and interrupts nothing, so that what a runtime computes is whole; the second is as ever.

    Yields:
        whether there was one.
    """
    noted = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as below nohup
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
