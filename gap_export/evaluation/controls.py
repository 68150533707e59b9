"""Negative controls: placements that are wrong on purpose. A check of parity that does not notice them proves nothing.

    control                                what is wrong
    ids shifted                            ids count the slots, as exporters number them
    ids permuted                           the kept visual tokens' ids in reverse
    two ids swapped                        the smallest wrong order
    write index off by one                 a slot of stale cache inside the mask
    decoding continues at kept length      a right prompt, and answers numbered by cache slot
    last stage's write index off by one    the same in the last stage of a decoder that drops tokens
    one slot counter for all stages        stages before the last overwrite the end of the prompt

Shape letters: B batch.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from gap_export.evaluation.parity import Control, Measurement, judge
from gap_export.evaluation.runner import Wrong, counts_of
from gap_export.positions import Ids, Placement
from gap_export.precision import Thresholds
from gap_export.runtime.grounder import Grounded


def controls(*, staged: bool = False) -> dict[str, Wrong]:
    """Placements that are wrong on purpose, by name.

    Args:
        staged: also those of decoders that drop tokens.
    """
    of_stages: dict[str, Wrong] = {
        "last stage's write index off by one": lambda placement, *_: with_last_stage_off_by_one(placement),
        "one slot counter for all stages": lambda placement, *_: with_one_slot_counter(placement),
    }
    return {
        "ids shifted": lambda placement, *_: renumbered(placement),
        "ids permuted": with_image_ids_reversed,
        "two ids swapped": with_two_ids_swapped,
        "write index off by one": lambda placement, *_: with_write_index_off_by_one(placement),
        "decoding continues at kept length": lambda placement, *_: continuing_at_kept_length(placement),
        **(of_stages if staged else {}),
    }


def applies(adjust: Wrong, run: Grounded) -> bool:
    """Whether a control changes anything: with nothing pruned, renumbered ids are the right ones."""
    before = run.generation.placement
    after = adjust(before, run.prompts.text_before, counts_of(run.generation.kept_indices))
    return not all(
        np.array_equal(getattr(before, field.name), getattr(after, field.name)) for field in fields(Placement)
    )


def check_control(name: str, measured: Measurement, thresholds: Thresholds) -> Control:
    """A control is caught when what the model computed gives it away.

    The comparison of position ids themselves does not count: it would notice any change of the input by definition.
    """
    failed = tuple(
        gate.name for gate in judge(measured, thresholds) if not gate.passed and gate.name != "position_ids"
    )
    return Control(name=name, caught=bool(failed), by=failed)


def renumbered(placement: Placement) -> Placement:
    """What exporters do: ids count the slots, decoding continues at the kept length."""
    ids = np.broadcast_to(
        np.arange(placement.position_ids.shape[-1], dtype=np.int64), placement.position_ids.shape
    )
    return replace(placement, position_ids=ids.copy(), next_position=placement.next_slot)


def with_image_ids_reversed(placement: Placement, text_before: Ids, kept: Ids) -> Placement:
    """The kept visual tokens' ids in reverse: right values, wrong order. `kept` [B] counts those of each row."""
    ids = placement.position_ids.copy()
    for row, (before, count) in enumerate(zip(text_before, kept, strict=True)):
        image = slice(int(before), int(before) + int(count))
        ids[..., row, image] = ids[..., row, image][..., ::-1]
    return replace(placement, position_ids=ids)


def with_two_ids_swapped(placement: Placement, text_before: Ids, kept: Ids) -> Placement:
    """The first and the last kept visual token exchange ids: the smallest wrong order. `kept` [B] as above."""
    ids = placement.position_ids.copy()
    for row, (before, count) in enumerate(zip(text_before, kept, strict=True)):
        first, last = int(before), int(before) + int(count) - 1
        ids[..., row, [first, last]] = ids[..., row, [last, first]]
    return replace(placement, position_ids=ids)


def with_write_index_off_by_one(placement: Placement) -> Placement:
    """Generated tokens land one slot too far, leaving a slot of stale cache inside the mask."""
    return replace(placement, next_slot=placement.next_slot + 1)


def with_last_stage_off_by_one(placement: Placement) -> Placement:
    """A wrong write index in the layers of the last stage alone."""
    if not placement.stage_next_slot:
        return placement
    *others, last = placement.stage_next_slot
    return replace(placement, stage_next_slot=(*others, last + 1))


def with_one_slot_counter(placement: Placement) -> Placement:
    """Every stage counts the slots of the last one: stages before it overwrite the end of the prompt."""
    last = placement.slots_of_stages[-1]
    return replace(placement, next_slot=last, stage_next_slot=(last,) * len(placement.stage_next_slot))


def continuing_at_kept_length(placement: Placement) -> Placement:
    """A right prefill, but decoding numbers its tokens by cache slot (of the last stage, where there are stages)."""
    return replace(placement, next_position=placement.slots_of_stages[-1])
