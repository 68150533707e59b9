"""Every pruner again, in float64 NumPy, one image at a time, written from its description and not from the tensor code.

The exported graphs are held against this: by the tests, by `validate`, by the benchmark of the pruners. Beside the choice it
says by how little it was made, because a near-tie (a small margin in float64) may come out otherwise in another precision.

The module that a row of the table names (`Pruner.reference`) has a function of the pruner's name, and where the pruner is adaptive one
more with `_adaptive` at its end; see `Twin` and `AdaptiveTwin`. What drops tokens inside the decoder has `in_decoder/reference.py`.

Shape letters: N visual tokens, K kept, T = 1 + N, A heads, D head width, E tower width, H decoder width, P width of the space
shared with text, M kept patches.
"""

from __future__ import annotations

from typing import Protocol, cast

from gap_export import prune
from gap_export.positions import MergedId
from gap_export.prune.features import VisionFeatures
from gap_export.prune.reference.choice import Choice, Floats, Ids, class_attention, received_attention

__all__ = ["Choice", "Floats", "Ids", "choose", "choose_adaptive", "class_attention", "received_attention"]


class Twin(Protocol):
    """A pruner in float64."""

    def __call__(
        self, features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId
    ) -> Choice:
        """What it keeps of one image; see `choose`."""
        ...


class AdaptiveTwin(Protocol):
    """A pruner in float64 that finds the count by itself."""

    def __call__(self, features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId) -> Choice:
        """What it keeps of one image; see `choose_adaptive`."""
        ...


def choose(
    pruner: str, features: VisionFeatures[Floats], kept: int, *, seed: int, merged_id: MergedId
) -> Choice:
    """What a pruner keeps of one image.

    Args:
        pruner: its name.
        features: of the image.
        kept: K.
        seed: for pruners that draw at random.
        merged_id: which index merged tokens get.
    """
    twin = cast(Twin, getattr(prune.row(pruner).load_reference(), pruner))
    return twin(features, kept, seed=seed, merged_id=merged_id)


def choose_adaptive(
    pruner: str, features: VisionFeatures[Floats], bound: int, *, merged_id: MergedId
) -> Choice:
    """What an adaptive pruner keeps of one image.

    Args:
        pruner: its name.
        features: of the image.
        bound: the most tokens that it may keep.
        merged_id: which index merged tokens get.

    Returns:
        At most `bound` tokens, without padding, and how many the image needs.
    """
    twin = cast(AdaptiveTwin, getattr(prune.row(pruner).load_reference(), f"{pruner}_adaptive"))
    return twin(features, bound, merged_id=merged_id)
