"""When pruners drop tokens inside the decoder, and how many: arithmetic alone, for builds and for whoever runs a bundle.

Such a pruner cuts the decoder into stages: stage 0 has all N visual tokens of an image, every later one a share of N. `keep` is the
share left after the last cut. Papers about these pruners compare by the mean over the decoder's layers instead, which is larger:
`Pruning.mean_kept` tells it. With several images every image has its own count; line ends between rows of tiles are tokens like
others here, as in the published code.

Published layers and shares:

| pruner | of so many layers | before | share of N |
|---|---|---|---|
| FastV (arXiv 2403.06764) | any | 2 | keep |
| PyramidDrop (2410.17247) | 32 | 8, 16, 24 | keep ^ (1/3), keep ^ (2/3), keep: 0.5, 0.25, 0.125 in the paper |
| SparseVLM (2410.04417), version 1.5 | 32 | 3, 7, 16 | by interpolation, see below |

For other depths the layers are scaled, FastV's second one excepted.

SparseVLM's `keep` is what the last stage has, merged tokens counted. The two stages before it follow by interpolation, linear in the
logarithms, between keeping all and the four schedules published for 576 tokens (`score.py`: `sparse_token_dict`), named after their
mean over the layers:

| mean | chosen | with merged ones |
|---|---|---|
| 192 | 300, 200, 110 | 309, 204, 113 |
| 128 | 303, 110, 36 | 312, 117, 39 |
| 96 | 238, 48, 26 | 249, 55, 27 |
| 64 | 66, 30, 17 | 82, 32, 18 |

Below the last of these the stages keep its proportions. Of r dropped tokens the best int(0.3 r) + 1 are recycled, and become a tenth
as many (rounded down, plus one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from gap_export import prune
from gap_export.errors import RecipeError

_PUBLISHED = ((576, 576, 576), (309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18))
"""What SparseVLM's stages 1 to 3 have of 576 visual tokens, merged ones counted, in falling order of the last stage."""
_SPARSE = tuple((first / 576, second / 576, last / 576) for first, second, last in _PUBLISHED)


@dataclass(frozen=True)
class Cut:
    """Where a stage begins and what it has.

    Attributes:
        first_layer: its first layer.
        kept: K, merged tokens included.
        merged: how many of those are merged from several dropped ones.
    """

    first_layer: int
    kept: int
    merged: int = 0


@dataclass(frozen=True)
class Schedule:
    """When a pruner drops tokens, and how many.

    Attributes:
        layers: depth of the decoder -> layers before which the original drops tokens, scaled to that depth.
        shares: keep -> share of the visual tokens of every later stage; the last is keep.
        clusters: how many tokens so many dropped ones are merged into.
        turns: keeps between which every share rises or falls with keep; the ends 0 and 1 not named.
    """

    layers: Callable[[int], tuple[float, ...]]
    shares: Callable[[float], tuple[float, ...]]
    clusters: Callable[[int], int] = lambda dropped: 0
    turns: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """How many stages it begins, the first not counted."""
        return len(self.shares(1.0))

    def first_layers(self, layers: int) -> tuple[int, ...]:
        """The layers of the original that are nearest (halves up), distinct, ascending, and from 1 to `layers` - 1."""
        wanted, chosen = self.layers(layers), list[int]()
        for place, layer in enumerate(wanted):
            lowest = chosen[-1] + 1 if chosen else 1
            highest = layers - (len(wanted) - place)
            chosen.append(min(max(int(layer + 0.5), lowest), highest))
        return tuple(chosen)

    def merged(self, before: int, kept: int) -> int | None:
        """How many of the kept tokens are merged from dropped ones; None where the merged ones alone would be as many.

        Args:
            before: tokens of the stage that ends.
            kept: of the stage that begins.
        """
        # One chosen token more is one cluster less or none, so the sum passes through every count from the smallest on.
        chosen = next((n for n in range(kept, 0, -1) if n + self.clusters(before - n) == kept), None)
        return None if chosen is None else kept - chosen

    def counts(self, keep: float, visual_tokens: int) -> tuple[int, ...]:
        """What every later stage has of an image, where images differ: one with few tokens must not fail where others do not.

        Args:
            keep: share left after the last cut.
            visual_tokens: N of the image, at least one.

        Returns:
            The nearest counts, but never so few that no token of the image is among them.
        """
        before, found = visual_tokens, list[int]()
        for share in self.shares(keep):
            least = 1 + self.clusters(before - 1)
            before = min(before, max(least, int(share * visual_tokens + 0.5)))
            found.append(before)
        return tuple(found)

    def most(self, smallest: float, largest: float, visual_tokens: int) -> tuple[int, ...]:
        """The largest counts of every later stage that any keep of a range gives.

        Args:
            smallest: keep.
            largest: keep.
            visual_tokens: N of the image.
        """
        inside = (keep for keep in self.turns if smallest < keep < largest)
        counts = [self.counts(keep, visual_tokens) for keep in (smallest, *inside, largest)]
        return tuple(map(max, zip(*counts, strict=True)))


def recycled_count(dropped: int) -> int:
    """How many of the tokens that SparseVLM drops are recycled: the better 30 %."""
    return 3 * dropped // 10 + 1


def cluster_count(dropped: int) -> int:
    """How many tokens the recycled ones become."""
    return recycled_count(dropped) // 10 + 1 if dropped else 0


def _sparse_shares(keep: float) -> tuple[float, ...]:
    for above, below in pairwise(_SPARSE):
        if keep >= below[-1]:
            along = math.log(keep / above[-1]) / math.log(below[-1] / above[-1])
            first, second = (
                math.exp((1 - along) * math.log(above[stage]) + along * math.log(below[stage]))
                for stage in (0, 1)
            )
            return first, second, keep
    first, second, last = _SPARSE[-1]
    return keep * first / last, keep * second / last, keep


FASTV = Schedule(layers=lambda layers: (2,), shares=lambda keep: (keep,))
PYRAMIDDROP = Schedule(
    layers=lambda layers: (layers / 4, layers / 2, layers * 3 / 4),
    shares=lambda keep: (keep ** (1 / 3), keep ** (2 / 3), keep ** (3 / 3)),
)
SPARSEVLM = Schedule(
    layers=lambda layers: (layers * 3 / 32, layers * 7 / 32, layers / 2),
    shares=_sparse_shares,
    clusters=cluster_count,
    turns=tuple(last for _, _, last in _SPARSE[1:]),
)


def cuts_for(
    name: str, keep: float, *, visual_tokens: int, layers: int, prune_layers: tuple[int, ...] = ()
) -> tuple[Cut, ...]:
    """The schedule of a pruner where all images have as many tokens; nothing for those that prune before the decoder.

    Args:
        name: of the pruner.
        keep: share of visual tokens left after the last cut.
        visual_tokens: N before the first one.
        layers: of the decoder.
        prune_layers: layers to cut before; empty for the pruner's own.

    Raises:
        RecipeError: layers that the decoder does not have or that are out of order, too few layers, or too little left.
    """
    first_layers = layers_for(name, layers, prune_layers)
    if not first_layers:
        return ()
    schedule, found, before = prune.row(name).load_schedule(), list[Cut](), visual_tokens
    for layer, share in zip(first_layers, schedule.shares(keep), strict=True):
        kept = prune.kept_count(share, visual_tokens)
        merged = schedule.merged(before, kept)
        if merged is None:
            raise RecipeError(
                f"leaves {kept} of {before} tokens at layer {layer}: cluster means alone, and no token of the image",
                subject=f"pruner {name}, keep {keep:g}",
                hint="use a larger --keep",
            )
        found.append(Cut(layer, kept, merged))
        before = kept
    return tuple(found)


def layers_for(name: str, layers: int, prune_layers: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The layers before which a pruner drops tokens; none for those that prune before the decoder.

    Args:
        name: of the pruner.
        layers: of the decoder.
        prune_layers: as asked; empty for the pruner's own.

    Raises:
        RecipeError: layers that the decoder does not have or that are out of order, or too few of them.
    """
    row = prune.row(name)
    if not row.in_decoder:
        if prune_layers:
            raise RecipeError(
                "drops no tokens inside the decoder, so there is no layer to choose",
                subject=f"pruner {name}",
                hint=f"leave out --prune-layers, or use {', '.join(prune.names(in_decoder=True))}",
            )
        return ()
    schedule = row.load_schedule()
    if layers <= schedule.stages:
        raise RecipeError(
            f"needs a decoder of more than {schedule.stages} layers, this one has {layers}",
            subject=f"pruner {name}",
            hint="use another pruner",
        )
    first_layers = prune_layers or schedule.first_layers(layers)
    ascending = all(one < other for one, other in pairwise((0, *first_layers, layers)))
    if not ascending or len(first_layers) != schedule.stages:
        count = "one layer" if schedule.stages == 1 else f"{schedule.stages} layers in ascending order"
        raise RecipeError(
            f"takes {count} from 1 to {layers - 1}",
            subject=f"pruner {name}, prune_layers {', '.join(map(str, first_layers))}",
            hint="leave prune_layers out for the pruner's own: "
            + ", ".join(map(str, schedule.first_layers(layers))),
        )
    return first_layers
