"""FastV: after an early layer, keep what the last token of the prompt attends to most there.

Source: FastV (arXiv 2403.06764) and its published code. Score of a visual token: attention of the prompt's last token to it in
the layer that just ran, mean over heads, softmax over everything that the last token sees. One cut, before layer 2 (the paper's
K = 2), or before the last layer of a shallower decoder. The original keeps the ids of survivors: GAP is what FastV does.
"""

from __future__ import annotations

from torch import Tensor

from gap_export.prune.in_decoder.stages import Image, Kept, Prompt, QueryRows, best, last_token

USES_NEXT_LAYER_ATTENTION = False


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the last token."""
    return last_token(prompt)


def select(scores_BS: Tensor, hidden_BSH: Tensor, image: Image) -> Kept:
    """Choose visual tokens by their scores."""
    return best(scores_BS, image)
