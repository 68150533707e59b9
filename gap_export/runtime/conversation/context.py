"""What lies in a cache of one row, token by token, and where each token stands: for conversations, which are read on and cut off.

Between two tokens a conversation can be cut off and continued otherwise; what that takes is what the two counters were there. An image is one
token here, and takes as many slots as were kept of it and moves positions by what the unpruned image would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gap_export.errors import SessionError
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.positions import Ids, Placement


@dataclass(frozen=True)
class Mark:
    """The counters at a place between two tokens.

    Attributes:
        position: id of the next token.
        slots: where its key and value will lie, in every stage of the decoder.
    """

    position: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """Tokens in a cache.

    Attributes:
        ids: [T] of them, `IMAGE` for every image.
        marks: [T + 1], before every token and after the last.
    """

    ids: tuple[int, ...]
    marks: tuple[Mark, ...]

    @classmethod
    def empty(cls, stages: int = 1) -> Context:
        """Of a cache in which nothing lies."""
        return cls((), (Mark(0, (0,) * stages),))

    @property
    def end(self) -> Mark:
        """After the last token."""
        return self.marks[-1]

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens from the first on are those of another sequence."""
        length = min(len(self.ids), len(ids))
        differ = (number for number in range(length) if self.ids[number] != ids[number])
        return next(differ, length)

    def cut(self, length: int) -> Context:
        """The first so many tokens."""
        return Context(self.ids[:length], self.marks[: length + 1])

    def with_text(self, ids: Sequence[int]) -> Context:
        """With text behind: every token takes a slot of every stage, and a position."""
        end = self.end
        added = [
            Mark(end.position + count, tuple(slot + count for slot in end.slots))
            for count in range(1, len(ids) + 1)
        ]
        return Context((*self.ids, *ids), (*self.marks, *added))

    def with_images(
        self, ids: Sequence[int], placement: Placement, kept: Sequence[int], extents: Sequence[int]
    ) -> Context:
        """With a prompt behind that has images.

        Args:
            ids: of the prompt, `IMAGE` for every image.
            placement: of it, moved to where it stands (`moved`).
            kept: how many tokens of each image entered the decoder.
            extents: by how much each image moves positions.

        Raises:
            SessionError: the runtime placed the prompt otherwise.
        """
        marks, of_images = list(self.marks), iter(zip(kept, extents, strict=True))
        position, slot = self.end.position, self.end.slots[0]
        # What later stages do not see are tokens of the images.
        gone, dropped = [0] * len(placement.stage_next_slot), iter(_dropped(placement))
        for id_ in ids:
            slots, positions = next(of_images) if id_ == IMAGE else (1, 1)
            if id_ == IMAGE and gone:
                gone = [before + more for before, more in zip(gone, next(dropped), strict=True)]
            slot, position = slot + slots, position + positions
            marks.append(Mark(position, (slot, *(slot - drop for drop in gone))))
        if (position, slot) != (int(placement.next_position[0]), int(placement.next_slot[0])):
            raise SessionError(
                f"ends at position {placement.next_position[0]} and slot {placement.next_slot[0]}, and {position} and {slot} follow from its tokens",
                subject="the prompt",
                hint="the graphs do not belong to the manifest: build the bundle again",
            )
        return Context((*self.ids, *ids), tuple(marks))


def _dropped(placement: Placement) -> list[list[int]]:
    """Of every image of a prompt, how many tokens every later stage does not see."""
    if placement.stage_counts is None:
        return [[int(placement.next_slot[0] - later[0]) for later in placement.stage_next_slot]]
    dropped_IJ: list[list[int]] = placement.stage_dropped[0].tolist()
    return dropped_IJ


def text_placement(at: Mark, tokens: int, rows: int, image_slots: Ids | None = None) -> Placement:
    """Placement of text behind what lies in a cache of one row.

    Args:
        at: where it begins.
        tokens: T.
        rows: of position ids, 3 for M-RoPE: text has the same id in all of them.
        image_slots: [1, I, 2] int64 of the images before, where the attention mask looks at them.

    Returns:
        `position_ids` [1, T], of several rows [R, 1, T].
    """
    ids_T = at.position + np.arange(tokens, dtype=np.int64)
    shape = (1, tokens) if rows == 1 else (rows, 1, tokens)
    slot, *later = at.slots
    return Placement(
        position_ids=np.array(np.broadcast_to(ids_T, shape)),
        write_index=_of_one(slot),
        last_index=_of_one(tokens - 1),
        next_position=_of_one(at.position + tokens),
        next_slot=_of_one(slot + tokens),
        image_slots=image_slots,
        stage_write_index=tuple(map(_of_one, later)),
        stage_next_slot=tuple(_of_one(each + tokens) for each in later),
    )


def moved(placement: Placement, at: Mark) -> Placement:
    """Placement of a prompt that was spliced by itself, behind what lies in a cache of one row."""
    slot = at.slots[0]
    return replace(
        placement,
        position_ids=placement.position_ids + at.position,
        write_index=placement.write_index + slot,
        next_position=placement.next_position + at.position,
        next_slot=placement.next_slot + slot,
        image_slots=None if placement.image_slots is None else placement.image_slots + slot,
    )


def reaching(placement: Placement, position: int) -> Placement:
    """Placement of a call whose last token stands at another position.

    Args:
        placement: of one row.
        position: of that token, in all rows of ids.
    """
    position_ids = placement.position_ids.copy()
    position_ids[..., -1] = position
    return replace(placement, position_ids=position_ids)


def _of_one(number: int) -> Ids:
    """[1] int64."""
    return np.array([number], np.int64)
