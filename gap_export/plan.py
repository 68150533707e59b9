"""From a recipe and the sizes of a model to the numbers that shape the graphs, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from gap_export import prune
from gap_export.bundle.cache_layout import CacheLayout, in_slot_steps
from gap_export.bundle.graph_specs import GraphSpecs
from gap_export.bundle.manifest import KeepMode, ModelSpec, Pruning, Stage
from gap_export.errors import RecipeError
from gap_export.inputs.batch import TokenRange
from gap_export.inputs.prompt import TextTower
from gap_export.precision import Activations, one_of, precision
from gap_export.prune.in_decoder import schedules
from gap_export.recipe.ranges import CALIBRATE
from gap_export.recipe.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The numbers that shape a build's graphs, after recipe and checkpoint have been read.

    Attributes:
        activations: their element type, which is that of the graphs' inputs and outputs.
        pruning: what is pruned, how many tokens are kept and how they are numbered, as the manifest will say it.
        text_tower: for pruners that look at the expression; None for all others.
        capacity: cache slots C; of stage 0, where there are stages.
        static_cache: whether the cache always has all of them, and not as many as a request needs.
        max_text: text tokens of the longest prompt, placeholder included.
        max_batch: most rows per call.
        images: images in one prompt; all other numbers of visual tokens are those of one image.
    """

    activations: Activations
    pruning: Pruning
    text_tower: TextTower | None
    capacity: int
    static_cache: bool
    max_text: int
    max_batch: int
    images: int = 1

    def cache_layout(self, layers: int) -> CacheLayout:
        """Of a decoder with so many layers."""
        return self.pruning.cache_layout(layers, self.capacity, static=self.static_cache)

    def graph_specs(self, model: ModelSpec) -> GraphSpecs:
        """What the graphs take and give.

        Args:
            model: its sizes.
        """
        return GraphSpecs(
            model=model,
            dtype=self.activations.dtype,
            pruning=self.pruning,
            text_tower=self.text_tower,
            cache=self.cache_layout(model.layers),
            max_text=self.max_text,
            max_batch=self.max_batch,
            images=self.images,
        )


class _Counts(NamedTuple):
    """How many visual tokens an image keeps; see the fields of `Pruning` by these names."""

    keep_mode: KeepMode
    keep: float
    min_tokens: int
    kept: int
    max_tokens: int


def plan_for(recipe: Recipe, spec: ModelSpec, text_tower: TextTower | None = None) -> Plan:
    """The numbers that shape the graphs.

    Args:
        recipe: what to build.
        spec: sizes of the model.
        text_tower: what reads the expression, where the pruner looks at it: of the recipe's CLIP checkpoint, or the decoder's embedding.

    Raises:
        RecipeError: numbers that contradict each other or the model.
    """
    _check_engines(recipe)
    _check_ranges(recipe)
    _check_calibration(recipe)
    pruner = prune.row(recipe.pruner).on_tower(spec.missing_features)
    prune.check_tower(pruner, spec.missing_features)
    prune.check_text(
        pruner,
        spec.missing_features,
        has_text_tower=text_tower is not None,
        published=spec.published_tower,
    )
    first_layers = schedules.layers_for(recipe.pruner, spec.layers, recipe.prune_layers)
    counts = (
        _counts(recipe, pruner, spec)
        if spec.token_range is None
        else _counts_of_range(recipe, pruner, spec, spec.token_range)
    )
    _check_several(recipe, spec)
    _check_mask(recipe, pruner, spec)
    capacity = _capacity(recipe, spec, counts.max_tokens)
    pruning = Pruning(
        pruner=recipe.pruner,
        **counts._asdict(),
        keep_range=(recipe.keep[0], recipe.keep[-1]) if isinstance(recipe.keep, tuple) else None,
        pruner_min_tokens=pruner.min_tokens,
        positions=recipe.positions,
        seed=recipe.seed,
        merged=pruner.merged,
        merged_id=recipe.merged_id,
        stages=_stages(recipe, spec, counts, first_layers, capacity),
    )
    return Plan(
        activations=precision(recipe.precision).activations,
        pruning=pruning,
        text_tower=text_tower,
        capacity=capacity,
        static_cache=recipe.has_static_cache,
        max_text=recipe.max_text,
        max_batch=recipe.max_batch,
        images=recipe.images,
    )


def _capacity(recipe: Recipe, spec: ModelSpec, max_tokens: int) -> int:
    """Cache slots C, for the longest prompt and the longest answer.

    Args:
        recipe: what to build.
        spec: sizes of the model.
        max_tokens: most visual tokens that an image keeps.

    Raises:
        RecipeError: fewer were asked for than that, or the unpruned prompt has more positions than the model knows.
    """
    text_tokens = recipe.max_text - recipe.images + recipe.max_new_tokens
    longest_answer = text_tokens + recipe.images * spec.visual_tokens
    if longest_answer > spec.max_positions:
        raise RecipeError(
            f"positions up to {longest_answer} are needed (unpruned), the model knows {spec.max_positions}",
            subject="max_text + max_new_tokens",
            hint="lower --max-text or --max-new-tokens",
        )
    # One slot more than the longest answer needs: `validate` writes one too far on purpose.
    needed = text_tokens + recipe.images * max_tokens + 1
    if recipe.capacity is not None and recipe.capacity < needed:
        raise RecipeError(
            f"is too small: {recipe.max_text} text tokens, {recipe.images * max_tokens} visual tokens and "
            f"{recipe.max_new_tokens} new tokens need {needed}",
            subject=f"capacity {recipe.capacity}",
            hint=f"use at least {needed}, or lower --max-text, --keep or --max-new-tokens",
        )
    return recipe.capacity or in_slot_steps(needed)


def _check_mask(recipe: Recipe, pruner: prune.Pruner, spec: ModelSpec) -> None:
    """Refuse to drop tokens inside a decoder whose mask would have to be laid out anew for every stage."""
    if pruner.in_decoder and spec.attention_mask != "causal":
        raise RecipeError(
            f"drops tokens inside the decoder, and this one's attention mask ({spec.attention_mask}) is laid out for all of them",
            subject=f"pruner {pruner.name}",
            hint=f"use one that works before the decoder: {_before_decoder(recipe, spec)}",
        )


def _before_decoder(recipe: Recipe, spec: ModelSpec) -> str:
    """The pruners that work before this model's decoder, with the text tower that the recipe has or has not."""
    able = prune.working(
        spec.missing_features,
        lambda row: not row.in_decoder and (recipe.text_tower is not None or not row.needs_text),
    )
    return ", ".join(able)


def _check_several(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuse prompts with several images where the model or the prompt has one."""
    if recipe.images == 1:
        return
    subject = f"images {recipe.images}"
    if spec.token_range is None:
        raise RecipeError(
            "is more than this model takes: it knows prompts with one image",
            subject=subject,
            hint="leave it out, or use a model whose images may differ in size",
        )
    if recipe.prompt is None:
        raise RecipeError(
            "needs a prompt with a placeholder for every image, and the model's own has one",
            subject=subject,
            hint="write the whole prompt into the recipe (prompt:)",
        )
    if recipe.images >= recipe.max_text:
        raise RecipeError(
            f"leaves no space for text: max_text is {recipe.max_text}, and a placeholder counts as one",
            subject=subject,
            hint="raise --max-text",
        )


def _counts(recipe: Recipe, pruner: prune.Pruner, spec: ModelSpec) -> _Counts:
    """Where all images have the same number of visual tokens."""
    visual_tokens = spec.visual_tokens
    if recipe.keep == "adaptive":
        prune.check_adaptive(pruner, spec.missing_features)
        bound = prune.kept_count(recipe.keep_bound, visual_tokens)
        prune.check_count(pruner, bound, visual_tokens)
        return _Counts("adaptive", recipe.keep_bound, pruner.min_tokens, bound, bound)
    if isinstance(recipe.keep, float | int):
        kept = prune.kept_count(recipe.keep, visual_tokens)
        prune.check_count(pruner, kept, visual_tokens)
        if pruner.in_decoder:  # what is dropped inside the decoder enters it
            kept = visual_tokens
        return _Counts("fixed", recipe.keep, kept, kept, kept)
    smallest, default, largest = recipe.keep
    least, kept, most = (prune.kept_count(keep, visual_tokens) for keep in recipe.keep)
    for count in (least, most):
        prune.check_count(pruner, count, visual_tokens)
    if least == most:
        raise RecipeError(
            f"is {most} of {visual_tokens} tokens at both ends",
            subject=f"keep {smallest:g}:{largest:g}",
            hint="give a wider range, or one fraction",
        )
    if pruner.in_decoder:
        least = kept = most = visual_tokens
    return _Counts("dynamic", default, least, kept, most)


def _counts_of_range(recipe: Recipe, pruner: prune.Pruner, spec: ModelSpec, tokens: TokenRange) -> _Counts:
    """Where images differ in how many visual tokens they have: every image keeps the same share, or at most that."""
    keep_mode: KeepMode
    if recipe.keep == "adaptive":
        prune.check_adaptive(pruner, spec.missing_features)
        if tokens.never_pruned and not recipe.positions.keeps_raster_order:
            raise RecipeError(
                "leaves tokens in the order of their scores, and ends of lines would stand behind those that an image does not need",
                subject="positions permuted, keep adaptive",
                hint="use gap or shifted, or a fixed --keep",
            )
        keep_mode, keeps = "bounded", (recipe.keep_bound,) * 3
    elif isinstance(recipe.keep, tuple):
        keep_mode, keeps = "dynamic", recipe.keep
    else:
        keep_mode, keeps = "ratio", (recipe.keep,) * 3
    for keep in keeps:
        prune.check_fraction(keep)
    # What is dropped inside the decoder enters it.
    smallest, default, largest = (1.0,) * 3 if pruner.in_decoder else keeps
    least = prune.share_of(smallest, tokens.min_tokens, pruner.min_tokens)
    typical = prune.share_of(default, tokens.typical_tokens, pruner.min_tokens) + tokens.never_pruned
    # The image with most patches is not the one with most rows, and neither has more tokens than the largest.
    most = prune.share_of(largest, tokens.max_tokens, pruner.min_tokens) + tokens.never_pruned
    most = min(most, spec.visual_tokens)
    if keep_mode == "bounded":
        least = min(pruner.min_tokens, tokens.min_tokens)
    return _Counts(keep_mode, keeps[1], least, typical, most)


def _stages(
    recipe: Recipe, spec: ModelSpec, counts: _Counts, first_layers: tuple[int, ...], capacity: int
) -> tuple[Stage, ...]:
    """Stage 0 with every token, and one for each cut. A later stage has as many slots to spare as stage 0, or a few more.

    Args:
        recipe: what to build.
        spec: sizes of the model.
        counts: of what enters the decoder.
        first_layers: of the later stages; none for pruners before the decoder.
        capacity: slots of stage 0.

    Raises:
        RecipeError: a share of which some stage has nothing left.
    """
    if not first_layers:
        return ()

    schedule = prune.row(recipe.pruner).load_schedule()
    keeps = recipe.keep if isinstance(recipe.keep, tuple) else (counts.keep,) * 3
    if spec.token_range is None:
        for keep in keeps:  # of images of one size, a share that leaves nothing is refused
            schedules.cuts_for(
                recipe.pruner,
                keep,
                visual_tokens=counts.kept,
                layers=spec.layers,
                prune_layers=recipe.prune_layers,
            )
    typical = (counts.kept, *schedule.counts(keeps[1], counts.kept))
    most = (counts.max_tokens, *schedule.most(keeps[0], keeps[-1], counts.max_tokens))
    merged = (0, *(schedule.merged(before, kept) or 0 for before, kept in pairwise(typical)))
    return tuple(
        Stage(
            first_layer=first,
            layers=end - first,
            kept=kept,
            max_kept=max_kept,
            merged=of_these,
            capacity=min(capacity, in_slot_steps(capacity - recipe.images * (counts.max_tokens - max_kept))),
        )
        for first, end, kept, of_these, max_kept in zip(
            (0, *first_layers), (*first_layers, spec.layers), typical, merged, most, strict=True
        )
    )


def _check_engines(recipe: Recipe) -> None:
    """TensorRT reads no integers that are made while running, and its half-precision kernels want activations to match."""
    engines = [target for target in recipe.targets if target != "onnx"]
    row = precision(recipe.precision)
    if engines and not row.engines:
        raise RecipeError(
            f"runs in ONNX Runtime, not in {' or '.join(engines)}",
            subject=f"precision {row.name}",
            hint=f"build engines with --precision {one_of(lambda each: each.engines)}, or leave --target out",
        )
    smallest = row.min_compute_capability or 0
    too_old = [each for each in recipe.devices if each[:1].isdigit() and float(each) < smallest]
    if engines and too_old:
        raise RecipeError(
            f"is not known to GPUs of compute capability {', '.join(too_old)}",
            subject=f"precision {row.name}",
            hint=f"build for {smallest} or later, or leave compute_capabilities out of the recipe",
        )


def _check_ranges(recipe: Recipe) -> None:
    """Ranges go with precisions that have use for them, and those with ranges."""
    row = precision(recipe.precision)
    if row.needs_ranges and recipe.ranges is None:
        raise RecipeError(
            "needs activation ranges (--ranges)", subject=f"precision {row.name}", hint=CALIBRATE
        )
    if recipe.ranges is not None and not row.needs_ranges:
        raise RecipeError(
            "has no use for ranges of activations",
            subject=f"precision {row.name}",
            hint=f"leave --ranges out, or build with --precision {one_of(lambda each: each.needs_ranges)}",
        )


def _check_calibration(recipe: Recipe) -> None:
    """A calibration text goes with precisions whose rounding can be compensated."""
    row = precision(recipe.precision)
    if recipe.calibration is not None and not row.takes_calibration:
        raise RecipeError(
            "has no use for a calibration text",
            subject=f"precision {row.name}",
            hint=f"leave --calibration out, or build with --precision {one_of(lambda each: each.takes_calibration)}",
        )
