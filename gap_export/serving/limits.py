"""What the engine may take: rows, queue, threads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gap_export.records import Record


class EngineLimits(Record):
    """Of one engine.

    Attributes:
        rows: most requests whose tokens are decoded together.
        queue: most requests that wait to be begun; whoever comes then is refused.
        image_threads: threads that decode images.
    """

    rows: Annotated[int, Field(ge=1, le=1024, strict=True)] = 8
    queue: Annotated[int, Field(ge=1, le=100_000, strict=True)] = 32
    image_threads: Annotated[int, Field(ge=1, le=64, strict=True)] = 2
