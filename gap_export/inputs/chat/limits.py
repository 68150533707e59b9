"""What a chat template may take: it comes with a checkpoint, and can loop for ever or ask for terabytes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gap_export.records import Record


class Limits(Record):
    """Of a chat template and of one round trip to the process that renders it.

    Attributes:
        seconds: that all texts of a round trip may take together, reading the template included; starting the process is not.
        memory_bytes: address space of that process, its own 30 MB included. Linux holds to it; systems without such a limit end the
            template by its time alone.
        characters: of one rendered text.
        template_characters: of the template itself.
    """

    seconds: Annotated[float, Field(gt=0, le=3600, strict=True)] = 5.0
    memory_bytes: Annotated[int, Field(ge=64 * 2**20, le=2**40, strict=True)] = 512 * 2**20
    characters: Annotated[int, Field(ge=1, le=100_000_000, strict=True)] = 1_000_000
    template_characters: Annotated[int, Field(ge=1, le=100_000_000, strict=True)] = 1_000_000


DEFAULT_LIMITS = Limits()
