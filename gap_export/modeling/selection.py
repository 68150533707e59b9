"""What every vision graph does with the features of its tower: select, and project what is left.

Shape letters: as in `prune/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gap_export import prune
from gap_export.modeling.attention import DECOMPOSED, IMPLEMENTATION
from gap_export.plan import Plan
from gap_export.prune import order


def pruner_of(plan: Plan) -> str:
    """The pruner that works before the decoder; what drops tokens inside it is shown all of them."""
    return "none" if plan.pruning.stages else plan.pruning.pruner


def tower_attention(plan: Plan) -> str:
    """Which attention the vision tower is built with."""
    return DECOMPOSED if prune.row(pruner_of(plan)).sequential else IMPLEMENTATION


def select(plan: Plan, features: prune.VisionFeatures[Tensor], keep_count: Tensor | None) -> prune.Selected:
    """What the pruner chooses, in its own order.

    Args:
        plan: of the build.
        features: of the batch.
        keep_count: where a call is told how many tokens to keep, or keep at most: [K] int64, traced for its extent.
    """
    name = pruner_of(plan)
    if plan.pruning.finds_count:
        bound = plan.pruning.max_tokens if keep_count is None else keep_count.shape[0]
        return prune.load_adaptive(name).select_adaptive(features, bound, merged_id=plan.pruning.merged_id)
    kept = plan.pruning.kept if keep_count is None else keep_count.shape[0]
    return prune.load(name).select(features, kept, seed=plan.pruning.seed, merged_id=plan.pruning.merged_id)


def project(
    plan: Plan,
    features: prune.VisionFeatures[Tensor],
    selected: prune.Selected,
    projector: Callable[[Tensor], Tensor],
) -> Tensor:
    """[B, K, H]: the selected tokens as the decoder takes them.

    Only they are projected, unless the pruner looks at projected ones, or has made tokens of such: projectors work token by token, so the
    order does not matter.
    """
    survivors_BKE = selected.patches_BKE
    if survivors_BKE is not None and features.embeds is not None:
        return survivors_BKE
    # Padding repeats the first patch: any token will do where nothing looks.
    indices_BK = selected.indices_BK.clamp(min=0)
    reads_projected = prune.row(pruner_of(plan)).reads_projected
    if survivors_BKE is None and reads_projected and features.projected is not None:
        return order.take(features.projected, indices_BK)
    if survivors_BKE is None:
        survivors_BKE = order.take(features.patches, indices_BK)
    projected_BKH: Tensor = projector(survivors_BKE)
    return projected_BKH


def select_and_project(
    plan: Plan,
    features: prune.VisionFeatures[Tensor],
    keep_count: Tensor | None,
    projector: Callable[[Tensor], Tensor],
) -> tuple[Tensor, prune.Selected]:
    """What is left of the image as the decoder takes it, in the order in which it enters.

    Args:
        plan: of the build.
        features: of the batch.
        keep_count: as of `select`.
        projector: from the tower's width to the decoder's.

    Returns:
        [B, K, H], and what was selected.
    """
    selected = order.in_decoder_order(select(plan, features, keep_count), plan.pruning.positions)
    return project(plan, features, selected, projector), selected


def outputs(embeds_BKH: Tensor, selected: prune.Selected) -> tuple[Tensor, ...]:
    """visual_embeds [B, K, H], kept_indices [B, K] and, where images differ in how many they keep, kept_counts [B], of a vision graph."""
    if selected.counts_B is None:
        return embeds_BKH, selected.indices_BK
    return embeds_BKH, selected.indices_BK, selected.counts_B
