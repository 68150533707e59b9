"""PyramidDrop: three cuts at the quarters of the decoder, each keeping the same share of what is left.

Source: PyramidDrop (arXiv 2410.17247) and its published code. Score of a visual token: attention of the prompt's last token to
it, computed with the queries and keys of the layer that comes next on what is about to enter it, mean over heads, softmax over
everything that the last token sees. Of 32 layers, cuts before 8, 16 and 24. The original renumbers the survivors of every stage: that
is the policy `shifted`.
"""

from __future__ import annotations

from torch import Tensor

from gap_export.prune.in_decoder.stages import Image, Kept, Prompt, QueryRows, best, last_token

USES_NEXT_LAYER_ATTENTION = True


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the last token."""
    return last_token(prompt)


def select(scores_BS: Tensor, hidden_BSH: Tensor, image: Image) -> Kept:
    """Choose visual tokens by their scores."""
    return best(scores_BS, image)
