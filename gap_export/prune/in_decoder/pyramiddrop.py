"""PyramidDrop: three cuts at the quarters of the decoder, each keeping the same share of what is left.

Source: PyramidDrop (arXiv 2410.17247) and its published code. Score of a visual token: attention of the prompt's last token to
it, computed with the queries and keys of the layer that comes next on what is about to enter it, mean over heads, softmax over
everything that the last token sees. Of 32 layers, cuts before 8, 16 and 24.

Stage s of 3 has N * keep^(s/3) tokens, the nearest count; the original's 0.5, 0.25, 0.125 is keep 0.125. The original renumbers
the survivors of every stage: that is the policy `shifted`.
"""

from __future__ import annotations

from torch import Tensor

from gap_export import prune
from gap_export.prune import Selected
from gap_export.prune.in_decoder.stages import Cut, Prompt, QueryRows, best, last_token, spread

STAGES = 3
USES_NEXT_LAYER_ATTENTION = True


def first_layers(layers: int) -> tuple[int, ...]:
    """Layers before which tokens are dropped, scaled to a decoder of `layers` layers."""
    return spread((layers / 4, layers / 2, layers * 3 / 4), layers)


def cuts(keep: float, visual_tokens: int, first_layers: tuple[int, ...]) -> tuple[Cut, ...]:
    """What each stage keeps."""
    return tuple(
        Cut(layer, prune.kept_count(keep ** (stage / STAGES), visual_tokens))
        for stage, layer in enumerate(first_layers, start=1)
    )


def scoring_queries(prompt: Prompt) -> QueryRows:
    """Rows of the prompt whose attention scores the visual tokens: the last token."""
    return last_token(prompt)


def select(scores_BN: Tensor, tokens_BNH: Tensor, *, kept: int, merged: int) -> Selected:
    """Choose K visual tokens by their scores."""
    return best(scores_BN, kept)
