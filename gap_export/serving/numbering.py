"""Which position ids a request may choose: those of its bundle and, where the operator allows baselines, those of exporters that renumber survivors.

The second are there to be looked at beside the first: the same graphs, the same tokens kept, other ids.
"""

from __future__ import annotations

from collections.abc import Callable

from gap_export.bundle.golden import renumbered
from gap_export.bundle.manifest import Manifest
from gap_export.positions import Placement, PositionPolicy


def offered(manifest: Manifest, *, allow_baselines: bool) -> tuple[PositionPolicy, ...]:
    """The policies that a request may choose, the bundle's own first.

    Args:
        manifest: of the bundle.
        allow_baselines: whether the operator lets requests have ids that are wrong on purpose.
    """
    pruning = manifest.pruning
    own = pruning.positions
    # Inside a decoder, ids follow from what every stage drops: counting the slots of the first one is no baseline of it.
    if not allow_baselines or own is not PositionPolicy.GAP or pruning.stages:
        return (own,)
    return own, PositionPolicy.SHIFTED


def placed_by(manifest: Manifest, policy: PositionPolicy | None) -> Callable[[Placement], Placement] | None:
    """What makes the placement of a request that of a policy; None where it is the bundle's own.

    Args:
        manifest: of the bundle.
        policy: one of those that are offered; None for the bundle's own.
    """
    if policy is None or policy is manifest.pruning.positions:
        return None
    return renumbered
