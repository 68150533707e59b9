"""The two contrastive losses. Similarities are cosines between a text and a patch, times a learnt scale, as in CLIP.

T texts, B images (text t belongs to image t), N patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOP_PATCHES = 4  # about what the smallest object covers


def image_scores(similarity_TBN: Tensor, top: int = TOP_PATCHES) -> Tensor:
    """How well an image shows a text: the mean over its most similar patches (FILIP's late interaction, arXiv 2111.07783, for
    one vector per text). [T, B]."""
    return similarity_TBN.topk(top, dim=-1).values.mean(-1)


def image_loss(scores_TB: Tensor, absent_TB: Tensor) -> Tensor:
    """InfoNCE from text to image and back. Against its own image a text is held only where `absent` says that nothing of
    what it names is there: other images that show it, or a part of it, are no negatives."""
    pairs = torch.eye(len(scores_TB), dtype=torch.bool)
    logits = scores_TB.masked_fill(~(absent_TB | pairs), -torch.inf)
    own = torch.arange(len(scores_TB))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def patch_loss(similarity_BN: Tensor, named_BN: Tensor) -> Tensor:
    """InfoNCE within an image: each patch that shows what the image's text names, against all that do not. Every such patch
    is asked for by itself, so that an object's outline ranks high as well as its middle. Mean over patches, then images.
    """
    others = similarity_BN.masked_fill(named_BN, -torch.inf).logsumexp(-1, keepdim=True)
    each = F.softplus(others - similarity_BN) * named_BN
    return (each.sum(-1) / named_BN.sum(-1)).mean()
