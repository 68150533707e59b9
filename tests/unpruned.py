"""Position ids of a pruned prompt, taken from those of the unpruned one: GAP by its definition."""

from __future__ import annotations

from gap_export.positions import Ids


def gather_ids(position_ids_RS: Ids, surviving_P: Ids) -> tuple[Ids, int]:
    """Keep the columns of the surviving tokens, go on from the unpruned maximum.

    Args:
        position_ids_RS: [R, S] ids of the unpruned prompt (R = 3: time, height, width).
        surviving_P: [P] ascending indices into S of all surviving tokens, text included.

    Returns:
        ([R, P] ids of the survivors, position id of the first generated token).
    """
    return position_ids_RS[:, surviving_P], int(position_ids_RS.max()) + 1
