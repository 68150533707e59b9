"""Every pruner at every count under every position policy: accuracy of the exported graphs on held-out scenes.

A point is one bundle, built and answered like any other: no number comes from anything but its graphs in the runtime. What
makes a sweep quick is that equal components are traced once per process (`graph.trace_cache.Tracer`): the decoder does not
depend on the pruner, nor the vision graph on how the kept tokens are numbered, so that most points trace one graph or two.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gap_export import prune
from gap_export.boxes import metrics, scenes
from gap_export.bundle.folder import BUNDLE
from gap_export.checkpoint import Checkpoint
from gap_export.environment import BUILD_PACKAGES, check_build_extra, versions
from gap_export.errors import GapExportError
from gap_export.evaluation import plotting, runner
from gap_export.evaluation.sweep.plot import figure
from gap_export.evaluation.sweep.record import (
    Answers,
    Settings,
    Skipped,
    SweepPoint,
    SweepRecord,
    record_from_answers,
)
from gap_export.evaluation.sweep.request import KEEPS, SweepRequest, all_pruners, plan_points
from gap_export.evaluation.sweep.show import page
from gap_export.evaluation.sweep.store import SWEEP, Store, open_store
from gap_export.files import (
    FolderLock,
    check_folder,
    scratch_folder,
)
from gap_export.parallel import dispatch
from gap_export.parallel.ray import Cluster
from gap_export.pipeline.build import build
from gap_export.pipeline.opened import open_model
from gap_export.positions import PositionPolicy
from gap_export.progress import SILENT, Prefixed, Progress
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import check_overflow
from gap_export.runtime.grounder import Grounded, Grounder

RECORD, PAGE, PLOT = "sweep.json", "sweep.md", "sweep.png"


def sweep(
    recipe: Recipe,
    out: Path | str,
    *,
    pruners: Sequence[str] | None = None,
    keeps: Sequence[float] = KEEPS,
    positions: Sequence[PositionPolicy] = tuple(PositionPolicy),
    backend: str = "onnxruntime",
    limit: int = 500,
    batch: int = 16,
    threads: int = 1,
    workers: int = 1,
    cluster: Cluster | None = None,
    plot: bool = True,
    replace: bool = False,
    progress: Progress = SILENT,
) -> SweepRecord:
    """Accuracy of many pruners at many keep ratios under every position policy. Can be interrupted; the same call resumes.

    Args:
        recipe: all that is not swept.
        out: folder of the sweep; finished points in it are kept.
        pruners: names; all but `none` when left out, which is the reference of every sweep.
        keeps: fractions of visual tokens kept.
        positions: policies.
        backend: name of a runtime that runs bundles.
        limit: held-out scenes per point.
        batch: images per call.
        threads: of ONNX Runtime, in every process; 0 lets it choose.
        workers: processes that points are dispatched to; results do not depend on it.
        cluster: of Ray, to dispatch them to instead.
        plot: draw it (needs matplotlib).
        replace: throw a sweep of other settings in that folder away.
        progress: told of every stage, and of every answer.

    Returns:
        The record, which is also stored in the folder.

    Raises:
        GapExportError: the request, the checkpoint or the folder cannot be used, or a point could not be built or answered.
    """
    request = SweepRequest(
        recipe=recipe,
        pruners=all_pruners() if pruners is None else tuple(pruners),
        keeps=tuple(keeps),
        positions=tuple(positions),
        backend=backend,
        limit=limit,
        batch=batch,
        threads=threads,
    )
    prepared = prepare(request, Path(out), replace=replace, plot=plot)
    return run(prepared, workers=workers, cluster=cluster, plot=plot, progress=progress)


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run, or resumed.

    Attributes:
        request: what was asked for.
        store: its folder.
        visual_tokens: before pruning.
        points: in the order of the table, the unpruned one first.
        skipped: points that cannot be.
        lock: of the folder, until the sweep has run.
    """

    request: SweepRequest
    store: Store
    visual_tokens: int
    points: tuple[SweepPoint, ...]
    skipped: tuple[Skipped, ...]
    lock: FolderLock

    def remaining(self) -> list[SweepPoint]:
        """Points that are not finished."""
        return [point for point in self.points if point not in self.store]


def prepare(request: SweepRequest, out: Path, *, replace: bool = False, plot: bool = True) -> Sweep:
    """Check everything that can be checked before the long part, and open the folder.

    Args:
        request: what is wanted.
        out: folder of the sweep; finished points in it are kept.
        replace: throw a sweep of other settings away.
        plot: whether a plot will be drawn.

    Raises:
        GapExportError: the request, the checkpoint or the folder cannot be used, or what the plot needs is not there.
    """
    check_build_extra("a sweep")
    if plot:
        plotting.check_matplotlib("pip install 'gap-export[report]', or pass --no-plot")
    check_folder(out, SWEEP, replaced=False, outside=(BUNDLE,))
    reads_text = any(prune.row(name).needs_text for name in request.pruners)
    model = open_model(request.recipe, reads_text=reads_text)
    points, skipped = plan_points(request, model.spec, model.text_tower)
    lock = FolderLock(out)
    with lock.kept():
        store = open_store(out, _settings(request, model.checkpoint), replace=replace)
    return Sweep(request, store, model.spec.visual_tokens, tuple(points), tuple(skipped), lock)


def run(
    sweep: Sweep,
    *,
    workers: int = 1,
    cluster: Cluster | None = None,
    plot: bool = True,
    progress: Progress = SILENT,
    finished: Callable[[SweepPoint, Answers], None] = lambda point, answers: None,
) -> SweepRecord:
    """Answer the points that are not finished, then write record, page and plot into the folder.

    Args:
        sweep: prepared.
        workers: processes that points are dispatched to; what comes out does not depend on it.
        cluster: of Ray, to dispatch them to instead; checkpoints must be there under the same paths.
        plot: draw it.
        progress: told of every stage, and of every answer: `limit` per remaining point.
        finished: told of every point that was finished now.

    Raises:
        GapExportError: a point could not be built or answered. Points finished before are kept.
    """
    store, request = sweep.store, sweep.request
    with sweep.lock, scratch_folder(beside=store.folder, purpose="sweeping") as scratch:
        make_worker = partial(_PointWorker, request, scratch)
        tasks = _grouped(sweep.remaining(), request.keeps)
        progress.stage("starting", total=request.limit * sum(map(len, tasks)))
        dispatched = dispatch(
            make_worker,
            tasks,
            workers=workers,
            cluster=cluster,
            name_of=lambda points: points[0].label,
            progress=progress,
        )
        with closing(dispatched) as results:
            for point, answers in results:
                store.save(point, answers)
                finished(point, answers)
        record = record_from_answers(
            request.recipe.name,
            sweep.visual_tokens,
            [(point, store.answers(point)) for point in sweep.points],
            sweep.skipped,
            store.settings,
        )
        store.results.write(RECORD, record.text())
        store.results.write(PAGE, page(record, PLOT if plot else None))
        if plot:
            store.results.write(PLOT, plotting.png(figure(record)))
        return record


class _PointWorker:
    """A worker: builds the bundles of some points and answers the scenes with each.

    Args:
        request: of the sweep.
        scratch: where bundles lie until they have answered.
    """

    def __init__(self, request: SweepRequest, scratch: Path) -> None:
        from gap_export.graph.trace_cache import Tracer
        from gap_export.graph.trace_folder import user_folder

        self._request, self._scratch = request, scratch
        if not scratch.is_dir():  # on another machine of a cluster; the folder goes when this worker does
            self._own = tempfile.TemporaryDirectory(prefix="gap-export-sweep-", ignore_cleanup_errors=True)
            self._scratch = Path(self._own.name)
        self._questions = list(scenes.cases(request.limit))
        self._tracer = Tracer(user_folder())

    def __call__(
        self, points: Sequence[SweepPoint], progress: Progress
    ) -> Iterator[tuple[SweepPoint, Answers]]:
        """One bundle per point: always right. Where one bundle can serve several points, this is the place."""
        for point in points:
            try:
                answers = self._answers(point, Prefixed(progress, point.label))
            except GapExportError as error:
                error.subject = f"{point.label}: {error.subject}"
                raise
            yield point, answers

    def _answers(self, point: SweepPoint, progress: Progress) -> Answers:
        request = self._request

        recipe = request.recipe_of(point)
        folder = self._scratch / point.name
        bundle = build(recipe, folder, golden=False, tracer=self._tracer, progress=progress).bundle
        progress.stage("answering")
        with open_session(bundle, request.backend, threads=request.threads) as session:
            runs = runner.run_cases(
                Grounder(bundle),
                session,
                self._questions,
                batch=min(request.batch, recipe.max_batch),
                progress=progress,
            )
        shutil.rmtree(folder)
        return answers_of(runs, self._questions, request.backend)


def answers_of(runs: Sequence[Grounded], cases: Sequence[scenes.Case], backend: str) -> Answers:
    """What is kept of a run.

    Raises:
        SessionError: logits that are not numbers.
    """
    for batch in runs:
        check_overflow(batch.generation, backend)
    boxes = runner.boxes_of(runs)
    overlaps = metrics.iou(metrics.as_rows(boxes), metrics.as_rows([case.box for case in cases]))
    return Answers(
        texts=tuple(answer.text for batch in runs for answer in batch.answers),
        ious=tuple(overlaps.tolist()),
        without_box=sum(box is None for box in boxes),
        cut_off=sum(not ended for batch in runs for ended in batch.generation.ended),
    )


def _grouped(points: Sequence[SweepPoint], keeps: Sequence[float]) -> list[list[SweepPoint]]:
    """Points of one pruner and count together, groups of one count in a row: they have most graphs in common."""
    groups: dict[tuple[str, float], list[SweepPoint]] = {}
    for point in points:
        groups.setdefault((point.pruner, point.keep), []).append(point)
    order = {keep: place for place, keep in enumerate(keeps)}
    return sorted(groups.values(), key=lambda group: order.get(group[0].keep, -1))


def _settings(request: SweepRequest, checkpoint: Checkpoint) -> Settings:
    text_tower = checkpoint.companions.get("text_tower")
    swept = {"pruner", "keep", "positions", "capacity", "targets"}
    return Settings(
        recipe=request.recipe.model_dump(mode="json", exclude=swept),
        checkpoint_sha256=checkpoint.files_sha256(),
        text_tower_sha256=None if text_tower is None else text_tower.files_sha256(),
        backend=request.backend,
        limit=request.limit,
        scenes_seed=scenes.HELD_OUT_SEED,
        batch=min(request.batch, request.recipe.max_batch),
        threads=request.threads,
        versions=versions(BUILD_PACKAGES),
    )
