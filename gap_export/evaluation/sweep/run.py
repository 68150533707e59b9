"""Every strategy at every count under every position policy: accuracy of the exported graphs on held-out scenes.

A cell is one bundle, built and answered like any other: no number comes from anything but its graphs in the runtime. What
makes a sweep quick is that equal components are traced once per process (`graph.trace.TracedOnce`): the decoder does not
depend on the strategy, nor the vision graph on how the kept tokens are numbered, so that most cells trace one graph or two.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from gap_export import prune
from gap_export.boxes import metrics, scenes
from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.environment import BUILD_PACKAGES, versions
from gap_export.errors import GapExportError, InputError, RecipeError
from gap_export.evaluation import runner
from gap_export.evaluation.sweep import plot as sweep_plot
from gap_export.evaluation.sweep.record import (
    FULL,
    Answers,
    Cell,
    Settings,
    Skipped,
    SweepRecord,
    page,
    record_from_answers,
)
from gap_export.evaluation.sweep.store import PAGE, PLOT, RECORD, Store, open_store
from gap_export.files import record_of, scratch_folder, write_atomically
from gap_export.inputs.prompt import TextTower
from gap_export.parallel.local import Notify, Step, results_of
from gap_export.parallel.ray import Cluster, results_on
from gap_export.pipeline import build
from gap_export.pipeline.opened import open_model
from gap_export.plan import plan_for
from gap_export.positions import PositionPolicy
from gap_export.progress import Stages
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session, target_of
from gap_export.runtime.generate import check_overflow
from gap_export.runtime.grounder import Grounded, Grounder

Entry = TypeVar("Entry")

UNPRUNED = "none"
"""The strategy of the reference cell, which every sweep has once."""


@dataclass(frozen=True)
class Request:
    """What a sweep is asked for.

    Attributes:
        recipe: all that is not swept.
        pruners: strategies.
        keeps: fractions of visual tokens kept.
        positions: policies.
        backend: name of a runtime that runs bundles.
        cases: scenes per cell.
        batch: images per call, at most what the recipe allows.
        threads: of ONNX Runtime, in every process; 0 lets it choose.
    """

    recipe: Recipe
    pruners: tuple[str, ...]
    keeps: tuple[float, ...]
    positions: tuple[PositionPolicy, ...] = tuple(PositionPolicy)
    backend: str = "onnxruntime"
    cases: int = 500
    batch: int = 16
    threads: int = 1

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of one cell's bundle."""
        # A capacity that is just enough for one count is too small for another; by default it is enough for each.
        return self.recipe.model_copy(update={"capacity": None}).replaced(
            pruner=cell.pruner,
            keep=cell.keep,
            positions=PositionPolicy.GAP if cell.positions == FULL else cell.positions,
            targets=(target_of(self.backend),),
        )


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run, or gone on with.

    Attributes:
        request: what was asked for.
        store: its folder.
        visual_tokens: before pruning.
        cells: in the order of the table, the unpruned one first.
        skipped: cells that cannot be.
    """

    request: Request
    store: Store
    visual_tokens: int
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]

    def remaining(self) -> list[Cell]:
        """Cells that are not finished."""
        return [cell for cell in self.cells if cell not in self.store]


def pruners_from(text: str) -> tuple[str, ...]:
    """Strategies in a list with commas; `all` is every one but `none`, which is the reference of every sweep.

    Raises:
        RecipeError: an unknown name, `none`, an empty list, a name twice.
    """
    if text.strip() == "all":
        return tuple(name for name in prune.names() if name != UNPRUNED)
    names = _entries(text, "pruners")
    for name in names:
        if prune.strategy(name).name == UNPRUNED:
            raise RecipeError(
                "is the reference of every sweep and always measured",
                subject="pruners: none",
                hint="leave it out",
            )
    return _distinct(names, "pruners")


def keeps_from(text: str) -> tuple[float, ...]:
    """Fractions in a list with commas.

    Raises:
        RecipeError: not a number, outside (0, 1], an empty list, a fraction twice.
    """
    keeps = []
    for entry in _entries(text, "keep"):
        try:
            keeps.append(float(entry))
        except ValueError as error:
            raise RecipeError(
                "is not a number", subject=f"keep {entry!r}", hint="a list looks like 0.5,0.25,0.11"
            ) from error
        prune.check_fraction(keeps[-1])
    return _distinct(keeps, "keep")


def positions_from(text: str) -> tuple[PositionPolicy, ...]:
    """Policies in a list with commas.

    Raises:
        RecipeError: an unknown name, an empty list, a name twice.
    """
    known = {str(policy): policy for policy in PositionPolicy}
    entries = _entries(text, "positions")
    for entry in entries:
        if entry not in known:
            raise RecipeError(
                "is not a position policy",
                subject=repr(entry),
                hint=f"choose from {', '.join(known)}; unpruned (full) is always measured",
            )
    return _distinct([known[entry] for entry in entries], "positions")


def prepare(request: Request, out: Path, *, replace: bool = False, plot: bool = True) -> Sweep:
    """Check everything that can be checked before the long part, and open the folder.

    Args:
        request: what is wanted.
        out: folder of the sweep; finished cells in it are kept.
        replace: throw a sweep of other settings away.
        plot: whether a plot will be drawn.

    Raises:
        GapExportError: the request, the checkpoint or the folder cannot be used, or what the plot needs is not there.
    """
    if request.cases < 1 or request.batch < 1:
        raise InputError(
            "must be at least 1",
            subject=f"cases {request.cases}, batch {request.batch}",
            hint="500 scenes give a standard error of at most 0.022",
        )
    if plot:
        sweep_plot.require()
    reads_text = any(prune.strategy(name).needs_text for name in request.pruners)
    model = open_model(request.recipe, reads_text=reads_text)
    cells, skipped = plan_cells(request, model.spec, model.text_tower)
    store = open_store(out, _settings(request, model.checkpoint), replace=replace)
    return Sweep(request, store, model.spec.visual_tokens, tuple(cells), tuple(skipped))


def run(
    sweep: Sweep,
    *,
    jobs: int = 1,
    cluster: Cluster | None = None,
    plot: bool = True,
    notify: Notify = lambda step: None,
    finished: Callable[[Cell, Answers], None] = lambda cell, answers: None,
) -> SweepRecord:
    """Answer the cells that are not finished, then write record, page and plot into the folder.

    Args:
        sweep: prepared.
        jobs: processes to deal cells to; what comes out does not depend on it.
        cluster: of Ray, to deal them to instead; checkpoints must be there under the same paths.
        plot: draw it.
        notify: told of every stage, and of answers as they are made: `cases` per remaining cell.
        finished: told of every cell that was finished now.

    Raises:
        GapExportError: a cell could not be built or answered. Cells finished before are kept.
    """
    store, request = sweep.store, sweep.request
    with scratch_folder(beside=store.folder, purpose="sweeping") as scratch:
        make_worker = partial(_Answering, request, scratch)
        tasks = _grouped(sweep.remaining(), request.keeps)
        dealt = (
            results_of(make_worker, tasks, jobs=jobs, notify=notify)
            if cluster is None
            else _results_on(cluster, make_worker, tasks, notify)
        )
        with closing(dealt) as results:
            for cell, answers in results:
                store.save(cell, answers)
                finished(cell, answers)
    record = record_from_answers(
        request.recipe.name,
        sweep.visual_tokens,
        [(cell, store.answers(cell)) for cell in sweep.cells],
        sweep.skipped,
        store.settings,
    )
    record.write(store.folder / RECORD)
    write_atomically(store.folder / PAGE, page(record, PLOT if plot else None))
    if plot:
        write_atomically(store.folder / PLOT, sweep_plot.png(record))
    return record


def _results_on(
    cluster: Cluster, make_worker: Callable[[], _Answering], tasks: Sequence[Sequence[Cell]], notify: Notify
) -> Generator[tuple[Cell, Answers]]:
    """Cells of a group arrive together: what a worker does between is not told across the cluster."""
    worker, named = partial(_whole_groups, make_worker), lambda cells: cells[0].label
    with closing(results_on(cluster, worker, tasks, name_of=named)) as groups:
        for group in groups:
            for cell, answers in group:
                notify(Step(cell.label, len(answers.ious)))
                yield cell, answers


def _whole_groups(
    make_worker: Callable[[], _Answering],
) -> Callable[[Sequence[Cell]], list[tuple[Cell, Answers]]]:
    """A worker that gives all cells of a group at once."""
    worker = make_worker()
    return lambda cells: list(worker(cells, lambda step: None))


def plan_cells(
    request: Request, facts: ModelSpec, text_tower: TextTower | None = None
) -> tuple[list[Cell], list[Skipped]]:
    """Which cells there are, and which cannot be.

    Args:
        request: of the sweep.
        facts: sizes of the model.
        text_tower: for strategies that look at the expression, where the recipe has one.

    Raises:
        RecipeError: an unknown strategy, two fractions that keep the same count, or a recipe that does not work unpruned either.
    """
    # A name that nobody knows is a mistake, not a strategy to be skipped.
    strategies = [prune.strategy(name) for name in request.pruners]
    counts: dict[int, float] = {}
    for keep in request.keeps:
        kept = prune.kept_count(keep, facts.visual_tokens)
        if kept in counts:
            raise RecipeError(
                f"keep the same {kept} of {facts.visual_tokens} tokens",
                subject=f"keep {counts[kept]:g} and {keep:g}",
                hint="leave one of them out",
            )
        counts[kept] = keep
    full = Cell(pruner=UNPRUNED, keep=1.0, kept=facts.visual_tokens, positions=FULL)
    plan_for(request.recipe_of(full), facts)
    cells, skipped = [full], []
    for strategy in strategies:
        for kept, keep in counts.items():
            for policy in request.positions:
                cell = Cell(pruner=strategy.name, keep=keep, kept=kept, positions=policy)
                try:
                    plan_for(request.recipe_of(cell), facts, text_tower if strategy.needs_text else None)
                    cells.append(cell)
                except RecipeError as error:
                    skipped.append(Skipped(**cell.model_dump(), reason=error.message))
    return cells, skipped


class _Answering:
    """A worker: builds the bundles of some cells and answers the scenes with each.

    Args:
        request: of the sweep.
        scratch: where bundles lie until they have answered.
    """

    def __init__(self, request: Request, scratch: Path) -> None:
        from gap_export.graph.trace import TracedOnce

        # On another machine of a cluster the caller's folder need not be there.
        self._request, self._scratch = request, scratch if scratch.is_dir() else Path(tempfile.mkdtemp())
        self._questions = list(scenes.cases(request.cases))
        self._tracer = TracedOnce()

    def __call__(self, cells: Sequence[Cell], notify: Notify) -> Iterator[tuple[Cell, Answers]]:
        """One bundle per cell: always right. Where one bundle can serve several cells, this is the place."""
        for cell in cells:
            try:
                answers = self._answers(cell, notify)
            except GapExportError as error:
                error.subject = f"{cell.label}: {error.subject}"
                raise
            yield cell, answers

    def _answers(self, cell: Cell, notify: Notify) -> Answers:
        request = self._request

        def progress(words: str) -> None:
            notify(Step(f"{cell.label}: {words}"))

        recipe = request.recipe_of(cell)
        folder = self._scratch / cell.name
        bundle = build.build(recipe, folder, tracer=self._tracer, progress=Stages(progress)).bundle
        progress("answering")
        with open_session(bundle, request.backend, threads=request.threads) as session:
            runs = runner.run_cases(
                Grounder(bundle),
                session,
                self._questions,
                batch=min(request.batch, recipe.max_batch),
                tick=lambda count: notify(Step("", count)),
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


def _grouped(cells: Sequence[Cell], keeps: Sequence[float]) -> list[list[Cell]]:
    """Cells of one strategy and count together, groups of one count in a row: they have most graphs in common."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.pruner, cell.keep), []).append(cell)
    order = {keep: place for place, keep in enumerate(keeps)}
    return sorted(groups.values(), key=lambda group: order.get(group[0].keep, -1))


def _settings(request: Request, checkpoint: Checkpoint) -> Settings:
    text_tower = checkpoint.companions.get("text_tower")
    swept = {"pruner", "keep", "positions", "capacity", "targets"}
    return Settings(
        recipe=request.recipe.model_dump(mode="json", exclude=swept),
        checkpoint_sha256=_hash_of(checkpoint),
        text_tower_sha256=None if text_tower is None else _hash_of(text_tower),
        backend=request.backend,
        cases=request.cases,
        scenes_seed=scenes.HELD_OUT_SEED,
        batch=min(request.batch, request.recipe.max_batch),
        threads=request.threads,
        versions=versions(BUILD_PACKAGES),
    )


def _hash_of(checkpoint: Checkpoint) -> str:
    files = {
        path.name: record_of(path).sha256
        for path in sorted(checkpoint.folder.iterdir())
        if path.suffix in (".json", ".safetensors")
    }
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _entries(text: str, option: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise RecipeError(
            "has an empty entry", subject=f"{option} {text!r}", hint="separate entries with single commas"
        )
    return entries


def _distinct(entries: list[Entry], option: str) -> tuple[Entry, ...]:
    twice = next((entry for place, entry in enumerate(entries) if entry in entries[:place]), None)
    if twice is not None:
        raise RecipeError("is listed twice", subject=f"{option} {twice}", hint="leave one of them out")
    return tuple(entries)
