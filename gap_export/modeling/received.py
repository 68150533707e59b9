"""What a layer of a tower without a class token shows pruners: attention that its patches receive from each other, and their keys.

Shape letters: as in `prune/__init__.py`; P patches, A heads, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gap_export import prune


def received(query_BAPD: Tensor, keys_BAPD: Tensor, patches: int = 1) -> dict[str, Any]:
    """Fields of `prune.VisionFeatures`.

    Args:
        query_BAPD: of all patches, rotated where the layer rotates them.
        keys_BAPD: as the queries.
        patches: of a visual token, those of one behind each other.
    """

    def means(of_patches: Tensor) -> Tensor:
        if patches == 1:
            return of_patches
        means_BN: Tensor = of_patches.unflatten(1, (-1, patches)).mean(dim=2)
        return means_BN

    def full_width(heads_BAPD: Tensor) -> Tensor:
        return heads_BAPD.transpose(1, 2).flatten(2)

    return {
        "attention": lambda: means(prune.received_attention(query_BAPD, keys_BAPD)),
        "mean_keys": lambda: means(keys_BAPD.float().mean(dim=1)),
        "full_width_attention": lambda: (
            means(prune.received_attention(full_width(query_BAPD)[:, None], full_width(keys_BAPD)[:, None]))
            * patches
        ),
        "full_width_keys": lambda: means(full_width(keys_BAPD).float()),
    }
