"""Pruners and shares together, over a user's own data: accuracy against time to the first token.

One bundle after the other is built, evaluated, measured beside the unpruned model and removed. Times of different moments do not compare, so that of
the unpruned model is measured in the same interleaved rounds as every bundle's, and a point counts by the ratio of both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gap_export import bounds, prune
from gap_export.bundle.folder import BUNDLE, Bundle
from gap_export.environment import BUILD_PACKAGES, check_build_extra, cpu_name, versions
from gap_export.errors import GapExportError
from gap_export.evaluation import plotting
from gap_export.evaluation.latency.candidate import candidate
from gap_export.evaluation.recommend.bundle import KEEPS
from gap_export.evaluation.recommend.choose import choose_pruner
from gap_export.evaluation.recommend.plot import figure
from gap_export.evaluation.recommend.record import LeftOut, Recommendation
from gap_export.evaluation.recommend.request import BASELINE, Place, PrunerRequest, Variant, plan_variants
from gap_export.evaluation.recommend.store import RECOMMENDATION_FOLDER, Settings, Store, open_store
from gap_export.evaluation.recommend.times import WARMUP, first_token_ms
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.evaluation.refer.evaluate import evaluate, questions_of
from gap_export.evaluation.refer.protocols import protocol_of
from gap_export.evaluation.refer.results import EvalRun, check_pyarrow
from gap_export.evaluation.refer.run import Work
from gap_export.evaluation.sweep.request import all_pruners
from gap_export.files import FolderLock, check_folder, is_file, scratch_folder
from gap_export.pipeline.build import build
from gap_export.pipeline.opened import OpenedModel, open_model
from gap_export.progress import SILENT, Prefixed, Progress
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session

RECORD, PLOT = "recommend.json", "recommend.png"


@dataclass(frozen=True)
class Prepared:
    """A recommendation that can be made, or resumed.

    Attributes:
        request: what is tried.
        dataset: that is asked about.
        work: expressions by image, all of them asked at every point, and what is left out.
        store: its folder.
        variants: bundles, the unpruned one first.
        left_out: what cannot be.
        lock: of the folder, until all has run.
    """

    request: PrunerRequest
    dataset: Dataset
    work: Work
    store: Store
    variants: tuple[Variant, ...]
    left_out: tuple[LeftOut, ...]
    lock: FolderLock

    @property
    def points(self) -> list[Place]:
        """Of all bundles, the unpruned one first."""
        return [place for variant in self.variants for place in variant.points]

    def remaining(self, variant: Variant) -> list[Place]:
        """Points of a bundle that are not finished."""
        return [place for place in variant.points if place not in self.store]


def recommend_pruner(
    recipe: Recipe,
    out: Path | str,
    dataset: Dataset | None = None,
    *,
    pruners: Sequence[str] | None = None,
    keeps: Sequence[float] = KEEPS,
    max_accuracy_drop: float = 0.02,
    protocol: str = "unc",
    limit: int | None = None,
    requests: int = 30,
    backend: str = "onnxruntime",
    threads: int = 0,
    rescale_boxes: bool = False,
    plot: bool = True,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Recommendation:
    """The pruner and the share of visual tokens whose first token comes soonest within the accuracy tolerance. Can be interrupted; the same call resumes.

    Args:
        recipe: all but pruner and share.
        out: folder for evaluations, times and what comes of them; finished points in it are kept.
        dataset: 2000 generated scenes with seven expressions each when left out.
        pruners: names; all but `none` when left out, which all are compared with.
        keeps: fractions of the visual tokens; 1 is that of the unpruned model, which is always there.
        max_accuracy_drop: loss against the unpruned model that is allowed, with all of its 95 % interval.
        protocol: under which answers are scored.
        limit: only so many expressions.
        requests: per share, whose time is measured.
        backend: name of a runtime that runs bundles.
        threads: of the runtime; 0 lets it choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations; refused otherwise.
        plot: draw it (needs matplotlib).
        replace: throw a recommendation of other settings in that folder away.
        progress: told of every answer and every round.

    Returns:
        What was tried and which of it to take, also stored in the folder.

    Raises:
        GapExportError: the request, the checkpoint, the data set or the folder cannot be used, or a bundle could not be built or asked.
    """
    request = PrunerRequest(
        recipe=recipe,
        pruners=all_pruners() if pruners is None else tuple(pruners),
        keeps=tuple(keeps),
        backend=backend,
        protocol=protocol,
        limit=limit,
        requests=requests,
        threads=threads,
        rescale_boxes=rescale_boxes,
    )
    bounds.check(max_accuracy_drop=max_accuracy_drop)
    prepared = prepare(request, dataset or open_dataset("scenes:7"), Path(out), replace=replace, plot=plot)
    return run(prepared, max_accuracy_drop=max_accuracy_drop, plot=plot, progress=progress)


def prepare(
    request: PrunerRequest, dataset: Dataset, out: Path, *, replace: bool = False, plot: bool = True
) -> Prepared:
    """Check everything that can be checked before the long part, and open the folder.

    Args:
        request: what is to be tried.
        dataset: with images.
        out: folder; finished points in it are kept.
        replace: throw a recommendation of other settings away.
        plot: whether a plot will be drawn.

    Raises:
        GapExportError: the request, the checkpoint, the data set or the folder cannot be used, or what is needed is not installed.
    """
    check_build_extra("a recommendation among pruners")
    check_pyarrow()
    if plot:
        plotting.check_matplotlib("pip install 'gap-export[report]', or pass --no-plot")
    check_folder(out, RECOMMENDATION_FOLDER, replaced=False, outside=(BUNDLE,))
    reads_text = any(prune.row(name).needs_text for name in request.pruners)
    model = open_model(request.recipe, reads_text=reads_text)
    protocol_of(request.protocol, model.box)
    variants, left_out = plan_variants(request, model.spec, model.text_tower)
    questions = questions_of(dataset, limit=request.limit, rescale_boxes=request.rescale_boxes)
    lock = FolderLock(out)
    with lock.kept():
        store = open_store(out, _settings(request, dataset, model), replace=replace)
    return Prepared(request, dataset, questions.work, store, (BASELINE, *variants), tuple(left_out), lock)


def run(
    prepared: Prepared,
    *,
    max_accuracy_drop: float = 0.02,
    plot: bool = True,
    progress: Progress = SILENT,
    finished: Callable[[Place, EvalRun, float], None] = lambda place, run, speedup: None,
    failed: Callable[[LeftOut], None] = lambda left_out: None,
) -> Recommendation:
    """Ask and measure what is not finished, then write record and plot into the folder.

    Args:
        prepared: by `prepare`.
        max_accuracy_drop: loss against the unpruned model that is allowed, with all of its 95 % interval.
        plot: draw it.
        progress: told of every stage, every answer and every round.
        finished: told of every point that was finished now, with its evaluation and how many times as fast its first token comes.
        failed: told of every bundle that could not be built, and is left out.

    Raises:
        GapExportError: a finished point is damaged, the unpruned bundle or none of the others could be built, or one could not be asked. What was
            answered and measured before is kept.
    """
    store, request = prepared.store, prepared.request
    not_built: list[LeftOut] = []
    with prepared.lock, scratch_folder(beside=store.folder, purpose="sweeping") as scratch:
        for place in prepared.points:
            if place in store:
                store.measured(place)  # what is damaged is to be known before the long work
        remaining = {variant: prepared.remaining(variant) for variant in prepared.variants}
        remaining = {variant: places for variant, places in remaining.items() if places}
        if remaining:
            expressions = len(prepared.work.expressions) * sum(map(len, remaining.values()))
            progress.stage("starting", total=expressions + (WARMUP + request.requests) * len(remaining))
            work = _Work(prepared, scratch, progress)
            first_error: GapExportError | None = None
            for variant, places in remaining.items():
                try:
                    bundle = work.built(variant)
                except GapExportError as error:
                    if variant == BASELINE:
                        raise
                    first_error = first_error or error
                    not_built.append(_not_built(variant, places, error))
                    failed(not_built[-1])
                    progress.advance(len(prepared.work.expressions) * len(places) + WARMUP + request.requests)
                    continue
                for place, answered, speedup in work(bundle, variant, places):
                    finished(place, answered, speedup)
            if first_error is not None and not any(place in store for place in prepared.points[1:]):
                raise first_error
        record = choose_pruner(
            [store.measured(place) for place in prepared.points if place in store],
            max_accuracy_drop,
            ttft_ms=store.finished(BASELINE.points[0]).ttft_ms,
            left_out=(*prepared.left_out, *not_built),
        )
        if not _is_written(store.folder / RECORD, record.text()):
            store.results.remove(PLOT)  # it is of another record, and may not be drawn anew
        store.results.write(RECORD, record.text())
        if plot:
            store.results.write(PLOT, plotting.png(figure(record)))
        return record


def _not_built(variant: Variant, places: Sequence[Place], error: GapExportError) -> LeftOut:
    return LeftOut(
        pruner=variant.pruner,
        keeps=tuple(place.keep for place in places),
        reason=f"could not be built: {error.subject}: {error.message}",
    )


def _is_written(path: Path, content: str) -> bool:
    return is_file(path) and path.read_bytes() == content.encode()


class _Work:
    """Builds bundles, and asks and measures each; the unpruned one stays until the end, to be measured beside the others.

    Args:
        prepared: what there is to do.
        scratch: where bundles lie.
        progress: told of every stage, every answer and every round.
    """

    def __init__(self, prepared: Prepared, scratch: Path, progress: Progress) -> None:
        from gap_export.graph.trace_cache import Tracer
        from gap_export.graph.trace_folder import user_folder

        self._prepared, self._scratch, self._progress = prepared, scratch, progress
        self._tracer = Tracer(user_folder())
        self._baseline = self._built(BASELINE)

    def built(self, variant: Variant) -> Bundle:
        """One bundle; that of the unpruned model is there already.

        Raises:
            GapExportError: names the bundle.
        """
        return self._baseline if variant == BASELINE else self._built(variant)

    def __call__(
        self, bundle: Bundle, variant: Variant, places: Sequence[Place]
    ) -> list[tuple[Place, EvalRun, float]]:
        """Finish points of one bundle: each with its evaluation and how many times as fast its first token comes.

        Raises:
            GapExportError: names the bundle.
        """
        with _named(variant):
            runs = [self._evaluated(bundle, variant, place) for place in places]
            times = self._timed(bundle, variant, places)
        for place, answered, pair in zip(places, runs, times, strict=True):
            self._prepared.store.save(place, bundle.manifest_sha256, answered, pair)
        if variant != BASELINE:
            shutil.rmtree(bundle.folder)
        return [
            (place, answered, baseline / own)
            for place, answered, (own, baseline) in zip(places, runs, times, strict=True)
        ]

    def _built(self, variant: Variant) -> Bundle:
        with _named(variant):
            return build(
                variant.recipe(self._prepared.request),
                self._scratch / variant.name,
                golden=False,
                tracer=self._tracer,
                progress=Prefixed(self._progress, variant.label),
            ).bundle

    def _evaluated(self, bundle: Bundle, variant: Variant, place: Place) -> EvalRun:
        request = self._prepared.request
        return evaluate(
            bundle,
            self._prepared.dataset,
            out=self._prepared.store.evaluation(place),
            protocol=request.protocol,
            backend=request.backend,
            keep=variant.keep_of(place),
            limit=request.limit,
            threads=request.threads,
            rescale_boxes=request.rescale_boxes,
            replace=True,  # an evaluation that another list of fractions left unfinished, on another build
            progress=Prefixed(self._progress, place.label),
        )

    def _timed(self, bundle: Bundle, variant: Variant, places: Sequence[Place]) -> list[tuple[float, float]]:
        """Median time to the first token of every point, and of the unpruned model in the same rounds, ms."""
        request = self._prepared.request
        progress = Prefixed(self._progress, variant.label)
        with open_session(self._baseline, request.backend, threads=request.threads) as unpruned:
            candidates = [candidate(BASELINE.label, self._baseline, unpruned)]
            if variant == BASELINE:
                (own,) = first_token_ms(candidates, requests=request.requests, progress=progress).values()
                return [(own, own)]
            with open_session(bundle, request.backend, threads=request.threads) as session:
                candidates += [
                    candidate(place.label, bundle, session, keep=variant.keep_of(place)) for place in places
                ]
                times = first_token_ms(candidates, requests=request.requests, progress=progress)
        return [(times[place.label], times[BASELINE.label]) for place in places]


@contextmanager
def _named(variant: Variant) -> Iterator[None]:
    """Errors name the bundle that they are of."""
    try:
        yield
    except GapExportError as error:
        error.subject = f"{variant.label}: {error.subject}"
        raise


def _settings(request: PrunerRequest, dataset: Dataset, model: OpenedModel) -> Settings:
    text_tower = model.checkpoint.companions.get("text_tower")
    tried = {"pruner", "keep", "capacity", "targets"}
    return Settings(
        recipe=request.recipe.model_dump(mode="json", exclude=tried),
        checkpoint_sha256=model.checkpoint.files_sha256(),
        text_tower_sha256=None if text_tower is None else text_tower.files_sha256(),
        annotations=dataset.identity,
        split=dataset.split,
        ignore_exif=dataset.ignore_exif,
        rescale_boxes=request.rescale_boxes,
        limit=request.limit,
        protocol=request.protocol,
        backend=request.backend,
        threads=request.threads,
        requests=request.requests,
        processor=cpu_name(),
        versions=versions(BUILD_PACKAGES),
    )
