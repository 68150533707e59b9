"""Requests on the event loop: admitted, awaited, and given up as soon as their client has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from gap_export.serving.engine import Engine
from gap_export.serving.work import Outcome, Refused, Work

_GRACE_SECONDS = 1.0
"""How much later than the engine the deadline is looked at here; it looks at those that it computes, and these may wait."""


@dataclass(frozen=True)
class _Piece:
    text: str


class Asking:
    """Works that a client waits for. Nothing of it blocks the event loop; `async with` gives up what has no answer at its end.

    Args:
        engine: that answers.
        works: that are asked together.
        receive: of the request, whose body was read.
        listen: whether pieces of the answer are wanted as they are made, of a single question.

    Raises:
        InputError: they are more than the engine's queue can hold.
        Refused: they were not admitted; none is computed then.
    """

    def __init__(
        self, engine: Engine, works: Sequence[Work], receive: Receive, *, listen: bool = False
    ) -> None:
        self._events: asyncio.Queue[_Piece | Literal["done", "left"]] = asyncio.Queue()
        self._seconds = max(work.deadline for work in works) + _GRACE_SECONDS
        loop = asyncio.get_running_loop()
        self._ends = loop.time() + self._seconds

        def tell(event: _Piece | Literal["done", "left"]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nothing is waited for any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        on_piece: Callable[[int, str], None] | None = (
            (lambda number, text: tell(_Piece(text))) if listen else None
        )
        self._tickets = engine.submit_all(works, on_piece)
        self._left_over = len(works)
        for ticket in self._tickets:
            ticket.when_done(lambda: tell("done"))
        self._watch = asyncio.create_task(self._watching(receive))

    async def piece(self) -> str | None:
        """The next piece of the answer; None when all answers are there.

        Raises:
            ClientDisconnect: the client has left.
            Refused: the deadline has passed.
        """
        while self._left_over:
            left = self._ends - asyncio.get_running_loop().time()
            try:
                event = await asyncio.wait_for(self._events.get(), max(0.0, left))
            except TimeoutError:
                self.give_up()
                raise Refused(
                    f"was not answered within {self._seconds - _GRACE_SECONDS:g} s", reason="deadline"
                ) from None
            if isinstance(event, _Piece):
                return event.text
            if event == "left":
                self.give_up()
                raise ClientDisconnect
            self._left_over -= 1
        return None

    async def outcomes(self) -> list[list[Outcome]]:
        """Of every work, an outcome for every question.

        Raises:
            ClientDisconnect: the client has left.
            Refused: the deadline has passed.
        """
        while await self.piece() is not None:
            continue
        return [ticket.result(0) for ticket in self._tickets]

    def give_up(self) -> None:
        """Have what has no answer yet not be computed any further."""
        for ticket in self._tickets:
            if not ticket.done:
                ticket.cancel()

    async def close(self) -> None:
        """Give up, and watch the client no more."""
        self.give_up()
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._watch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _watching(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self._events.put_nowait("left")
