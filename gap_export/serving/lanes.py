"""Where requests are computed: rows of one cache that come and go, or one request at a time where a runtime's cache has no such rows.

A row is read and written as if it was the whole cache of a session, and holds zeros when it is taken. What position id every token was fed with is written down, so that an answer can
say what it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.manifest import Manifest
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement
from gap_export.runtime.rows import RowSession
from gap_export.runtime.session import Buffer, Prefilled, Session, Spliced, VisualTokens

_PAUSES = 16
"""So often no row is in use before rows become shorter: long requests between short ones do not move them back and forth."""
_SPARE = 8
"""A row that becomes longer becomes longer by an eighth more."""


class Lane(Protocol):
    """A session's cache, as requests share it.

    Attributes:
        rows: how many requests are computed at once.
    """

    rows: int

    def take(self, place: int) -> Row:
        """A row for a new request: what another request left in it is overwritten with zeros.

        Raises:
            SessionError: the runtime failed.
        """
        ...

    def copied(self, row: Row, place: int) -> Row:
        """A row that holds what another does.

        Raises:
            SessionError: the runtime failed.
        """
        ...

    def move(self, row: Row, place: int) -> None:
        """Put a row in the place of one that has left.

        Raises:
            SessionError: the runtime failed.
        """
        ...

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token to each of the first B rows: [B, V] float32 logits, overwritten by the next call.

        Raises:
            SessionError: the runtime failed.
        """
        ...

    def recover(self) -> None:
        """Lay the cache out anew, after a call of all rows failed.

        Raises:
            SessionError: the runtime failed.
        """
        ...


class Row:
    """One row of a lane: what `ConversationCache` reads a prompt into. This one is the whole session, for one request.

    Args:
        session: that computes it.
        manifest: of its bundle.
        place: of the row among those of the cache.

    Attributes:
        place: of the row.
        fed: [R, C + 1] int64, the position id of what lies in every slot of the first stage; R rows of ids.
        caches_begun: how often the row was begun anew.
        left: of every later stage of a decoder that drops tokens, [1, K] int64 raster indices of those that it sees.
        perturb: makes every placement wrong before it is fed, in checks that a wrong one shows.
    """

    def __init__(self, session: Session, manifest: Manifest, place: int = 0) -> None:
        self._session, self.place, self.caches_begun = session, place, 0
        self.left: tuple[Ids, ...] = ()
        self.perturb: Callable[[Placement], Placement] | None = None
        self.fed: Ids = np.zeros((manifest.spec.position_rows, manifest.capacity + 1), np.int64)

    def encode(
        self, pixels: PixelInputs, *, text_ids_BL: Ids | None = None, keep_count: int | None = None
    ) -> VisualTokens:
        """Vision tower, pruner and projector."""
        return self._session.encode(pixels, text_ids_BL=text_ids_BL, keep_count=keep_count)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings of several images as one."""
        return self._session.embeds_together(rows, longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder."""
        return self._session.splice(input_ids_BT, visual)

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings [1, T, H] of text."""
        return self._session.embed(token_ids_1T)

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew, with nothing in the row."""
        self.caches_begun += 1
        self._session.clear(slots)

    def grow(self, slots: Sequence[int]) -> None:
        """Make space for so many slots of every stage."""
        self._session.grow(slots)

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the row from slot 0 on."""
        self.caches_begun += 1
        prefilled = self._session.prefill(embeds, self._fed(placement), reserve=reserve)
        self.left = prefilled.kept_indices
        return prefilled

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in the row: logits [1, V] of the last token."""
        return self._session.append(embeds, self._fed(placement))

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token, where a prompt is read token by token."""
        return self._session.step(token_ids_B, self._fed(placement))

    def _fed(self, placement: Placement) -> Placement:
        """The placement that is fed, written down."""
        if self.perturb is not None:
            placement = self.perturb(placement)
        ids_RS = placement.position_ids.reshape(-1, placement.position_ids.shape[-1])
        first = int(placement.write_index[0])
        self.fed[:, first : first + ids_RS.shape[1]] = ids_RS[:, : self.fed.shape[1] - first]
        return placement


class SharedRow(Row):
    """One row of a cache that has several.

    Args:
        session: whose cache it is.
        manifest: of its bundle.
        place: of the row among those of the cache; it holds nothing.
        grow: gives all rows at least so many slots.
    """

    def __init__(
        self, session: RowSession, manifest: Manifest, place: int, grow: Callable[[int], None]
    ) -> None:
        super().__init__(session, manifest, place)
        self._rows, self._grow, self._is_empty = session, grow, True

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew, with nothing in the row, and space for so many slots."""
        self.caches_begun += 1
        if not self._is_empty:
            self._rows.clear_row(self.place)
        self._is_empty = True
        self.grow(slots)

    def grow(self, slots: Sequence[int]) -> None:
        """Make space for so many slots."""
        self._grow(slots[0])

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the row from slot 0 on."""
        self.caches_begun += 1
        self._is_empty = False
        most = self._rows.capacities[0]
        written = max(int(placement.next_slot.max()), placement.position_ids.shape[-1])
        self._grow(most if reserve is None else min(most, written + reserve))
        return self._rows.prefill_row(self.place, embeds, self._fed(placement))

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in the row: logits [1, V] of the last token."""
        self._is_empty = False
        return self._rows.append_row(self.place, embeds, self._fed(placement))

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token.

        Raises:
            ValueError: always, as a step is one of the first rows together; text is appended.
        """
        raise ValueError("a row of several is not fed by a step of its own")

    def copied_from(self, other: Row) -> None:
        """Write down what another row holds, when it was copied."""
        self.fed, self.caches_begun, self._is_empty = other.fed.copy(), other.caches_begun, False


class SharedLane:
    """Rows of one cache: a request is read alone into its row, and single tokens of all rows are fed together.

    Every step attends to all slots of its rows, filled or not, so rows have about as many as the longest of late needed; memory for all that the bundle
    allows is taken at the beginning, and a row that becomes longer moves the others within it. When no row is in use, and has not been long for a
    while, they become shorter again.

    Args:
        session: whose cache has rows.
        manifest: of its bundle.
        rows: how many; fewer, where the session has no more.
    """

    def __init__(self, session: RowSession, manifest: Manifest, rows: int) -> None:
        self._session, self._manifest = session, manifest
        self.rows = rows if session.most_rows is None else min(rows, session.most_rows)
        session.open_rows(self.rows)
        self._slots = session.capacities[0]
        # Most slots that were needed of late, and how often no row was in use since.
        self._needed, self._pauses = 1, _PAUSES

    def take(self, place: int) -> Row:
        """A row for a new request: what another request left in it is overwritten with zeros."""
        if place == 0:
            self._shrink()
        self._session.clear_row(place)
        return SharedRow(self._session, self._manifest, place, self._grow)

    def copied(self, row: Row, place: int) -> Row:
        """A row that holds what another does."""
        self._session.copy_row(row.place, place)
        copied = SharedRow(self._session, self._manifest, place, self._grow)
        copied.copied_from(row)
        return copied

    def move(self, row: Row, place: int) -> None:
        """Put a row in the place of one that has left."""
        self._session.copy_row(row.place, place)
        row.place = place

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token to each of the first B rows."""
        return self._session.step(token_ids_B, placement)

    def recover(self) -> None:
        """Lay all rows out anew."""
        self._session.open_rows(self.rows, self._slots)

    def _grow(self, slots: int) -> None:
        """Give all rows at least so many slots."""
        self._needed = max(self._needed, slots)
        if slots > self._slots:
            # With some to spare: requests that are each a little longer than the last do not move all rows every time.
            more = min(self._session.capacities[0], slots + slots // _SPARE)
            self._session.grow([more])
            self._slots = more

    def _shrink(self) -> None:
        """Where no row is in use, and none needed half of what they have for a while: give them less."""
        self._pauses += 1
        if self._pauses > _PAUSES:
            if 2 * self._needed <= self._slots:
                self._session.open_rows(self.rows, self._needed)
                self._slots = self._needed
            self._needed, self._pauses = 1, 0


class SingleLane:
    """One request at a time, with the whole session.

    Args:
        session: of any kind.
        manifest: of its bundle.
    """

    rows = 1

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session, self._manifest = session, manifest

    def take(self, place: int) -> Row:
        """The session, its cache overwritten with zeros: where a slot holds NaN, it counts though it is masked."""
        self._session.clear(self._session.capacities)
        return Row(self._session, self._manifest, place)

    def copied(self, row: Row, place: int) -> Row:
        """There is one row.

        Raises:
            ValueError: always.
        """
        raise ValueError("a lane of one row has no other to copy to")

    def move(self, row: Row, place: int) -> None:
        """There is one row, and it is in its place."""

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token."""
        return self._session.step(token_ids_B, placement)

    def recover(self) -> None:
        """Nothing: the next request begins with an empty cache."""


def single_because(session: Session, manifest: Manifest) -> str | None:
    """Why a bundle is served one request at a time in this session; None where requests share a cache.

    Args:
        session: opened.
        manifest: of its bundle.
    """
    if manifest.pruning.stages:
        return f"{manifest.pruning.pruner} drops tokens inside the decoder, and every stage has a cache of its own length"
    if manifest.pruning.finds_count:
        return "images themselves decide how many tokens they keep"
    if manifest.spec.reads_image_slots:
        return "its attention mask looks at where the images of a prompt are"
    if not isinstance(session, RowSession):
        return f"caches of {session.backend} have no rows that come and go"
    if session.most_rows == 1:
        return f"engines of {session.backend} in this bundle take one request at a time"
    return None


def open_lane(session: Session, manifest: Manifest, rows: int) -> Lane:
    """The lane of a session: shared, where its cache and the bundle allow it.

    Args:
        session: opened.
        manifest: of its bundle.
        rows: most requests at once.

    Raises:
        SessionError: the runtime failed.
    """
    if rows > 1 and isinstance(session, RowSession) and single_because(session, manifest) is None:
        return SharedLane(session, manifest, rows)
    return SingleLane(session, manifest)
