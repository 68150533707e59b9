"""Requests that come and go, each in a row of one cache and at its own length: what continuous batching and conversations need of a runtime."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import SessionError
from gap_export.positions import Ids, Placement
from gap_export.runtime.session import Buffer, Prefilled, Session


@runtime_checkable
class RowSession(Session, Protocol):
    """A session whose cache has rows for requests that come and go, each at its own length.

    Rows are numbered from 0; to drop one, copy the last row into its place. All else of a session may be used in between only after `open_rows`
    was called anew, for `prefill` and `fork` lay the cache out for themselves.
    """

    @property
    def most_rows(self) -> int | None:
        """How many rows there may be; None for as many as fit into memory."""
        ...

    def open_rows(self, rows: int, slots: int | None = None) -> None:
        """Lay out a cache of so many rows; what was in the cache is gone.

        Args:
            rows: how many requests at once.
            slots: of a row, in the first stage; None for all that the bundle allows.

        Raises:
            SessionError: a row cannot have so many slots.
        """
        ...

    def prefill_row(self, row: int, embeds: Buffer, placement: Placement) -> Prefilled:
        """Fill a row from slot 0 on, with a prompt: embeds [1, S, H] and where they stand.

        Raises:
            SessionError: the prompt does not fit, or there is no such row.
        """
        ...

    def append_row(self, row: int, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what is in a row: logits [1, V] of the last; as `append`.

        Raises:
            SessionError: they do not fit, or there is no such row.
        """
        ...

    def extend_row(self, row: int, token_ids_1T: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed several tokens after what is in a row: logits [1, V] of the last; as `extend`.

        Raises:
            SessionError: they do not fit, or there is no such row.
        """
        ...

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token to each of the first B rows; as `Session.step`."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds: of two requests with one beginning, or of the last row in the place of one that has ended.

        Raises:
            SessionError: there is no such row.
        """
        ...

    def clear_row(self, row: int) -> None:
        """Forget what a row holds.

        Raises:
            SessionError: there is no such row.
        """
        ...


def with_rows(session: Session) -> RowSession:
    """The session, if several requests may share its cache: asked where it is opened, not when the second request comes.

    Args:
        session: opened.

    Raises:
        SessionError: it serves one request at a time.
    """
    if not isinstance(session, RowSession):
        raise SessionError(
            "serves one request at a time: its cache has no rows that come and go",
            subject=f"backend {session.backend}",
            hint="use --backend onnxruntime or openvino",
        )
    return session
