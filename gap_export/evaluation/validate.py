"""Validation: a bundle against PyTorch, and against baselines that differ from it in one thing.

    Bundle -> Session -> ParityReport

What is measured and what is required stands in `parity.py`; this is the order in which it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gap_export import bounds
from gap_export.boxes import scenes
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.checkpoint.hub import resolve
from gap_export.environment import BUILD_PACKAGES, check_build_extra, versions
from gap_export.errors import BundleError, InputError
from gap_export.evaluation import parity, runner
from gap_export.evaluation.bundle_reports import PARITY, check_reports_can_be_written
from gap_export.evaluation.controls import applies, check_control, controls
from gap_export.files import scratch_folder
from gap_export.pipeline.build import RANDOM, build
from gap_export.positions import PositionPolicy
from gap_export.precision import Thresholds, hinted_gates
from gap_export.progress import SILENT, Progress
from gap_export.recipe.calibration import CALIBRATION
from gap_export.recipe.ranges import RANGES
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session, runtime, target_of
from gap_export.runtime.grounder import Grounded, Grounder

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer
    from gap_export.runtime.session import Session

CONTROL_CASES = 48
"""Cases each negative control is run on, rounded down to whole batches."""


class Opener(Protocol):
    """Loads a bundle into a runtime; see `open_session`."""

    def __call__(self, bundle: Bundle, backend: str, *, threads: int) -> Session:
        """The session."""
        ...


_BASELINES: dict[str, dict[str, Any]] = {
    "full": {"pruner": "none", "keep": 1.0, "prune_layers": ()},
    "shifted": {"positions": PositionPolicy.SHIFTED},
    "permuted": {"positions": PositionPolicy.PERMUTED},
    "gap": {"positions": PositionPolicy.GAP},
}
"""Name in the grounding table -> what a bundle of that name has otherwise."""


def validate(
    bundle: Bundle | Path | str,
    *,
    limit: int = 500,
    keep: float | None = None,
    backend: str = "onnxruntime",
    checkpoint: Path | None = None,
    text_tower: Path | None = None,
    batch: int = 16,
    threads: int = 0,
    progress: Progress = SILENT,
    opened: Opener = open_session,
) -> parity.ParityReport:
    """Bundle to parity report, which is also stored among the reports of the bundle.

    The bundle is compared with PyTorch on held-out scenes; then placements that are wrong on purpose must be noticed; then the
    bundle and baselines that differ from it in one thing each (nothing pruned, ids shifted, ids permuted) are scored.

    Args:
        bundle: opened, or its folder; every file is verified.
        limit: how many scenes.
        keep: fraction of visual tokens to keep, in bundles that let requests choose; their default when left out.
        backend: name of a runtime that runs bundles.
        checkpoint: where the weights lie; by default where the bundle was built from.
        text_tower: where the weights of the text tower lie, if there is one; by default where the bundle was built from.
        batch: rows per call, at most what the bundle was built for.
        threads: of ONNX Runtime; 0 lets it choose.
        progress: told of every stage and every answer.
        opened: how a bundle becomes a session.

    Returns:
        What was measured. Gates that are not met are in it; its `raise_for_gates` raises for them.

    Raises:
        GapExportError: something could not be run.
    """
    check_build_extra("validating a bundle")
    from gap_export.runtime.torch.reference import open_torch

    bounds.check(limit=limit, batch=batch, threads=threads)
    target_of(backend)  # PyTorch, which runs no bundle, is refused before anything else
    bundle = open_bundle(bundle, every_hash=True)
    check_reports_can_be_written(bundle, PARITY)
    manifest, hint = bundle.manifest, runtime(backend).hint
    # Gates that somebody chose hold whatever runs the bundle.
    thresholds = manifest.gates if manifest.recipe.gates else hinted_gates(manifest.gates, hint)
    recipe = _recipe_here(bundle, checkpoint, text_tower, keep)
    batch = min(batch, recipe.max_batch)
    questions, grounder = list(scenes.cases(limit)), Grounder(bundle)
    answer = partial(runner.run_cases, batch=batch, progress=progress)
    with opened(bundle, backend, threads=threads) as session:
        work = validation_work(limit, staged=bool(manifest.pruning.stages))
        progress.stage("answering with PyTorch", total=work)
        with open_torch(bundle, checkpoint=Path(recipe.checkpoint), text_tower=text_tower) as original:
            reference = answer(grounder, original, questions, keep=keep, keep_logits=True)
        progress.stage(f"answering with {backend}")
        runs = answer(grounder, session, questions, keep=keep, keep_logits=True)
        measured = parity.measure(runs, reference, questions, manifest, hint=hint)
        gates = parity.judge(measured, thresholds)
        caught, inapplicable = _run_controls(
            bundle,
            questions,
            runs,
            reference,
            partial(answer, grounder, session, keep=keep),
            thresholds,
            hint,
            batch,
            progress,
        )
    own = str(manifest.pruning.positions)
    others = _baselines(bundle, recipe, (own,), backend, partial(opened, threads=threads), progress)
    accuracy = {own: measured.accuracy, **_accuracies(others, answer, questions)}
    report = parity.ParityReport(
        ok=all(each.passed for each in gates) and all(each.caught for each in caught),
        manifest_sha256=bundle.manifest_sha256,
        bundle=manifest.name,
        backend=backend,
        precision=manifest.precision,
        measurement=measured,
        gates=gates,
        controls=caught,
        inapplicable_controls=inapplicable,
        grounding=parity.Grounding(
            **accuracy, cases=limit, kept=_mean_kept(runs), visual_tokens=manifest.spec.visual_tokens
        ),
        versions=versions(BUILD_PACKAGES),
    )
    report.write(bundle.reports / PARITY)
    return report


def _accuracies(
    baselines: Generator[tuple[str, Grounder, Session]],
    answer: Callable[..., list[Grounded]],
    questions: Sequence[scenes.Case],
) -> dict[str, float]:
    """Name -> accuracy of every baseline; each is closed before the next is opened."""
    with closing(baselines):
        return {
            name: runner.accuracy_of(answer(grounder, session, questions), questions)
            for name, grounder, session in baselines
        }


def validation_work(limit: int, *, staged: bool = False) -> int:
    """About how many answers `validate` makes."""
    wrong = len(controls(staged=staged))
    return limit * (2 + len(_BASELINES) - 1) + min(limit, CONTROL_CASES) * wrong


def _run_controls(
    bundle: Bundle,
    questions: Sequence[scenes.Case],
    runs: Sequence[Grounded],
    reference: Sequence[Grounded],
    answer: Callable[..., list[Grounded]],
    thresholds: Thresholds,
    hint: str,
    batch: int,
    progress: Progress,
) -> tuple[list[parity.Control], list[str]]:
    """Every wrong placement on the first scenes: whether it was noticed; and those that change nothing here."""
    manifest = bundle.manifest
    few_batches = max(1, CONTROL_CASES // batch)  # whole ones, to be compared with those of the reference
    few = questions[: few_batches * batch]
    caught, inapplicable = [], []
    for name, adjust in controls(staged=bool(manifest.pruning.stages)).items():
        if not applies(adjust, runs[0]):
            inapplicable.append(name)
            continue
        progress.stage(f"negative control: {name}")
        wrong = answer(few, adjust=adjust, keep_logits=True)
        measured = parity.measure(wrong, reference[:few_batches], few, manifest, hint=hint)
        caught.append(check_control(name, measured, thresholds))
    return caught, inapplicable


def _recipe_here(
    bundle: Bundle, checkpoint: Path | None, text_tower: Path | None, keep: float | None
) -> Recipe:
    """The recipe by which baselines are built: weights where they lie now, ranges and calibration text from the bundle itself, and the share that is kept here.

    Raises:
        BundleError: the weights are random.
        CheckpointError: they are not there any more.
    """
    manifest, recipe = bundle.manifest, bundle.manifest.recipe
    if manifest.checkpoint == RANDOM and checkpoint is None:
        raise BundleError(
            "holds random weights, which ground nothing",
            subject=str(bundle.folder),
            hint="measure it with `gap-export bench`; to compare it with PyTorch all the same, pass the folder of its weights: "
            "--checkpoint FOLDER",
        )
    if recipe.ranges is not None:
        recipe = recipe.replaced(ranges=str(bundle.folder / RANGES))
    if recipe.calibration is not None:
        recipe = recipe.replaced(calibration=str(bundle.folder / CALIBRATION))
    own = manifest.text_tower.checkpoint if manifest.text_tower is not None else None
    if text_tower is not None and own is None:
        raise InputError(
            "belongs to a bundle whose pruner reads the expression with a text tower, and this one has none",
            subject=f"text_tower {text_tower}",
            hint="leave it out",
        )
    if own is not None:
        recipe = recipe.replaced(text_tower=str(text_tower or resolve(own)))
    if manifest.pruning.keep_mode == "dynamic":  # baselines differ in one thing, and the count is not it
        recipe = recipe.replaced(keep=manifest.pruning.keep if keep is None else keep)
    return recipe.replaced(checkpoint=str(checkpoint or resolve(manifest.checkpoint)))


def _mean_kept(runs: Sequence[Grounded]) -> float:
    """Visual tokens that are left of an image, on average; the count itself where all keep the same."""
    counts = np.concatenate([runner.counts_of(run.generation.every_kept_indices[-1]) for run in runs])
    return round(float(counts.mean()), 2)


def _baselines(
    bundle: Bundle,
    recipe: Recipe,
    known: Container[str],
    backend: str,
    opened: Callable[[Bundle, str], Session],
    progress: Progress,
) -> Generator[tuple[str, Grounder, Session]]:
    """Every baseline whose accuracy is not known, loaded, by name; each is gone when the next one is asked for."""
    from gap_export.graph.trace_cache import Tracer
    from gap_export.graph.trace_folder import user_folder

    tracer = Tracer(user_folder())
    for name, changes in _BASELINES.items():
        if name in known:
            continue
        with (
            _baseline(bundle, recipe.replaced(**changes), backend, tracer, progress) as baseline,
            opened(baseline, backend) as session,
        ):
            progress.stage(f"answering with {name}")
            yield name, Grounder(baseline), session


@contextmanager
def _baseline(
    bundle: Bundle, recipe: Recipe, backend: str, tracer: Tracer, progress: Progress
) -> Iterator[Bundle]:
    """A bundle like the given one but for one thing, in a scratch folder beside it (so that weights can be linked)."""
    # A capacity that is just enough for the pruned prompt is too small for the whole one.
    recipe = recipe.model_copy(update={"capacity": None})
    with scratch_folder(beside=bundle.folder, purpose="baseline") as scratch:
        built = build(
            recipe.replaced(targets=(target_of(backend),)),
            scratch / "bundle",
            golden=False,
            tracer=tracer,
            progress=progress,
        )
        yield built.bundle
