"""FastV: after an early layer, keep what the last token of the prompt attends to most there.

Source: FastV (arXiv 2403.06764) and its published code. Score of a visual token: attention of the prompt's last token to it in
the layer that just ran, mean over heads, softmax over everything that the last token sees. One cut, before layer 2 (the paper's
K = 2), or before the last layer of a shallower decoder. The original keeps the ids of survivors: GAP is what FastV does.
"""

from __future__ import annotations

from torch import Tensor

from gap_export import prune
from gap_export.prune import Selected
from gap_export.prune.in_decoder.stages import Cut, Prompt, QueryRows, best, last_token, spread

STAGES = 1
USES_NEXT_LAYER_ATTENTION = False


def first_layers(layers: int) -> tuple[int, ...]:
    """Layers before which tokens are dropped, scaled to a decoder of `layers` layers."""
    return spread((2,), layers)


def cuts(keep: float, visual_tokens: int, first_layers: tuple[int, ...]) -> tuple[Cut, ...]:
    """What each stage keeps."""
    return (Cut(first_layers[0], prune.kept_count(keep, visual_tokens)),)


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the last token."""
    return last_token(prompt)


def select(scores_BN: Tensor, tokens_BNH: Tensor, *, kept: int, merged: int) -> Selected:
    """Choose K visual tokens by their scores."""
    return best(scores_BN, kept)
