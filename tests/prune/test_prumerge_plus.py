"""PruMerge+: the even sequence."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gap_export.prune.prumerge_plus import in_sequence


@given(visual=st.integers(1, 600), data=st.data())
def test_the_sequence_is_even_and_has_its_length(visual: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, visual))
    indices = in_sequence(visual, count).nonzero()[:, 0].tolist()
    assert indices == [int(place * visual / count + 1e-9) for place in range(count)]
    steps = {b - a for a, b in itertools.pairwise(indices)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
