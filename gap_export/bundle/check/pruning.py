"""Pruning, against the model and the cache: how many tokens are kept, by whose choice, and in which stages."""

from __future__ import annotations

import itertools

from gap_export.bundle.check.limits import Faults
from gap_export.bundle.manifest import Manifest, Pruning, Stage
from gap_export.errors import shown
from gap_export.inputs.layouts import TokenRange


def pruning_faults(manifest: Manifest) -> Faults:
    """What is wrong with the pruning of a model whose sizes are known to be well."""
    pruning, model = manifest.pruning, manifest.spec
    if not 0 < pruning.keep <= 1:
        yield f"pruning.keep is {pruning.keep}, and is above 0 and at most 1"
    if not 1 <= pruning.min_tokens <= pruning.kept <= pruning.max_tokens <= model.visual_tokens:
        yield (
            f"pruning keeps {shown((pruning.min_tokens, pruning.kept, pruning.max_tokens))} (min_tokens, kept, max_tokens) "
            f"of {model.visual_tokens} visual tokens"
        )
    if not 0 <= pruning.merged <= pruning.min_tokens:
        yield f"pruning.merged is {shown(pruning.merged)}, of {pruning.min_tokens} kept tokens"
    if (pruning.keep_mode == "dynamic") != (pruning.keep_range is not None):
        yield f"pruning.keep_range is {shown(pruning.keep_range)} where keep_mode is {pruning.keep_mode}"
    if pruning.keep_range is not None:
        least, most = pruning.keep_range
        if not 0 < least <= pruning.keep <= most <= 1:
            yield f"pruning.keep_range is {shown(pruning.keep_range)} around keep {pruning.keep}"
    differ = model.token_range is not None
    if pruning.keep_mode not in (
        ("ratio", "dynamic", "bounded") if differ else ("fixed", "dynamic", "adaptive")
    ):
        images = "images differ in size" if differ else "images are of one size"
        yield f"pruning.keep_mode is {pruning.keep_mode}, and {images}"
    counts, told = (
        _counts(pruning, model.visual_tokens, model.token_range),
        (
            pruning.min_tokens,
            pruning.kept,
            pruning.max_tokens,
        ),
    )
    if told != counts:
        yield f"pruning keeps {shown(told)} tokens (min_tokens, kept, max_tokens), and keep {pruning.keep:g} of them is {shown(counts)}"
    if pruning.stages:
        yield from _stage_faults(manifest, pruning.stages)


def _counts(pruning: Pruning, visual_tokens: int, tokens: TokenRange | None) -> tuple[int, int, int]:
    """(smallest, default, largest) count that the fractions of a pruning give."""
    smallest, largest = pruning.keep_range or (pruning.keep, pruning.keep)
    typical = pruning.keep
    if pruning.stages:  # what is dropped inside the decoder enters it
        smallest = typical = largest = 1.0
    if tokens is None:
        least, kept, most = (_nearest(share, visual_tokens) for share in (smallest, typical, largest))
        return (pruning.pruner_min_tokens if pruning.keep_mode == "adaptive" else least), kept, most

    def share_of(share: float, count: int) -> int:
        return min(count, max(pruning.pruner_min_tokens, _nearest(share, count)))

    never = tokens.never_pruned
    return (
        min(pruning.pruner_min_tokens, tokens.min_tokens)
        if pruning.finds_count
        else share_of(smallest, tokens.min_tokens),
        share_of(typical, tokens.typical_tokens) + never,
        min(visual_tokens, share_of(largest, tokens.max_tokens) + never),
    )


def _nearest(share: float, count: int) -> int:
    return int(share * count + 0.5)


def _stage_faults(manifest: Manifest, stages: tuple[Stage, ...]) -> Faults:
    model, pruning, capacity = manifest.spec, manifest.pruning, manifest.capacity
    if pruning.finds_count:
        yield f"pruning.keep_mode is {pruning.keep_mode}, and stages keep a share of every image"
    if model.attention_mask != "causal":
        yield f"pruning.stages are given, and the attention mask is {model.attention_mask}"
    ends = [0, *itertools.accumulate(stage.layers for stage in stages)]
    if [stage.first_layer for stage in stages] != ends[:-1] or ends[-1] != model.layers:
        yield f"pruning.stages have the layers {shown(tuple((s.first_layer, s.layers) for s in stages))} (first, how many) of {model.layers}"
    first, images = stages[0], manifest.prompt.images
    entering = (pruning.kept, pruning.max_tokens, capacity)
    if (first.kept, first.max_kept, first.capacity) != entering:
        yield (
            f"pruning.stages.0 has {shown((first.kept, first.max_kept, first.capacity))} (kept, max_kept, capacity), "
            f"and the decoder {shown(entering)}"
        )
    for number, stage in enumerate(stages):
        if stage.kept > stage.max_kept or (stage.kept < stage.max_kept and not pruning.stage_counts_are_told):
            yield f"pruning.stages.{number} keeps {stage.kept} and at most {stage.max_kept}, where keep_mode is {pruning.keep_mode}"
        if stage.merged > (stage.kept if number else 0):
            yield f"pruning.stages.{number}.merged is {stage.merged}, of {stage.kept} tokens"
    for number, (before, stage) in enumerate(itertools.pairwise(stages), 1):
        if stage.kept > before.kept or stage.max_kept > before.max_kept:
            yield (
                f"pruning.stages.{number} keeps {shown((stage.kept, stage.max_kept))} (kept, max_kept), more than the "
                f"{shown((before.kept, before.max_kept))} before"
            )
        gone = images * (first.max_kept - stage.max_kept)
        if not capacity - gone <= stage.capacity <= before.capacity:
            yield f"pruning.stages.{number}.capacity is {stage.capacity}, after {before.capacity} slots for {gone} more tokens"
