"""A row's answer never depends on the rows beside it.

Shape letters: B batch, S tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export import precision as table
from gap_export.bundle.folder import Bundle
from gap_export.positions import Placement, advance
from gap_export.precision import PRECISIONS, register
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.runtime.session import Session
from gap_export.runtime.torch.reference import open_torch
from tests.conftest import IMAGE_TOKEN
from tests.graph.quantize import one_scale

Floats = NDArray[np.float32]

MINE = [1, 5, 6, IMAGE_TOKEN, 7, 8, 9, 10, 11]
NEIGHBOURS: dict[str, list[list[int]]] = {
    "long": [[1, 5, 6, IMAGE_TOKEN, 12, 13, 14, 15, 16], [IMAGE_TOKEN, 12, 13, 14, 15, 16, 17, 18, 19]],
    "short": [[1, IMAGE_TOKEN, 20], [IMAGE_TOKEN]],
}
STEPS = 4


def read(session: Session, pixels: Floats, prompts: list[list[int]], *, loud: bool = False) -> list[Floats]:
    """Logits [V] of the first row, after its prompt and after every token of a few that are fed to all rows.

    Args:
        session: of a bundle.
        pixels: [B, 3, 36, 36].
        prompts: B rows of ids; the first is the longest, so that it has as many slots whatever the others are.
        loud: others are fed embeddings with a number that is large beside all others, and pixels that are.
    """
    ids = np.full((len(prompts), len(MINE)), -1, np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, : len(tokens)] = tokens
    if loud:
        pixels = np.concatenate([pixels[:1], 50 * pixels[1:]])
    spliced = session.splice(ids, session.encode({"pixel_values": pixels}))
    embeds = with_outliers(spliced.embeds) if loud else spliced.embeds
    placement: Placement = spliced.placement
    logits = [session.prefill(embeds, placement, reserve=STEPS + 1).logits[0].copy()]
    for token in range(20, 20 + STEPS):
        placement = advance(placement)
        logits.append(session.step(np.full(len(prompts), token), placement)[0].copy())
    return logits


def with_outliers(embeds: Any) -> Any:
    """[B, S, H], or a list of rows: in every token of all rows but the first, one number of 300."""
    if isinstance(embeds, list):
        rows = [row.clone() for row in embeds]
        for row in rows[1:]:
            row[:, 5] = 300
        return rows
    loud = embeds.numpy().copy()
    loud[1:, :, 5] = 300
    return loud


def apart(one: list[Floats], other: list[Floats]) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)))


RUNS_HERE = [row.name for row in PRECISIONS.values() if row.cpu]

ROUNDING = {
    "fp32": 1e-5,
    "fp16": 1e-2,
    "int8": 1e-1,
    "int8-blocks": 1e-1,
    "int4": 1e-1,
    "int4-fp16": 1e-1,
    "fp8": 2e-1,
}
"""By how much a row alone may differ from the same row among others, logits being up to 5 in size: kernels for one row may add up in
another order than those for several. What is off by the last bit can then be rounded to the next number of few bits: in float32 and half
precision nothing is; activations of eight bits are, by a 255th of a token or block, and those of E4M3 by a sixteenth of themselves.
Where both take the same kernels, as with models this small, the difference is 0.
"""


def differences(session: Session, pixels: Floats) -> tuple[float, float]:
    """Of the first row: (among neighbours of many kinds, all in calls of the same shape; alone and among them)."""
    quiet = read(session, pixels[:3], [MINE, *NEIGHBOURS["long"]])
    others = [
        read(session, pixels[:3], [MINE, *NEIGHBOURS[kind]], loud=loud)
        for kind, loud in (("long", True), ("short", False), ("short", True))
    ]
    others.append(read(session, pixels[[0, 3, 2]], [MINE, *NEIGHBOURS["long"][::-1]]))
    alone = read(session, pixels[:1], [MINE])
    return max(apart(quiet, other) for other in others), apart(alone, quiet)


@pytest.mark.parametrize("precision", RUNS_HERE)
def test_a_row_is_answered_as_if_it_were_alone(
    low: Callable[[str], Bundle], pixels: Floats, precision: str
) -> None:
    """What its neighbours are changes not a bit; that there are any, no more than the order of sums does."""
    session = OnnxRuntimeSession(low(precision), threads=1)
    beside, alone = differences(session, pixels)
    assert beside == 0
    assert alone <= ROUNDING[precision]


def test_the_reference_answers_rows_as_if_they_were_alone(
    low: Callable[[str], Bundle], pixels: Floats
) -> None:
    """Rows of one length are run together there: as many as have it, so that calls are of different shapes."""
    assert max(differences(open_torch(low("fp32")), pixels)) < 1e-4


def test_one_scale_for_all_rows_would_show(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[..., Bundle], pixels: Floats
) -> None:
    monkeypatch.setattr(table, "PRECISIONS", dict(PRECISIONS))
    register(one_scale.ROW)
    session = OnnxRuntimeSession(tiny_bundle(precision=one_scale.ROW.name), threads=1)
    beside, alone = differences(session, pixels)
    assert beside > 0.5
    assert alone > 0.5
    # Neighbours need not be strange for that.
    quiet = (read(session, pixels[:3], [MINE, *NEIGHBOURS[kind]]) for kind in ("long", "short"))
    assert apart(*quiet) > 0


def test_neighbours_are_as_loud_as_they_are_meant_to_be(low: Callable[[str], Bundle], pixels: Floats) -> None:
    """Their own answers change, or nothing would be tested."""
    session = OnnxRuntimeSession(low("fp32"), threads=1)
    rows = [NEIGHBOURS["long"][0], MINE]
    assert apart(*(read(session, pixels[:2], [MINE, rows[0]], loud=loud) for loud in (False, True))) == 0
    ids = np.array(rows, np.int64)
    spliced = session.splice(ids, session.encode({"pixel_values": pixels[:2]}))
    quiet = session.prefill(spliced.embeds, spliced.placement).logits[1].copy()
    assert (
        np.abs(session.prefill(with_outliers(spliced.embeds), spliced.placement).logits[1] - quiet).max() > 1
    )
