"""What the engine may take: rows, queue, threads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gap_export.records import Record

_WAITING_PER_ROW, _LEAST_WAITING = 4, 8


class EngineLimits(Record):
    """Of one engine.

    Attributes:
        rows: most requests whose tokens are decoded together.
        queue: most requests that wait to be begun, and whoever comes then is refused; None for 4 for each row that there is, and 8 at least: images of one detection wait each for itself.
        image_threads: threads that decode images.
        fetch_threads: threads that fetch images from elsewhere; no more requests with such images wait to be decoded.
    """

    rows: Annotated[int, Field(ge=1, le=1024, strict=True)] = 8
    queue: Annotated[int, Field(ge=1, le=100_000, strict=True)] | None = None
    image_threads: Annotated[int, Field(ge=1, le=64, strict=True)] = 2
    fetch_threads: Annotated[int, Field(ge=1, le=64, strict=True)] = 8

    def waiting(self, rows: int) -> int:
        """Most requests that wait.

        Args:
            rows: that the engine has; fewer than asked for where a bundle or a runtime allows no more.
        """
        return max(_LEAST_WAITING, _WAITING_PER_ROW * rows) if self.queue is None else self.queue
