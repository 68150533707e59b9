"""PruMerge+: choice, merged features, the even sequence."""

from __future__ import annotations

import itertools

from gap_export.prune.prumerge_plus import sequence_indices


def test_the_sequence_is_even_and_distinct() -> None:
    for count in range(1, 577):
        indices = sequence_indices(576, count)
        steps = {b - a for a, b in itertools.pairwise(indices)}
        assert indices[0] == 0
        assert len(set(indices)) == count
        assert max(steps, default=1) - min(steps, default=1) <= 1
