"""What is asked of the engine, and what comes back. No HTTP is in it, and nothing of a runtime."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.boxes.codecs import Box
from gap_export.errors import GapExportError, InputError
from gap_export.inputs.chat.conversation import Turn
from gap_export.positions import Ids, Placement
from gap_export.runtime.conversation.chat import AskOptions

FinishReason = Literal["stop", "length"]
Reason = Literal["full", "draining", "broken", "not_ready", "deadline", "cancelled"]
_IDS = itertools.count(1)


class Refused(GapExportError):
    """A request that the engine did not answer, though nothing is wrong with it.

    Args:
        message: why.
        reason: why, in one word.
        retry_after: seconds after which it is worth to ask again; None where it is not.
    """

    stage = "serve"

    def __init__(self, message: str, *, reason: Reason, retry_after: float | None = None) -> None:
        super().__init__(
            message, subject="the request", hint="ask again later" if retry_after else "ask anew"
        )
        self.reason, self.retry_after = reason, retry_after

    def __reduce__(self) -> tuple[object, ...]:
        """Made again from its own arguments."""
        return _refused, (self.message, self.reason, self.retry_after)


def _refused(message: str, reason: Reason, retry_after: float | None) -> Refused:
    return Refused(message, reason=reason, retry_after=retry_after)


@dataclass(frozen=True)
class Expression:
    """A referring expression about the request's images, asked in the bundle's grounding prompt."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that the user spoke last in; texts of its assistant are encoded as they stand."""

    turns: tuple[Turn, ...]


Question = Expression | Conversation


@dataclass(frozen=True)
class Work:
    """One request.

    Attributes:
        questions: each is answered by itself; they share the images.
        open_images: gives the images, RGB, in their order; called at most once, when the request was admitted, on a thread that decodes images.
        images: how many there are.
        fetch: brings here what the images need from elsewhere, before they are opened, on a thread that decodes none; called at most once, with what
            tells how many seconds it is still waited for. None where nothing is needed.
        keep: fraction of the visual tokens to keep; None for the bundle's own, or the server's choice.
        options: how answers are made.
        deadline: seconds after its admission by which all answers must be there.
        trace: whether answers say what they were computed from.
        perturb: makes the placement of every call wrong, for checks that a wrong one shows; None for requests.
        is_check: whether it is asked to check the session: it is not counted, and checks that wait are begun together.

    Raises:
        InputError: nothing is asked, or the deadline is no time.
    """

    questions: tuple[Question, ...]
    open_images: Callable[[], Sequence[Image.Image]]
    images: int
    fetch: Callable[[Callable[[], float]], None] | None = None
    keep: float | None = None
    options: AskOptions = field(default_factory=AskOptions)
    deadline: float = 60.0
    trace: bool = False
    perturb: Callable[[Placement], Placement] | None = None
    is_check: bool = False

    def __post_init__(self) -> None:
        if not self.questions:
            raise InputError(
                "asks nothing", subject="the request", hint="give at least one expression or conversation"
            )
        if not (math.isfinite(self.deadline) and self.deadline > 0):
            raise InputError(
                "must be a number of seconds above 0",
                subject=f"deadline {self.deadline:g}",
                hint="leave it out for the server's own",
            )


@dataclass(frozen=True)
class Spent:
    """Seconds of an answer, phase by phase.

    Attributes:
        queue: until it was begun, fetching and decoding of images left out.
        decode_image: fetching of images, and from bytes to pixels.
        vision: tower, pruner and projector; 0 where another answer of the request had encoded the image.
        prefill: of the prompt, what was read for another answer of the request left out.
        decode: of all further tokens, other rows' share included.
        total: from admission to the last token.
    """

    queue: float = 0.0
    decode_image: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Trace:
    """What an answer was computed from.

    Attributes:
        kept_indices: of every image, [K] int64 raster indices.
        position_ids: [R, S] int64 of the prompt, as they were fed.
        first_text_position: id of the first text token after the last image; None without an image or text after it.
        next_position: id of the first generated token.
        next_slot: slot of the first generated token.
        text_lengths: text tokens before, between and after the images.
        first_logits: [V] float32 of the first token of the answer.
        fault: what of it does not stand where it must, by the arithmetic of `placing.py`; None where all does.
    """

    kept_indices: tuple[Ids, ...]
    position_ids: Ids
    first_text_position: int | None
    next_position: int
    next_slot: int
    text_lengths: tuple[int, ...]
    first_logits: NDArray[np.float32]
    fault: str | None = None


@dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
        text: as generated.
        ids: of its tokens, the end token left out.
        finish_reason: `stop` or `length`.
        boxes: every box in it, (x1, y1, x2, y2) in pixels of the last image as displayed.
        keep: fraction that was used; None without an image.
        kept: visual tokens that entered the decoder, of all images.
        visual_tokens: of all images, before pruning.
        kept_indices: [K] of the last image, what is left at the end of the decoder.
        prompt_tokens: text tokens of the prompt.
        image_size: (width, height) of the last image; None without one.
        spent: seconds.
        trace: what it was computed from, where that was asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    boxes: tuple[Box, ...]
    keep: float | None
    kept: int
    visual_tokens: int
    kept_indices: Ids
    prompt_tokens: int
    image_size: tuple[int, int] | None
    spent: Spent
    trace: Trace | None = None


Outcome = Result | GapExportError
"""Of one question: an answer, or why there is none."""


class Ticket:
    """A request that was admitted.

    Args:
        work: of it.
        on_piece: told of answers as they are made: number of the question, text.
        on_cancel: told that whoever asked has left, on whatever thread that is said.

    Attributes:
        work: of it.
        number: counts requests of this process.
        admitted: `time.monotonic()`.
        complete: `time.monotonic()` when its images were here, as they were sent: its admission, or when `Work.fetch` was done.
    """

    def __init__(
        self,
        work: Work,
        on_piece: Callable[[int, str], None] | None = None,
        on_cancel: Callable[[Ticket], None] | None = None,
    ) -> None:
        self.work, self.number = work, next(_IDS)
        self.admitted = time.monotonic()
        self.complete = self.admitted
        self._on_piece, self._on_cancel = on_piece, on_cancel
        self._outcomes: list[Outcome | None] = [None] * len(work.questions)
        self._done = threading.Event()
        self._cancelled = False
        self._when_done: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def expires(self) -> float:
        """`time.monotonic()` of its deadline."""
        return self.admitted + self.work.deadline

    def seconds_left(self) -> float:
        """Until its deadline; 0 or less once it is settled or its client has left."""
        return 0.0 if self.cancelled or self.done else self.expires - time.monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether whoever asked has left."""
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether every question has its outcome."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Whoever asked has left: what waits is not begun, and rows are free after the step that is being computed."""
        self._cancelled = True
        if self._on_cancel is not None:
            self._on_cancel(self)

    def result(self, timeout: float | None = None) -> list[Outcome]:
        """An outcome for every question, in their order.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: there are none by then.
        """
        if not self._done.wait(timeout):
            raise TimeoutError
        return [outcome for outcome in self._outcomes if outcome is not None]

    def when_done(self, call: Callable[[], None]) -> None:
        """Have something called when every question has its outcome, on whatever thread that happens; at once if they have.

        Args:
            call: quick, as other requests wait for it.
        """
        with self._lock:
            done = self._done.is_set()
            self._when_done = None if done else call
        if done:
            call()

    # For the engine

    @property
    def listened_to(self) -> bool:
        """Whether anyone is told of answers as they are made."""
        return self._on_piece is not None

    def show(self, number: int, piece: str) -> None:
        """Give a piece of an answer to whoever listens."""
        on_piece = self._on_piece
        if on_piece is not None and piece:
            on_piece(number, piece)

    def settle(self, number: int, outcome: Outcome) -> bool:
        """Give a question its outcome.

        Args:
            number: of the question.
            outcome: of it.

        Returns:
            Whether this is its outcome; the first one counts.
        """
        with self._lock:
            if self._outcomes[number] is not None:
                return False
            if isinstance(outcome, GapExportError):
                outcome.__traceback__ = None  # (its frames hold the images of the request)
            self._outcomes[number] = outcome
            ended = all(each is not None for each in self._outcomes)
            call = self._when_done if ended else None
            if ended:
                self._done.set()
                # Whoever listens holds this ticket, and what was sent with it: all is free at once where this does not hold them.
                self._on_piece = self._when_done = None
        if call is not None:
            with suppress(Exception):  # whoever listens may have ended, and others still wait for answers
                call()
        return True

    def settle_all(self, error: GapExportError) -> int:
        """Give every question without an outcome the same error.

        Args:
            error: why there are no answers.

        Returns:
            How many questions that is the outcome of.
        """
        return sum(self.settle(number, error) for number in range(len(self._outcomes)))
