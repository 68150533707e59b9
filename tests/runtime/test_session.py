"""What a vision graph is given besides pixels, and what is refused before it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gap_export.bundle.manifest import Pruning
from gap_export.errors import InputError
from gap_export.runtime.session import check_within_bound, vision_inputs

WORDS = np.array([[5, 6, 7]])


def pruning(**changes: Any) -> Pruning:
    return Pruning.model_validate(
        {"pruner": "x", "keep": 0.25, "kept": 9, "positions": "gap", "seed": 0, **changes}
    )


FIXED = pruning()
CHOSEN = pruning(keep_mode="dynamic", min_tokens=4, max_tokens=20)
ADAPTIVE = pruning(keep_mode="adaptive", min_tokens=2, max_tokens=9)


def inputs(given: Pruning, *, reads_text: bool = False, text: Any = None, keep: int | None = None) -> Any:
    return vision_inputs(given, reads_text=reads_text, text_ids_BL=text, keep_count=keep)


def test_a_fixed_count_is_no_input() -> None:
    assert inputs(FIXED) == inputs(FIXED, keep=9) == inputs(ADAPTIVE) == {}


@pytest.mark.parametrize(("asked", "fed"), [(None, 9), (4, 4), (20, 20)])
def test_a_chosen_count_is_a_scalar(asked: int | None, fed: int) -> None:
    scalar = inputs(CHOSEN, keep=asked)["keep_count"]
    assert (scalar.shape, scalar.dtype, int(scalar)) == ((), np.int64, fed)


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        (FIXED, 10, "this bundle keeps 9 of every image"),
        (ADAPTIVE, 5, "this bundle keeps what each image needs, at most 9"),
        (CHOSEN, 3, "is outside 4 to 20"),
        (CHOSEN, 21, "is outside 4 to 20"),
    ],
)
def test_counts_that_cannot_be_had(given: Pruning, asked: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        inputs(given, keep=asked)
    assert "--keep" in caught.value.hint


def test_expressions_go_where_they_are_looked_at() -> None:
    assert inputs(FIXED, text=WORDS) == {}
    assert inputs(FIXED, reads_text=True, text=WORDS)["text_ids"] is WORDS
    with pytest.raises(InputError, match="no text ids were given"):
        inputs(FIXED, reads_text=True)


def test_an_image_that_needs_more_than_there_is_room_for() -> None:
    check_within_bound(np.array([2, 9]), ADAPTIVE.max_tokens, ADAPTIVE)
    with pytest.raises(InputError, match="needs 12 visual tokens") as caught:
        check_within_bound(np.array([2, 12, 3]), ADAPTIVE.max_tokens, ADAPTIVE)
    assert caught.value.subject == "image 2 of 3"
    assert "--keep-bound" in caught.value.hint
