"""Who chooses how many visual tokens a request keeps that says nothing of it."""

from __future__ import annotations

from typing import Protocol


class ChooseKeep(Protocol):
    """Whoever chooses the fraction of visual tokens of requests that choose none."""

    @property
    def largest(self) -> float | None:
        """The largest fraction that is ever chosen: requests must fit with it, so that whether one is answered does not depend on others."""
        ...

    def choose(self, oldest_wait: float) -> float | None:
        """The fraction of a request that begins, of all its questions.

        Args:
            oldest_wait: seconds that a request has waited for others to be begun, the longest of all.

        Returns:
            A fraction; None for the bundle's own.
        """
        ...


class BundlesOwn:
    """The bundle's own fraction, always."""

    largest: float | None = None

    def choose(self, oldest_wait: float) -> float | None:
        """None: the bundle's own."""
        return None
