"""The base of everything that is written to disk and read back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of everything that is written to disk: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
