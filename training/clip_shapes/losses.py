"""The two contrastive losses. Similarities are cosines between a text and a patch, times a learnt scale, as in CLIP.

T texts, B pictures (text t belongs to picture t), N patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOP_PATCHES = 4  # about what the smallest object covers


def picture_scores(similarity_TBN: Tensor, top: int = TOP_PATCHES) -> Tensor:
    """How well a picture shows a text: the mean over its most similar patches (FILIP's late interaction, arXiv 2111.07783, for
    one vector per text). [T, B]."""
    return similarity_TBN.topk(top, dim=-1).values.mean(-1)


def picture_loss(scores_TB: Tensor, absent_TB: Tensor) -> Tensor:
    """InfoNCE from text to picture and back. Against its own picture a text is held only where `absent` says that nothing of
    what it names is there: other pictures that show it, or a part of it, are no negatives."""
    pairs = torch.eye(len(scores_TB), dtype=torch.bool)
    logits = scores_TB.masked_fill(~(absent_TB | pairs), -torch.inf)
    own = torch.arange(len(scores_TB))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def patch_loss(similarity_BN: Tensor, named_BN: Tensor) -> Tensor:
    """InfoNCE within a picture: each patch that shows what the picture's text names, against all that do not. Every such patch
    is asked for by itself, so that an object's outline ranks high as well as its middle. Mean over patches, then pictures.
    """
    others = similarity_BN.masked_fill(named_BN, -torch.inf).logsumexp(-1, keepdim=True)
    each = F.softplus(others - similarity_BN) * named_BN
    return (each.sum(-1) / named_BN.sum(-1)).mean()
