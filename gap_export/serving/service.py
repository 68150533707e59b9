"""What is served: an engine, under a name, and whether it has shown that it is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError, InputError, SessionError
from gap_export.records import Record
from gap_export.serving.engine import Engine
from gap_export.serving.receipts import ImageDigest
from gap_export.serving.work import Refused, Result, Work

State = Literal["starting", "ready", "failed", "stopping"]
ReceiptOf = Callable[[Bundle, Work, int, Sequence[ImageDigest], Result, float | None], Record]
"""(bundle, request, number of the question, digests of its images, answer, fraction asked for) -> what the answer was computed from."""


class NotReady(Refused):
    """A request that came before the session has shown that it is right, or after it has failed to."""

    def __init__(self) -> None:
        super().__init__("is not admitted: the server is not ready", reason="not_ready", retry_after=2.0)

    def __reduce__(self) -> tuple[object, ...]:
        """Made again without arguments."""
        return NotReady, ()


class NotAsStated(SessionError):
    """An answer whose position ids are other ones than follow from the tokens kept."""


class Metrics(Protocol):
    """What is counted, as it is published.

    Attributes:
        content_type: of it.
    """

    content_type: str

    def render(self) -> bytes:
        """All of it by now."""
        ...

    def refused(self, reason: str) -> None:
        """A request was not admitted; see `work.Reason`."""
        ...

    def receipt_mismatch(self) -> None:
        """An answer was not computed as its receipt would say."""
        ...


class Service:
    """A bundle that is served.

    Args:
        engine: that answers.
        name: of the model, for clients.
        aliases: further names.
        check: shows that the session computes what it should, or raises; None where that is not asked for.
        metrics: published; None where none are.
        receipt_of: makes receipts; None where there are none.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        aliases: tuple[str, ...] = (),
        check: Callable[[], object] | None = None,
        metrics: Metrics | None = None,
        receipt_of: ReceiptOf | None = None,
    ) -> None:
        self.engine, self.name, self.aliases, self.metrics = engine, name, aliases, metrics
        self._check, self._receipt_of = check, receipt_of
        self._state: State = "starting" if check is not None else "ready"
        # Beside the state, as a server that stops answers on where the session has shown that it is right, and only there.
        self._is_proven = check is None
        self._lock = threading.Lock()

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self.engine.bundle

    @property
    def state(self) -> State:
        """Where the server stands: requests are taken while it is ready."""
        return self._state

    def prove(self) -> None:
        """Become ready, by the check; takes as long as it does.

        Raises:
            GapExportError: the session is not right; the service never becomes ready.
        """
        try:
            if self._check is not None:
                self._check()
        except BaseException:
            self._change("starting", "failed")
            raise
        self._is_proven = True
        self._change("starting", "ready")

    def stop(self) -> None:
        """Be ready no more; where the session is proven, requests are taken until the engine is emptied."""
        with self._lock:
            self._state = "stopping"

    def check_open(self) -> None:
        """Refuse a request as the engine would by now, before anything of it is read.

        Raises:
            Refused: the session has not shown that it is right, the queue is full, or the engine is being emptied.
        """
        if not self._is_proven:
            if self.metrics is not None:
                self.metrics.refused("not_ready")
            raise NotReady
        self.engine.check_admission()

    def check_model(self, name: str | None) -> bool:
        """Whether a name that a request gives is this model's; a request may leave it out."""
        return name is None or name == self.name or name in self.aliases

    def receipt(
        self, work: Work, number: int, images: Sequence[ImageDigest], result: Result
    ) -> dict[str, Any]:
        """What an answer was computed from.

        Args:
            work: of the request.
            number: of the question.
            images: digests of the request's, as they were decoded.
            result: the answer, with its trace.

        Raises:
            InputError: receipts are not given.
            NotAsStated: position ids are other ones than follow from the tokens kept; it is counted, and the service is ready no more.
        """
        if self._receipt_of is None:
            raise no_receipts()
        assert result.trace is not None
        if result.trace.fault is not None:
            if self.metrics is not None:
                self.metrics.receipt_mismatch()
            self._is_proven = False
            self._change("ready", "failed")
            raise NotAsStated(
                f"was not computed as the manifest says: {result.trace.fault}",
                subject="the answer",
                hint="do not use this server: its session no longer places tokens where they belong",
            )
        made = self._receipt_of(self.bundle, work, number, images, result, work.keep)
        return made.model_dump(mode="json")

    @property
    def gives_receipts(self) -> bool:
        """Whether it can say what answers were computed from."""
        return self._receipt_of is not None

    def _change(self, before: State, after: State) -> None:
        with self._lock:
            if self._state == before:
                self._state = after


def no_receipts() -> GapExportError:
    """The error of a receipt where none is made."""
    return InputError("are not given by this server", subject="receipts", hint="leave receipt out")
