"""An expression by the decoder's own token embedding: for pruners that look at it, where no text tower shares a space with the vision tower.

The relevance of a visual token is its cosine with the mean of the embeddings of the expression's tokens, as CDPruner (arXiv 2506.10967, section 3.3)
has it for models with a vision encoder alone; there the mean is over the whole instruction. Of the expression alone it is not the same for all
questions, which the frame of a prompt would make it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize

from gap_export import prune
from gap_export.plan import Plan


def embedding_for(plan: Plan, embedding: nn.Module) -> nn.Module | None:
    """The token embedding, where the plan's pruner reads text by it.

    Args:
        plan: of the build.
        embedding: of the decoder.
    """
    return embedding if plan.text_tower is not None and plan.text_tower.kind == "embeddings" else None


def with_text(
    features: prune.VisionFeatures[Tensor], embedding: nn.Module | None, text_ids: Tensor | None
) -> prune.VisionFeatures[Tensor]:
    """Features with the space that projected tokens and embeddings of text share; as they are, where no text is read.

    Args:
        features: with projected tokens.
        embedding: of the decoder; None where no text is read.
        text_ids: [B, L] int64 of the expressions, short rows filled with -1.
    """
    if embedding is None or text_ids is None:
        return features
    return prune.changed(
        features,
        aligned=lambda: normalize(features.projected.float(), dim=-1),  # type: ignore[union-attr]
        text=lambda: normalize(mean_embedding(embedding, text_ids), dim=-1),
        aligned_inversely=False,
    )


def mean_embedding(embedding: nn.Module, text_ids: Tensor) -> Tensor:
    """[B, H] float32, mean of the embeddings of every row's tokens.

    Args:
        embedding: of the decoder.
        text_ids: [B, L] int64, short rows filled with -1.
    """
    filled_BL1 = (text_ids >= 0).float()[..., None]
    embeds_BLH = embedding(text_ids.clamp(min=0)).float() * filled_BL1
    mean_BH: Tensor = embeds_BLH.sum(dim=1) / filled_BL1.sum(dim=1)
    return mean_BH
